"""Finds a model's rotary position embedding (RoPE, arXiv 2104.09864) and checks that kvpack can undo it."""

from __future__ import annotations

import numpy as np
import torch

from kvpack.capture import CaptureOptions, Model, run_tokens
from kvpack.codecs.chain.base import Floats
from kvpack.codecs.chain.transforms.unrope import rotate
from kvpack.errors import UnsupportedError

CHECKED_TOKENS = 64
TOLERANCE = 0.02
"""Tolerance relative to the largest key element; bf16 keys are rounded to 2**-9 and rotated in bf16."""

_CHANGING = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies change with the length of the context."""


def inverse_frequencies(model: Model) -> Floats:
    """Return RoPE's frequency of each rotated pair of dimensions in radians per position, ``[R / 2]``.

    The result is empty for a model without RoPE.

    Raises:
        UnsupportedError: The frequencies change with the context or between layers, or the rotated pairs are not
            (i, i + R / 2).

    """
    found = {
        tuple(np.asarray(module.inv_freq.detach().float().cpu()).tolist()): str(getattr(module, "rope_type", "default"))
        for module in model.network.modules()
        if getattr(module, "inv_freq", None) is not None
    }
    if not found:
        return np.zeros(0, np.float32)
    if len(found) > 1 or set(found.values()) & set(_CHANGING):
        raise UnsupportedError(
            f"{model.name} rotates keys by more than one set of frequencies: cannot calibrate for it"
        )
    frequencies = np.array(next(iter(found)), np.float32)
    _check(model, frequencies)
    return frequencies


def rotated(keys: torch.Tensor, frequencies: Floats, sign: int) -> torch.Tensor:
    """Return keys ``[..., T, D]`` from position 0 on with RoPE applied (``sign`` 1) or undone (-1), on their device."""
    angles = torch.arange(keys.shape[-2])[:, None] * torch.from_numpy(frequencies).double()[None]
    cos, sin = (f(angles).float().to(keys.device) for f in (torch.cos, torch.sin))
    half, sin = len(frequencies), sign * sin
    left, right = keys[..., :half], keys[..., half : 2 * half]
    return torch.cat([left * cos - right * sin, right * cos + left * sin, keys[..., 2 * half :]], dim=-1)


def _check(model: Model, frequencies: Floats) -> None:
    """Check that the first layer's keys of one token at many positions are equal once RoPE is undone.

    Raises:
        UnsupportedError: They are not.

    """
    cache = run_tokens(model, [model.config.vocab_size // 2] * CHECKED_TOKENS, CaptureOptions(queries=0))
    keys = cache.keys[0].float().numpy()
    flat = rotate(keys, frequencies, 0, -1) if 2 * len(frequencies) <= keys.shape[2] else keys
    if np.abs(flat - flat[:, :1]).max() > TOLERANCE * np.abs(keys).max():
        raise UnsupportedError(f"{model.name} rotates keys in a way that kvpack cannot undo: cannot calibrate for it")

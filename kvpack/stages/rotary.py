"""Rotary position embedding (RoPE, arXiv 2104.09864)."""

from __future__ import annotations

import numpy as np

from kvpack.stages.base import Floats


def rotate(values: Floats, inverse_frequencies: Floats, first: int, sign: int) -> Floats:
    """Turn the pairs (i, i + R/2) of each vector ``[..., T, D]`` by ``sign`` times position times frequency.

    ``inverse_frequencies`` is ``[R / 2]``, radians a position, for the first R dimensions of D; positions are
    ``first ..``. Angles are taken in float64.
    """
    half = len(inverse_frequencies)
    positions = np.arange(first, first + values.shape[-2], dtype=np.float64)
    angles = positions[:, None] * inverse_frequencies.astype(np.float64)
    cos, sin = np.cos(angles).astype(np.float32), (sign * np.sin(angles)).astype(np.float32)
    out = values.copy()
    left, right = values[..., :half], values[..., half : 2 * half]
    with np.errstate(over="ignore", invalid="ignore"):
        out[..., :half] = left * cos - right * sin
        out[..., half : 2 * half] = right * cos + left * sin
    return out

"""``unrope``: keys as they were before rotary position embedding (RoPE, arXiv 2104.09864), where ranks are lower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvpack.errors import MismatchError
from kvpack.stages.base import Floats, Part, Transform


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


@dataclass(frozen=True)
class Unrope(Transform):
    """Undoes RoPE with the profile's ``rope.inv_freq``; a profile with none of them leaves keys alone."""

    name: ClassVar[str] = "unrope"
    version: ClassVar[int] = 1
    profiled: ClassVar[bool] = True

    def forward(self, values: Floats, part: Part) -> Floats:
        """Keys after RoPE to keys before it; ``[H, T, D]``."""
        return rotate(values, _frequencies(part), part.first, -1)

    def inverse(self, values: Floats, part: Part) -> Floats:
        """Keys before RoPE to keys after it; ``[H, T, D]``."""
        return rotate(values, _frequencies(part), part.first, 1)


def _frequencies(part: Part) -> Floats:
    frequencies: Floats = part.array("rope.inv_freq")
    if frequencies.ndim != 1 or 2 * len(frequencies) > part.shape[2]:
        raise MismatchError("the profile's rotary embedding is not this model's")
    return frequencies

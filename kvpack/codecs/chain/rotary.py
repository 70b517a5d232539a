"""Rotary position embedding (RoPE, arXiv 2104.09864)."""

from __future__ import annotations

import numpy as np

from kvpack.codecs.chain.base import Floats


def turns(inverse_frequencies: Floats, first: int, tokens: int) -> tuple[Floats, Floats]:
    """Return the cosines and sines of position times frequency, ``[tokens, R / 2]``, for positions from ``first`` on.

    ``inverse_frequencies`` ``[R / 2]`` is in radians per position. Angles are computed in float64.
    """
    positions = np.arange(first, first + tokens, dtype=np.float64)
    angles = positions[:, None] * inverse_frequencies.astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(values: Floats, inverse_frequencies: Floats, first: int, sign: int) -> Floats:
    """Rotate the pairs (i, i + R / 2) of each vector ``[..., T, D]`` by ``sign`` times the angles of :func:`turns`.

    The pairs are the first R of the D dimensions; the others are copied unchanged.
    """
    half = len(inverse_frequencies)
    cos, sin = turns(inverse_frequencies, first, values.shape[-2])
    sin = sign * sin
    out = values.copy()
    left, right = values[..., :half], values[..., half : 2 * half]
    with np.errstate(over="ignore", invalid="ignore"):
        out[..., :half] = left * cos - right * sin
        out[..., half : 2 * half] = right * cos + left * sin
    return out

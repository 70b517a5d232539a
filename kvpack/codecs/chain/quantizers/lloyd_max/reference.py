"""Lloyd-Max codes and the QJL sketch in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Codes, Floats
from kvpack.codecs.chain.random import gaussian_matrix

_POSITIVE: dict[int, tuple[float, ...]] = {
    0: (),
    1: (0.79788456,),
    2: (0.45278003, 1.51041761),
    3: (0.24509418, 0.75600528, 1.34390928, 2.1519457),
    4: (0.12839503, 0.3880483, 0.65675912, 0.94234046, 1.2562312, 1.61804639, 2.06901723, 2.73258957),
}
"""Positive centroids, by bits, of the optimal quantizer of N(0, 1) with 2**bits levels (Max 1960, table I)."""


def centroids(bits: int, dims: int) -> Floats:
    """Return the codebook for coordinates of unit vectors of ``dims`` dimensions, ascending, ``[2**bits]``."""
    positive = np.array(_POSITIVE[bits] or (0.0,))
    levels = np.concatenate([-positive[::-1], positive]) if bits else positive
    return np.asarray(levels / np.sqrt(max(dims, 1)), np.float32)


def quantize(unit: Floats, bits: int) -> Codes:
    """Return the index of the nearest centroid for each coordinate, ``[H, T, D]`` uint8."""
    levels = centroids(bits, unit.shape[-1])
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, unit).astype(np.uint8)


def dequantize(codes: Codes, bits: int, dims: int) -> Floats:
    """Return the centroid of each code, ``[H, T, D]`` float32."""
    return np.asarray(centroids(bits, dims)[codes])


def sketch(residual: Floats, seed: int) -> tuple[Codes, NDArray[np.float16]]:
    """Return the QJL sketch of residuals r (arXiv 2406.03482), with S a Gaussian matrix.

    It is the signs of S r as 0 and 1, ``[H, T, D]``, and the norms of r, ``[H, T, 1]``.
    """
    projection = gaussian_matrix(residual.shape[-1], seed)
    signs = (residual @ projection.T >= 0).astype(np.uint8)
    return signs, np.sqrt(np.square(residual).sum(-1, keepdims=True)).astype(np.float16)


def unsketch(signs: Codes, length: NDArray[np.float16], seed: int) -> NDArray[Any]:
    """Return the unbiased estimate of r from its sketch: sqrt(pi / 2) / D * |r| * S^T sign(S r), ``[H, T, D]``."""
    dims = signs.shape[-1]
    projection = gaussian_matrix(dims, seed)
    scale = np.float32(np.sqrt(np.pi / 2) / max(dims, 1)) * length.astype(np.float32)
    return scale * ((signs.astype(np.float32) * 2 - 1) @ projection)

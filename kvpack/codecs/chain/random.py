"""Seeded random matrices, which the reader of a file generates again as ``docs/format.md`` specifies.

This module does not use ``numpy.random``, whose streams may change between releases (NEP 19): files must stay
readable.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Floats, UnrepresentableError

MAX_DIMS = 4096
"""Upper bound of a matrix's dimensions: head dimensions are 64 to 576, and a file must not request terabytes."""


def _splitmix64(seed: int, count: int) -> NDArray[np.uint64]:
    """Return the first ``count`` outputs of SplitMix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _gaussian(dims: int, seed: int) -> NDArray[np.float64]:
    """Return samples of N(0, 1), ``[dims, dims]``, by the cosine branch of Box-Muller on pairs of uniforms."""
    if dims > MAX_DIMS:
        raise UnrepresentableError(f"random matrices have at most {MAX_DIMS} dimensions, not {dims}")
    uniform = ((_splitmix64(seed, 2 * dims * dims) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = uniform[0::2], uniform[1::2]
    return np.asarray(np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)).reshape(dims, dims)


@lru_cache(maxsize=16)
def gaussian_matrix(dims: int, seed: int) -> Floats:
    """Return a matrix ``[dims, dims]`` of independent samples of N(0, 1), float32, read-only."""
    matrix = _gaussian(dims, seed).astype(np.float32)
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=16)
def rotation_matrix(dims: int, seed: int) -> Floats:
    """Return a Haar-random orthogonal matrix ``[dims, dims]``, float32, read-only.

    It comes from Gram-Schmidt on the rows of a Gaussian matrix, in float64; each row is orthogonalised twice.
    """
    rows = _gaussian(dims, seed)
    for i in range(dims):
        for _ in range(2):
            rows[i] -= (rows[:i] @ rows[i]) @ rows[:i]
        rows[i] /= np.sqrt(rows[i] @ rows[i])
    matrix = rows.astype(np.float32)
    matrix.flags.writeable = False
    return matrix

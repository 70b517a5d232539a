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


_DIRECT = 1024
"""Up to this many dimensions, Gram-Schmidt row by row is fast enough. Codecs have never used more than 576."""


def _splitmix64(seed: int, first: int, stop: int) -> NDArray[np.uint64]:
    """Return the outputs ``[first, stop)`` of SplitMix64 (Steele, Lea, Flood 2014), counted from 0."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15) * np.arange(first + 1, stop + 1, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _gaussian(dims: int, seed: int) -> NDArray[np.float64]:
    """Return samples of N(0, 1), ``[dims, dims]``, by the cosine branch of Box-Muller on pairs of uniforms."""
    if dims > MAX_DIMS:
        raise UnrepresentableError(f"random matrices have at most {MAX_DIMS} dimensions, not {dims}")
    found = np.empty(dims * dims)
    for first in range(0, len(found), _DIRECT**2):  # so that little memory is needed besides the matrix
        stop = min(first + _DIRECT**2, len(found))
        uniform = ((_splitmix64(seed, 2 * first, 2 * stop) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        radius, angle = uniform[0::2], uniform[1::2]
        found[first:stop] = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
    return found.reshape(dims, dims)


@lru_cache(maxsize=16)
def gaussian_matrix(dims: int, seed: int) -> Floats:
    """Return a matrix ``[dims, dims]`` of independent samples of N(0, 1), float32, read-only."""
    matrix = _gaussian(dims, seed).astype(np.float32)
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=16)
def rotation_matrix(dims: int, seed: int) -> Floats:
    """Return a Haar-random orthogonal matrix ``[dims, dims]``, float32, read-only.

    It comes from Gram-Schmidt on the rows of a Gaussian matrix, in float64; each row is orthogonalised twice. Large
    matrices, which no codec's file needs but any file may ask for, come from Householder's reflections, which give
    the same but for the last bits of float64 and take a fraction of the time.
    """
    rows = _gaussian(dims, seed)
    if dims > _DIRECT:
        columns, triangle = np.linalg.qr(rows.T)
        columns *= np.sign(np.diag(triangle))
        matrix = np.ascontiguousarray(columns.T, np.float32)
    else:
        for i in range(dims):
            for _ in range(2):
                rows[i] -= (rows[:i] @ rows[i]) @ rows[:i]
            rows[i] /= np.sqrt(rows[i] @ rows[i])
        matrix = rows.astype(np.float32)
    matrix.flags.writeable = False
    return matrix

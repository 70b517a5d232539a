"""The decisions of ``reference.py``, and the decoder's reconstruction, compiled by numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Floats
from kvpack.codecs.chain.quantizers.dead_zone.reference import BIT, MAX_SHIFT, SHIFT_BITS, THRESHOLDS
from kvpack.numerics.jit import njit

Array = NDArray[Any]


@njit
def quantize(
    values: Floats, steps: Floats, columns: Array, rows: Array, wanted: Floats, costs: Array, buckets: Array,
    shifts: Array, codes: Array,
) -> None:  # fmt: skip
    """Fill ``shifts`` ``[T]`` int32 and ``codes`` ``[T, D]`` uint16; codes are decided with the shifted classes.

    ``buckets`` is the bucket of each magnitude below its length; larger magnitudes use its last entry.
    """
    found = np.empty(values.shape[1], np.int32)
    for t in range(len(values)):
        _magnitudes(values[t], steps[t], columns, rows[t], wanted, found)
        shifts[t] = _shift(found, columns, rows[t], buckets, costs)
        if shifts[t] != 0:
            _magnitudes(values[t], steps[t], columns, rows[t] - 8 * shifts[t], wanted, found)
        for d in range(len(found)):
            codes[t, d] = 2 * found[d] - (values[t, d] < 0 and found[d] > 0)


@njit
def _magnitudes(values: Floats, step: float, columns: Array, row: int, wanted: Floats, out: Array) -> None:
    """Write the largest magnitude whose threshold each value reaches into ``out`` ``[D]``."""
    top = len(wanted) - 1
    for d in range(len(values)):
        out[d] = np.int32(abs(values[d]) / step + np.float32(0.5))
    for d in range(len(values)):
        found = out[d]
        if found > 0:
            scaled = abs(values[d]) / step
            k = min(max((columns[d] - row) >> 3, 0), top)
            while found > 0:
                beyond = max(found - np.int32(THRESHOLDS - 1), np.int32(0))
                if scaled >= wanted[k, found - beyond] + np.float32(beyond):
                    break
                found -= np.int32(1)
            out[d] = found


@njit
def _shift(found: Array, columns: Array, row: int, buckets: Array, costs: Array) -> int:
    best, shift = _cost(found, columns, row, buckets, costs, 0), 0
    for way in (-1, 1):
        while -MAX_SHIFT < shift + way < MAX_SHIFT and shift * way >= 0:
            cost = _cost(found, columns, row, buckets, costs, shift + way)
            if cost >= best:
                break
            best, shift = cost, shift + way
    return shift


@njit
def _cost(found: Array, columns: Array, row: int, buckets: Array, costs: Array, shift: int) -> int:
    total, top = SHIFT_BITS * BIT * abs(shift), len(costs) - 1
    for d in range(len(columns)):
        k = min(max(((columns[d] - row) >> 3) + shift, 0), top)
        total += costs[k, buckets[min(found[d], len(buckets) - 1)]]
    return total


@njit
def restore(codes: Array, steps: Floats, columns: Array, rows: Array, centroids: Floats, out: Floats) -> None:
    """Write the values of zigzag codes into ``out`` ``[T, D]``: the centroid of each bin times the token's step."""
    top = len(centroids) - 1
    for t in range(len(codes)):
        for d in range(codes.shape[1]):
            code = codes[t, d]
            out[t, d] = 0
            if code:
                magnitude = (code + 1) >> 1
                k = min(max((columns[d] - rows[t]) >> 3, 0), top)
                read = (np.float32(magnitude) + centroids[k, min(magnitude, 3)]) * steps[t]
                out[t, d] = -read if code & 1 else read

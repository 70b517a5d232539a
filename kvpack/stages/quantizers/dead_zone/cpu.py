"""The reference compiled by numba: the same decisions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.stages.base import Floats
from kvpack.stages.jit import njit
from kvpack.stages.quantizers.dead_zone.reference import MOST_SHIFT, SHIFT_BITS, THRESHOLDS

Array = NDArray[Any]


@njit
def magnitudes(values: Floats, steps: Floats, columns: Array, rows: Array, wanted: Floats, out: Array) -> None:
    """``out`` ``[T, D]`` int32: the largest magnitude whose threshold is reached."""
    tokens, dims = values.shape
    top = len(wanted) - 1
    for t in range(tokens):
        step = steps[t]
        for d in range(dims):
            scaled = abs(values[t, d]) / step
            found = np.int32(scaled + np.float32(0.5))
            if found > 0:
                k = min(max((columns[d] - rows[t]) >> 3, 0), top)
                while found > 0:
                    beyond = max(found - np.int32(THRESHOLDS - 1), np.int32(0))
                    if scaled >= wanted[k, found - beyond] + np.float32(beyond):
                        break
                    found -= np.int32(1)
            out[t, d] = found


@njit
def shifts(found: Array, columns: Array, rows: Array, buckets: Array, bits: Array, out: Array) -> None:
    """``out`` ``[T]`` int32; ``buckets`` of the magnitudes below its length, of those beyond the last."""
    for t in range(len(found)):
        best, shift = _bits(found[t], columns, rows[t], buckets, bits, 0), 0
        for way in (-1, 1):
            while -MOST_SHIFT < shift + way < MOST_SHIFT and shift * way >= 0:
                cost = _bits(found[t], columns, rows[t], buckets, bits, shift + way)
                if cost >= best:
                    break
                best, shift = cost, shift + way
        out[t] = shift


@njit
def _bits(found: Array, columns: Array, row: int, buckets: Array, bits: Array, shift: int) -> float:
    total, top = SHIFT_BITS * abs(shift), len(bits) - 1
    for d in range(len(columns)):
        k = min(max(((columns[d] - row) >> 3) + shift, 0), top)
        total += bits[k, buckets[min(found[d], len(buckets) - 1)]]
    return total

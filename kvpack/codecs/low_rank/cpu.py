"""The functions of ``reference.py`` compiled by numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32
from numpy.typing import NDArray

from kvpack.codecs.chain.symbols import DIRECT, LARGEST
from kvpack.numerics.jit import njit

Array = NDArray[Any]


@njit
def _bucket(magnitude: int) -> int:
    if magnitude < DIRECT:
        return magnitude
    octave = 3
    while magnitude >> (octave + 1):
        octave += 1
    return 2 * octave + 2 + ((magnitude >> (octave - 1)) & 1)


@njit
def choose(values: Array, rows: Array, columns: Array, costs: Array, price: float) -> Array:
    """Return the codes ``[N, K]`` that :func:`reference.choose` returns."""
    top, rate = len(costs) - 1, float32(price)
    codes: Array = np.floor(np.abs(values) + float32(0.5)).astype(np.int32)
    for n in range(len(codes)):
        for k in range(codes.shape[1]):
            q, size = min(codes[n, k], LARGEST), abs(values[n, k])
            if q:
                own = costs[min(max(columns[k] + rows[n], 0), top)]
                here = (size - float32(q)) ** 2 + rate * own[_bucket(q)]
                below = (size - float32(q - 1)) ** 2 + rate * own[_bucket(q - 1)]
                if below < here:
                    q -= 1
            codes[n, k] = -q if values[n, k] < 0 else q
    return codes


@njit
def column_costs(codes: Array, rows: Array, costs: Array) -> Array:
    """Return the bits ``[K, C]`` that :func:`reference.column_costs` returns."""
    count, width = codes.shape
    classes = len(costs)
    low, high = rows.min(), rows.max()
    counts = np.zeros((high - low + 1, costs.shape[1]), np.int64)
    found = np.zeros((width, classes))
    for k in range(width):
        counts[:] = 0
        for n in range(count):
            counts[rows[n] - low, _bucket(abs(codes[n, k]))] += 1
        for row in range(high - low + 1):
            for b in range(costs.shape[1]):
                if counts[row, b]:
                    for c in range(classes):
                        found[k, c] += counts[row, b] * costs[min(max(c + row + low, 0), classes - 1), b]
    return found

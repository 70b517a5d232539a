"""Decisions of the ``dead_zone`` encoder in numpy; a decoder needs none of them.

Of two neighbouring magnitudes the encoder takes the one with the lower cost: squared error in steps plus
:data:`LAMBDA` per bit. The frequency tables are static, so each coefficient can be decided by itself, with a
threshold that depends on its class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Floats, Scales
from kvpack.codecs.chain.symbols import BUCKETS, RAW_BITS

Array = NDArray[Any]

LAMBDA = 0.1
"""Price of a bit in squared steps; between 0 and a Laplace distribution's rate-distortion slope (docs/fisher.md)."""

BIT = 1 << 24
"""Value of one bit in the integer unit of costs; integer sums do not depend on the order of summation."""

SHIFT_BITS = 1
"""Assumed cost in bits of each class by which a token is shifted."""

MAX_SHIFT = 8
THRESHOLDS = 9
"""Number of thresholds per class; larger magnitudes use the last one, moved by the difference in magnitude."""


def thresholds(tables: Array, centroids: Floats) -> Floats:
    """Return the least scaled magnitude that is coded as m, for each class and m from 0 on: ``[K, THRESHOLDS]``."""
    bits = magnitude_bits(tables)
    offsets = centroids[:, np.minimum(np.arange(THRESHOLDS), 3)]
    read = np.arange(THRESHOLDS) + offsets
    gap = np.maximum(np.diff(read, axis=1), 0.25)
    middle = (read[:, 1:] + read[:, :-1]) / 2
    out = np.zeros((len(tables), THRESHOLDS), np.float32)
    out[:, 1:] = middle + LAMBDA * np.diff(bits[:, :THRESHOLDS], axis=1) / (2 * gap)
    return out


def magnitude_bits(tables: Array) -> NDArray[np.float64]:
    """Return the bits of each bucket's first magnitude in each class, with sign and raw bits: ``[K, 32]``."""
    total = np.log2(tables.sum(1, keepdims=True))
    bits = total - np.log2(tables[:, [0, *range(1, tables.shape[1], 2)]])
    return np.asarray(bits + RAW_BITS)


def magnitude_costs(tables: Array) -> NDArray[np.int64]:
    """Return :func:`magnitude_bits` in units of 1 / :data:`BIT` bits, each below 2**32."""
    return np.rint(magnitude_bits(tables) * BIT).astype(np.int64)


def magnitudes(values: Floats, steps: Floats, scales: Scales, wanted: Floats) -> NDArray[np.int64]:
    """Return the largest magnitude whose threshold each scaled value reaches, ``[T, D]``.

    ``wanted`` ``[K, THRESHOLDS]`` are the thresholds of each class.
    """
    scaled = np.abs(values) / steps
    classes = scales.classes()
    found = np.floor(scaled + np.float32(0.5)).astype(np.int64)
    while True:
        top = np.minimum(found, THRESHOLDS - 1)
        low = (found > 0) & (scaled < wanted[classes, top] + (found - top).astype(np.float32))
        if not low.any():
            return found
        found -= low


def shifts(found: Array, scales: Scales, costs: Array) -> NDArray[np.int32]:
    """Return the shift of each token's classes, ``[T]``.

    The search starts at 0 and moves by one class in either direction as long as that saves bits.
    """
    buckets = BUCKETS[found]
    shift = np.zeros(len(found), np.int32)
    for token, mine in enumerate(buckets):
        classes = (scales.columns - scales.rows[token]) >> 3
        best = _cost(mine, classes, 0, costs)
        for way in (-1, 1):
            while -MAX_SHIFT < shift[token] + way < MAX_SHIFT and shift[token] * way >= 0:
                cost = _cost(mine, classes, int(shift[token]) + way, costs)
                if cost >= best:
                    break
                best, shift[token] = cost, shift[token] + way
    return shift


def _cost(buckets: Array, classes: Array, shift: int, costs: Array) -> int:
    shifted = np.clip(classes + shift, 0, len(costs) - 1)
    return SHIFT_BITS * BIT * abs(shift) + int(costs[shifted, buckets].sum())

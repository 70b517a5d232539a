"""What an encoder of ``dead_zone`` decides, in numpy: a decoder needs none of it.

Of two neighbouring magnitudes the one is taken that costs less, error in steps squared plus :data:`LAMBDA` for each
bit: tables are static, so every coefficient is decided by itself, by a threshold of its class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Floats, Scales
from kvpack.codecs.chain.symbols import BUCKETS, RAW_BITS

Array = NDArray[Any]

LAMBDA = 0.1
"""Steps squared a bit: between 0 and what a Laplace distribution's rate-distortion slope would be (docs/fisher.md)."""

BIT = 1 << 24
"""A bit, in the whole numbers that costs of shifts are summed in: their order does not matter, so all sums agree."""

SHIFT_BITS = 1
"""What a class of shift is taken to cost a token."""

MAX_SHIFT = 8
THRESHOLDS = 9
"""Magnitudes beyond the last have its distance to their middle."""


def thresholds(tables: Array, centroids: Floats) -> Floats:
    """Of classes ``[K]``, what a scaled magnitude must reach to be coded as m: ``[K, THRESHOLDS]``, m from 0 on."""
    bits = magnitude_bits(tables)
    offsets = centroids[:, np.minimum(np.arange(THRESHOLDS), 3)]
    read = np.arange(THRESHOLDS) + offsets
    gap = np.maximum(np.diff(read, axis=1), 0.25)
    middle = (read[:, 1:] + read[:, :-1]) / 2
    out = np.zeros((len(tables), THRESHOLDS), np.float32)
    out[:, 1:] = middle + LAMBDA * np.diff(bits[:, :THRESHOLDS], axis=1) / (2 * gap)
    return out


def magnitude_bits(tables: Array) -> NDArray[np.float64]:
    """Bits of each bucket's first magnitude, sign and raw bits included: ``[K, 32]``."""
    total = np.log2(tables.sum(1, keepdims=True))
    bits = total - np.log2(tables[:, [0, *range(1, tables.shape[1], 2)]])
    return np.asarray(bits + RAW_BITS)


def magnitude_costs(tables: Array) -> NDArray[np.int64]:
    """:func:`magnitude_bits` in :data:`BIT`, below 2**32 each."""
    return np.rint(magnitude_bits(tables) * BIT).astype(np.int64)


def magnitudes(values: Floats, steps: Floats, scales: Scales, wanted: Floats) -> NDArray[np.int64]:
    """``[T, D]``: the largest m whose threshold ``wanted`` [K, THRESHOLDS] the scaled value reaches."""
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
    """Each token's shift of classes ``[T]``: from 0 on, one more or less as long as that saves bits."""
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

"""The kernels of ``cpu.py`` in plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.symbols import BUCKETS, LARGEST, RAW_BITS

Array = NDArray[Any]


def choose(values: Array, rows: Array, columns: Array, costs: Array, price: float) -> Array:
    """Return codes ``[N, K]`` int32 for ``values`` in steps.

    Each code is the nearest integer or the next one towards zero, whichever has the lower cost. A code q costs
    ``(value - q) ** 2 + price * costs[class, bucket of q]``. Its class is ``columns[k] + rows[n]``, clipped to the
    rows of ``costs`` ``[C, 32]``, which are in bits.
    """
    classes = np.clip(columns[None, :] + rows[:, None], 0, len(costs) - 1)
    size = np.abs(values)
    near = np.minimum(np.floor(size + np.float32(0.5)), LARGEST).astype(np.int64)
    below = np.maximum(near - 1, 0)
    loss = [(size - q) ** 2 + np.float32(price) * costs[classes, BUCKETS[q]] for q in (near, below)]
    chosen = np.where(loss[1] < loss[0], below, near)
    return np.where(values < 0, -chosen, chosen).astype(np.int32)


def column_costs(codes: Array, rows: Array, costs: Array) -> Array:
    """Return the bits ``[K, C]`` that each column of ``codes`` ``[N, K]`` takes in each of the C classes."""
    buckets = BUCKETS[np.abs(codes)]
    found = np.zeros((codes.shape[1], len(costs)), np.float64)
    for column in range(len(costs)):
        classes = np.clip(column + rows, 0, len(costs) - 1)
        found[:, column] = costs[classes[:, None], buckets].astype(np.float64).sum(0)
    return found


def bucket_costs(tables: Array) -> Array:
    """Return the bits of a code by class and bucket, including raw bits, ``[C, 32]`` float32."""
    frequencies = tables[:, [0, *range(1, tables.shape[1], 2)]]
    bits = np.log2(tables.sum(1, keepdims=True) / frequencies)
    return np.asarray(bits + RAW_BITS, np.float32)

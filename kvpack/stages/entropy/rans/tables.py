"""The statistical model: a bank of frequency tables and, for every channel, the table it uses.

Channels with alike statistics share a table, found by k-means whose cost is the coded size; a bank of a few
dozen tables stays in the first-level cache, and short captures do not drown in side information. Everything
is integer arithmetic (the float64 products below are of integers under 2**53, hence exact), so that the same
plane gives the same bytes on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]

PRECISION = 12
"""Frequencies of a table sum to ``2**PRECISION``."""

REST = 63
"""The frequency code of the one symbol a table that takes what the others leave."""

SYMBOLS_A_TABLE = 12288
"""One more table pays for its side information about every so many symbols (measured on SmolLM2-135M)."""

MAX_TABLES = 64
ROUNDS = 3
TOTAL = 1 << PRECISION


def _levels() -> Ints:
    """Values of the frequency codes: 0, 1, 2, 3, then (4 + m) << e, below ``TOTAL``."""
    values = [0, 1, 2, 3, *((4 + m) << e for e in range(PRECISION - 2) for m in range(4))]
    return np.array([v for v in values if v < TOTAL])


LEVELS = _levels()
_NEAREST = np.abs(np.arange(TOTAL + 1)[:, None] - LEVELS[None, :]).argmin(1)
_COST = np.round(64 * (PRECISION - np.log2(np.maximum(np.arange(TOTAL + 1), 2.0**-8)))).astype(np.float64)


def quantize(counts: Ints) -> Ints:
    """Frequency codes ``[K, A]`` for symbol counts ``[K, A]``; a symbol that occurs gets at least one quantum."""
    rows = np.arange(len(counts))
    rest = counts.argmax(1)
    totals = np.maximum(counts.sum(1, keepdims=True), 1)
    codes: Ints = _NEAREST[(counts * (2 * TOTAL) + totals) // (2 * totals)]
    codes = np.where(counts > 0, np.maximum(codes, 1), 0)
    codes[rows, rest] = 0
    for k in np.flatnonzero(LEVELS[codes].sum(1) >= TOTAL):
        while LEVELS[codes[k]].sum() >= TOTAL:
            codes[k, codes[k].argmax()] -= 1
    codes[rows, rest] = REST
    return codes


def frequencies(codes: Ints) -> Ints:
    """Frequencies ``[K, A]``, each row summing to ``TOTAL``, for codes ``[K, A]``.

    Raises:
        ValueError: codes that are reserved, or that leave nothing for the rest.

    """
    rest = codes == REST
    if not (rest.sum(1) == 1).all() or (codes[~rest] >= len(LEVELS)).any():
        raise ValueError("frequency table: reserved codes")
    values: Ints = LEVELS[np.where(rest, 0, codes)]
    left = TOTAL - values.sum(1)
    if (left < 1).any():
        raise ValueError("frequency table: sum is too large")
    values[rest] = left
    return values


def cluster(histogram: Ints) -> tuple[Ints, Ints]:
    """Group channels by alike statistics.

    ``histogram`` is ``[C, A]``, the symbol counts of each channel. Returns the table of each channel ``[C]``
    and the counts of each table ``[K, A]``.
    """
    channels, alphabet = histogram.shape
    tables = int(np.clip(histogram.sum() // SYMBOLS_A_TABLE, 1, min(MAX_TABLES, channels)))
    counts = histogram.astype(np.float64)
    order = np.argsort(histogram @ np.arange(alphabet), kind="stable")
    assigned = np.empty(channels, np.int64)
    assigned[order] = np.arange(channels) * tables // channels
    for _ in range(ROUNDS if tables > 1 else 0):
        cost = _COST[frequencies(quantize(_sums(counts, assigned, tables)))]
        assigned = (counts @ cost.T).argmin(1)
    used, assigned = np.unique(assigned, return_inverse=True)
    return assigned, _sums(counts, assigned, len(used))


def _sums(counts: NDArray[np.float64], assigned: Ints, tables: int) -> Ints:
    members = (assigned[None, :] == np.arange(tables)[:, None]).astype(np.float64)
    return np.asarray((members @ counts).astype(np.int64))

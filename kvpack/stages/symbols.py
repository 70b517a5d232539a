"""Signed values as symbols of a small alphabet and raw bits, as in hybrid integers of JPEG XL (ISO 18181-1).

Magnitudes below 8 are buckets of their own. Beyond, an octave is two buckets, and the bits below its leading two are
stored as they are. A symbol is a bucket and a sign: 0, +1, -1, +2, -2, ...
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DIRECT = 8
LARGEST = (1 << 15) - 1
"""Largest magnitude."""

ALPHABET = 63


def _buckets() -> tuple[Array, Array]:
    """Smallest magnitude and raw bits of each bucket, ``[32]``."""
    smallest, raw = list(range(DIRECT)), [0] * DIRECT
    for octave in range(3, 15):
        for half in (0, 1):
            smallest.append((1 << octave) + (half << (octave - 1)))
            raw.append(octave - 1)
    return np.array(smallest, np.int64), np.array(raw, np.int64)


SMALLEST, RAW_BITS = _buckets()


BUCKETS = np.searchsorted(SMALLEST, np.arange(LARGEST + 1), side="right").astype(np.uint8) - 1
"""Of every magnitude its bucket."""


def zigzag(values: Array) -> Array:
    """Signed integers to codes 0, 1 (-1), 2 (+1), ...; uint16."""
    wide = values.astype(np.int32)
    return np.where(wide < 0, -2 * wide - 1, 2 * wide).astype(np.uint16)


def unzigzag(codes: Array) -> Array:
    """The inverse; int32."""
    wide = codes.astype(np.int32)
    return np.where(wide & 1, -(wide + 1) // 2, wide // 2)


def split(codes: Array) -> tuple[Array, Array, Array]:
    """Zigzag codes ``[N]`` to symbols ``[N]`` uint8, raw values and their widths (of symbols that have raw bits)."""
    magnitude = (codes >> 1) + (codes & 1)
    bucket = BUCKETS[magnitude]
    symbols = np.where(magnitude == 0, 0, 2 * bucket - 1 + (codes & 1)).astype(np.uint8)
    long = np.flatnonzero(bucket >= DIRECT)
    return symbols, magnitude[long] - SMALLEST[bucket[long]], RAW_BITS[bucket[long]]


def raw_widths(symbols: Array) -> tuple[Array, Array]:
    """Positions of the symbols that have raw bits, and how many each has."""
    widths = RAW_BITS[(symbols.astype(np.int64) + 1) >> 1]
    long = np.flatnonzero(widths)
    return long, widths[long]


def join(symbols: Array, long: Array, raw: Array) -> Array:
    """The zigzag codes again, uint16 ``[N]``."""
    bucket = (symbols.astype(np.int64) + 1) >> 1
    magnitude = SMALLEST[bucket]
    magnitude[long] += raw
    negative = (symbols > 0) & (symbols % 2 == 0)
    codes: Array = np.where(negative, 2 * magnitude - 1, 2 * magnitude).astype(np.uint16)
    return codes

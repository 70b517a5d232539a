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

LONG = 2 * DIRECT - 1
"""The first symbol that has raw bits."""


def zigzag(values: Array) -> Array:
    """Signed integers to codes 0, 1 (-1), 2 (+1), ...; uint16."""
    wide = values.astype(np.int32)
    return ((wide << 1) ^ (wide >> 31)).astype(np.uint16)


def unzigzag(codes: Array) -> Array:
    """The inverse; int32."""
    wide = codes.astype(np.int32)
    return (wide >> 1) ^ -(wide & 1)


def _tables() -> tuple[Array, Array]:
    """Of every code its symbol, ``[2 * LARGEST + 1]`` uint8, and of every symbol its first code, ``[63]`` uint16."""
    values = unzigzag(np.arange(2 * LARGEST + 1))
    buckets = 2 * BUCKETS[np.abs(values)].astype(np.int32)
    smallest = SMALLEST[(np.arange(ALPHABET) + 1) >> 1]
    return (buckets - (values > 0)).astype(np.uint8), zigzag(np.where(np.arange(ALPHABET) % 2, smallest, -smallest))


_SYMBOLS, _CODES = _tables()


def split(codes: Array) -> tuple[Array, Array, Array]:
    """Zigzag codes ``[N]`` to symbols ``[N]`` uint8, raw values and their widths (of symbols that have raw bits)."""
    symbols = _SYMBOLS[codes]
    long, widths = raw_widths(symbols)
    return symbols, (codes[long].astype(np.int64) - _CODES[symbols[long]]) >> 1, widths


def raw_widths(symbols: Array) -> tuple[Array, Array]:
    """Positions of the symbols that have raw bits, and how many each has."""
    long = np.flatnonzero(symbols >= LONG)
    return long, RAW_BITS[(symbols[long] + 1) >> 1]


def join(symbols: Array, long: Array, raw: Array) -> Array:
    """The zigzag codes again, uint16 ``[N]``."""
    codes: Array = _CODES[symbols]
    codes[long] += (2 * raw).astype(np.uint16)
    return codes

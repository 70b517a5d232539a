"""Splits signed integers into symbols of a small alphabet and raw bits, like JPEG XL's hybrid integers (ISO 18181-1).

Each magnitude below 8 is a bucket of its own. Every octave above that is two buckets; the bits below the leading two
are stored raw. A symbol is a bucket with a sign: 0, +1, -1, +2, -2, ...
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DIRECT = 8
LARGEST = (1 << 15) - 1
"""Largest magnitude that can be coded."""

ALPHABET = 63


def _buckets() -> tuple[Array, Array]:
    """Return the smallest magnitude and the number of raw bits of each bucket, both ``[32]`` int64."""
    smallest, raw = list(range(DIRECT)), [0] * DIRECT
    for octave in range(3, 15):
        for half in (0, 1):
            smallest.append((1 << octave) + (half << (octave - 1)))
            raw.append(octave - 1)
    return np.array(smallest, np.int64), np.array(raw, np.int64)


SMALLEST, RAW_BITS = _buckets()


BUCKETS = np.searchsorted(SMALLEST, np.arange(LARGEST + 1), side="right").astype(np.uint8) - 1
"""Bucket of every magnitude from 0 to ``LARGEST``."""

LONG = 2 * DIRECT - 1
"""First symbol that has raw bits."""


def zigzag(values: Array) -> Array:
    """Map signed integers 0, -1, +1, ... to codes 0, 1, 2, ...; returns uint16."""
    wide = values.astype(np.int32)
    return ((wide << 1) ^ (wide >> 31)).astype(np.uint16)


def unzigzag(codes: Array) -> Array:
    """Undo :func:`zigzag`; returns int32."""
    wide = codes.astype(np.int32)
    return (wide >> 1) ^ -(wide & 1)


def _tables() -> tuple[Array, Array]:
    """Return the lookup tables of :func:`split` and :func:`join`.

    They are the symbol of every code, ``[2 * LARGEST + 1]`` uint8, and the first code of every symbol, ``[63]`` uint16.
    """
    values = unzigzag(np.arange(2 * LARGEST + 1))
    buckets = 2 * BUCKETS[np.abs(values)].astype(np.int32)
    smallest = SMALLEST[(np.arange(ALPHABET) + 1) >> 1]
    return (buckets - (values > 0)).astype(np.uint8), zigzag(np.where(np.arange(ALPHABET) % 2, smallest, -smallest))


_SYMBOLS, _CODES = _tables()


def split(codes: Array) -> tuple[Array, Array, Array]:
    """Split zigzag codes ``[N]`` into symbols ``[N]`` uint8, raw values, and the widths of the raw values in bits.

    Raw values and widths have one entry for each symbol that has raw bits.
    """
    symbols = _SYMBOLS[codes]
    long, widths = raw_widths(symbols)
    return symbols, (codes[long].astype(np.int64) - _CODES[symbols[long]]) >> 1, widths


def raw_widths(symbols: Array) -> tuple[Array, Array]:
    """Return the positions of the symbols that have raw bits, and the number of raw bits of each."""
    long = np.flatnonzero(symbols >= LONG)
    return long, RAW_BITS[(symbols[long] + 1) >> 1]


def join(symbols: Array, long: Array, raw: Array) -> Array:
    """Undo :func:`split`: return zigzag codes ``[N]`` uint16; ``long`` are the positions of symbols with raw bits."""
    codes: Array = _CODES[symbols]
    codes[long] += (2 * raw).astype(np.uint16)
    return codes

"""The residual of a part: by how many representable numbers each element lies above what the model computes.

Floats of one dtype are numbered in the order of their values, so that neighbouring numbers differ by 1. The residual is
the difference of these numbers, modulo the number of bit patterns. Small differences are frequent, so they are coded
by symbols that stand for buckets, like the integers of ``scaled_rans``. A second stream has the lower bits of large
ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import PlaneSpec
from kvpack.codecs.chain.entropy.bitpack import pack, packed_size, unpack
from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.errors import CorruptError
from kvpack.numerics.floats import Bits

SYMBOLS, RAW = "residual", "residual/raw"
"""The names of the two streams."""

DIRECT = 32
"""Codes below this are symbols of their own. Every octave above is two symbols."""

WIDTH = 7
"""The bits of a symbol."""


def residual(bits: Bits, expected: Bits) -> Bits:
    """Return the residual of ``bits`` against ``expected``, both ``[H, T, D]`` of one unsigned dtype, as zigzag codes.

    Codes 0, 1, 2, 3, ... stand for differences 0, -1, 1, -2, ...
    """
    difference = _ordered(bits) - _ordered(expected)
    sign = difference >> np.array(8 * bits.itemsize - 1, bits.dtype)
    codes: Bits = (difference << np.array(1, bits.dtype)) ^ (np.array(0, bits.dtype) - sign)
    return codes


def restore(codes: Bits, expected: Bits) -> Bits:
    """Undo :func:`residual`: return the bit patterns."""
    one = np.array(1, codes.dtype)
    difference = (codes >> one) ^ (np.array(0, codes.dtype) - (codes & one))
    return _disordered(_ordered(expected) + difference)


def _ordered(bits: Bits) -> Bits:
    """Return the numbers of floats in the order of their values, from the most negative on."""
    top = np.array(1 << (8 * bits.itemsize - 1), bits.dtype)
    numbers: Bits = np.where(bits & top, ~bits, bits | top)
    return numbers


def _disordered(numbers: Bits) -> Bits:
    top = np.array(1 << (8 * numbers.itemsize - 1), numbers.dtype)
    bits: Bits = np.where(numbers & top, numbers ^ top, ~numbers)
    return bits


def encode(codes: Bits) -> list[tuple[str, bytes]]:
    """Return the streams of zigzag codes ``[H, T, D]``: none if all are zero, and the second only if some are long."""
    if not codes.any():
        return []
    smallest, raw_bits = buckets(8 * codes.itemsize)
    symbols = (np.searchsorted(smallest, codes.reshape(-1), side="right") - 1).astype(np.uint8)
    streams = [(SYMBOLS, Rans().encode(symbols.reshape(codes.shape), _plane(codes.shape)))]
    raw = []
    for symbol in range(DIRECT, len(smallest)):
        values = codes.reshape(-1)[symbols == symbol] - smallest[symbol].astype(codes.dtype)
        raw.append(pack(values, int(raw_bits[symbol])))
    return [*streams, (RAW, b"".join(raw))] if any(raw) else streams


def decode(streams: Mapping[str, memoryview], shape: tuple[int, int, int], itemsize: int) -> Bits:
    """Return the zigzag codes ``[H, T, D]`` that streams hold, as unsigned integers of ``itemsize`` bytes.

    Raises:
        CorruptError: The streams do not decode to such codes.

    """
    dtype = np.dtype(f"<u{itemsize}")
    if not streams:
        return np.zeros(shape, dtype)
    if SYMBOLS not in streams or not set(streams) <= {SYMBOLS, RAW}:
        raise CorruptError("corrupt: the part does not have the streams of a residual")
    symbols = Rans().decode(streams[SYMBOLS], _plane(shape)).reshape(-1)
    smallest, raw_bits = buckets(8 * itemsize)
    if symbols.size and int(symbols.max()) >= len(smallest):
        raise CorruptError("corrupt: a residual has a symbol that does not exist")
    codes: Bits = smallest.astype(dtype)[symbols]
    raw, at = streams.get(RAW, memoryview(b"")), 0
    for symbol in range(DIRECT, len(smallest)):
        found = np.flatnonzero(symbols == symbol)
        size = packed_size(len(found), int(raw_bits[symbol]))
        codes[found] += unpack(raw[at : at + size], len(found), int(raw_bits[symbol])).astype(dtype)
        at += size
    if at != len(raw):
        raise CorruptError("corrupt: a residual's stream is longer than its symbols say")
    return codes.reshape(shape)


def buckets(width: int) -> tuple[NDArray[np.uint64], NDArray[Any]]:
    """Return the smallest code and the number of raw bits of every symbol, for codes of ``width`` bits."""
    smallest, raw_bits = list(range(DIRECT)), [0] * DIRECT
    for octave in range(5, width):
        for half in (0, 1):
            smallest.append((1 << octave) + (half << (octave - 1)))
            raw_bits.append(octave - 1)
    return np.array(smallest, np.uint64), np.array(raw_bits)


def _plane(shape: tuple[int, int, int]) -> PlaneSpec:
    return PlaneSpec(SYMBOLS, shape, WIDTH)

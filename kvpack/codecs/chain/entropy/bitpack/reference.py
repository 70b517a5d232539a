"""Bit packing in plain numpy, as ``docs/format.md`` describes it."""

from __future__ import annotations

import numpy as np

from kvpack.codecs.chain.base import Codes


def pack(codes: Codes, width: int) -> bytes:
    """Pack ``codes`` ``[N]`` into bytes: code i takes the bits from ``i * width`` on, bit 0 of a byte first."""
    bits = (codes.astype(np.uint64)[:, None] >> np.arange(width, dtype=np.uint64)) & np.uint64(1)
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def unpack(data: memoryview, count: int, width: int) -> Codes:
    """Undo :func:`pack`; returns ``[count]`` uint64."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * width]
    weights = np.uint64(1) << np.arange(width, dtype=np.uint64)
    return np.asarray(bits.reshape(count, width).astype(np.uint64) @ weights)

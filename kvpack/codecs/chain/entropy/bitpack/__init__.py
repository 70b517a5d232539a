"""``bitpack``: stores codes of ``width`` bits one after another, without an entropy model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvpack.codecs.chain.base import Codes, EntropyCoder, PlaneSpec
from kvpack.codecs.chain.entropy.bitpack import cpu
from kvpack.errors import CorruptError


def packed_size(count: int, width: int) -> int:
    """Return the number of bytes that ``count`` codes of ``width`` bits take."""
    return (count * width + 7) // 8


def pack(codes: Codes, width: int) -> bytes:
    """Pack codes in row-major order, least significant bit first; the last byte's spare bits are zero."""
    return cpu.pack(codes.reshape(-1), width)


def unpack(data: memoryview, count: int, width: int) -> Codes:
    """Unpack ``count`` codes of ``width`` bits; returns ``[count]``.

    Raises:
        CorruptError: The length is wrong, or spare bits of the last byte are not zero.

    """
    if len(data) != packed_size(count, width):
        raise CorruptError(f"packed codes take {packed_size(count, width)} bytes, found {len(data)}")
    spare = -(count * width) % 8
    if spare and data[-1] >> (8 - spare):
        raise CorruptError("packed codes: spare bits are not zero")
    return cpu.unpack(data, count, width, PlaneSpec("", (1, count, 1), width).code_dtype)


@dataclass(frozen=True)
class BitPack(EntropyCoder):
    """Packs each code in ``width`` bits."""

    name: ClassVar[str] = "bitpack"
    version: ClassVar[int] = 1

    def encode(self, codes: Codes, spec: PlaneSpec) -> bytes:
        """Pack the codes; see :func:`pack`."""
        return pack(codes, spec.width)

    def decode(self, data: memoryview, spec: PlaneSpec) -> Codes:
        """Unpack the codes; see :func:`unpack`."""
        return np.reshape(unpack(data, spec.size, spec.width), spec.shape)

"""``deflate``: codes a plane as bit-packed codes in one zlib stream (RFC 1950)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

from kvpack.codecs.chain.base import Codes, EntropyCoder, PlaneSpec
from kvpack.codecs.chain.entropy.bitpack import pack, packed_size, unpack
from kvpack.errors import CorruptError


@dataclass(frozen=True)
class Deflate(EntropyCoder):
    """Packs each code in ``width`` bits and applies DEFLATE at ``level`` (1 to 9), as KVTC does (arXiv 2511.01815)."""

    name: ClassVar[str] = "deflate"
    version: ClassVar[int] = 1

    level: int

    def __post_init__(self) -> None:
        """Check the level."""
        if not 1 <= self.level <= 9:
            raise ValueError(f"deflate's level is 1 to 9, not {self.level}")

    def encode(self, codes: Codes, spec: PlaneSpec) -> bytes:
        """Pack the codes and compress them."""
        return zlib.compress(pack(codes, spec.width), self.level)

    def decode(self, data: memoryview, spec: PlaneSpec) -> Codes:
        """Decompress a stream whose content size must be exactly the plane's packed size.

        Raises:
            CorruptError: It is not a zlib stream of that content size.

        """
        size = packed_size(spec.size, spec.width)
        engine = zlib.decompressobj()
        try:
            raw = engine.decompress(data, size + 1)
        except zlib.error as error:
            raise CorruptError(f"deflate stream does not decode ({error})") from None
        if len(raw) != size or not engine.eof or engine.unused_data:
            raise CorruptError(f"deflate stream does not hold the {size} bytes of its plane")
        return unpack(memoryview(raw), spec.size, spec.width).reshape(spec.shape)

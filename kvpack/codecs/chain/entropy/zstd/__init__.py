"""``zstd``: codes a plane as little-endian integers in one Zstandard frame (RFC 8878)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import zstandard

from kvpack.codecs.chain.base import Codes, EntropyCoder, PlaneSpec
from kvpack.errors import CorruptError


@dataclass(frozen=True)
class Zstd(EntropyCoder):
    """Writes one Zstandard frame per plane, with its content size, at ``level`` (1 to 22)."""

    name: ClassVar[str] = "zstd"
    version: ClassVar[int] = 1

    level: int = 3

    def __post_init__(self) -> None:
        """Check the level."""
        if not 1 <= self.level <= 22:
            raise ValueError(f"zstd's level is 1 to 22, not {self.level}")

    def encode(self, codes: Codes, spec: PlaneSpec) -> bytes:
        """Compress the codes as integers of the plane's smallest unsigned dtype."""
        data = np.ascontiguousarray(codes, spec.code_dtype)
        return zstandard.ZstdCompressor(level=self.level).compress(data.tobytes())

    def decode(self, data: memoryview, spec: PlaneSpec) -> Codes:
        """Decompress a frame whose content size must be exactly the plane's size.

        Raises:
            CorruptError: It is not a frame of that content size, or a code exceeds the plane's width.

        """
        size = spec.size * spec.code_dtype.itemsize
        try:
            if zstandard.frame_content_size(data) != size:
                raise CorruptError(f"zstd frame does not hold the {size} bytes of its plane")
            raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CorruptError(f"zstd frame does not decode ({error})") from None
        codes: Codes = np.frombuffer(raw, spec.code_dtype).reshape(spec.shape)
        if spec.width % 8 and codes.size and int(codes.max()) >> spec.width:
            raise CorruptError("zstd frame holds codes beyond its plane's width")
        return codes

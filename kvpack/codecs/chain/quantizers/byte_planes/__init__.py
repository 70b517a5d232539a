"""The quantizer ``byte_planes`` splits elements of any dtype into their bytes, one plane for each byte position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Codes, Part, PlaneSpec, Quantizer
from kvpack.codecs.context import NO_HINTS, StackHints
from kvpack.formats.safetensors import item_bytes


@dataclass(frozen=True)
class BytePlanes(Quantizer):
    """It is lossless for every dtype. Plane ``byte.0`` holds the least significant bytes.

    Elements that are smaller than a byte come as the bytes they are packed in, and give one plane.
    """

    name: ClassVar[str] = "byte_planes"
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = True

    def takes(self, dtype: str) -> bool:
        """Return True: bytes are bytes."""
        return True

    def planes(self, part: Part) -> list[PlaneSpec]:
        """Name one plane of 8-bit codes for each byte of an element."""
        return [PlaneSpec(f"byte.{i}", part.shape, 8) for i in range(item_bytes(part.dtype))]

    def encode(self, data: NDArray[Any], part: Part, hints: StackHints = NO_HINTS) -> list[Codes]:
        """Split bit patterns ``[H, T, D]`` into their bytes."""
        octets = np.ascontiguousarray(data).view(np.uint8).reshape(*part.shape, item_bytes(part.dtype))
        return [np.ascontiguousarray(octets[..., i]) for i in range(octets.shape[-1])]

    def decode(self, codes: list[Codes], part: Part) -> NDArray[np.unsignedinteger[Any]]:
        """Put the bytes together to the bit patterns again."""
        octets = np.stack(codes, axis=-1).astype(np.uint8)
        return octets.view(np.dtype(f"<u{len(codes)}"))[..., 0]

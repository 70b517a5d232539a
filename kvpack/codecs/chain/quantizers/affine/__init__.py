"""``affine``: quantizes to asymmetric integers with one scale and one zero per group, as KIVI does.

See arXiv 2402.02750, section 3. With ``axis="token"`` a group is a run of tokens of one channel, as for KIVI's keys.
With ``axis="channel"`` a group is a run of channels of one token, as for KIVI's values. Scale and zero are stored in
fp16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Codes, Floats, Part, PlaneSpec, Quantizer, UnrepresentableError
from kvpack.codecs.chain.quantizers.affine.reference import dequantize, quantize
from kvpack.codecs.chain.quantizers.float_split import join, split, split_planes
from kvpack.codecs.context import NO_HINTS, StackHints


@dataclass(frozen=True)
class Affine(Quantizer):
    """Affine quantizer with ``bits`` bits (1 to 8) per code and groups of ``group`` elements along ``axis``."""

    name: ClassVar[str] = "affine"
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False

    bits: int
    axis: str
    group: int

    def __post_init__(self) -> None:
        """Check the configuration."""
        if not 1 <= self.bits <= 8 or self.axis not in ("token", "channel"):
            raise ValueError("bits is 1 to 8 and axis is token or channel")
        if not 1 <= self.group <= 65536:
            raise ValueError("group is 1 to 65536")

    def planes(self, part: Part) -> list[PlaneSpec]:
        """Return the plane ``codes``, then scale and zero as planes of sign and exponent and of mantissa."""
        heads, tokens, dims = part.shape
        groups = (
            (heads, -(-tokens // self.group), dims) if self.axis == "token" else (heads, tokens, -(-dims // self.group))
        )
        return [
            PlaneSpec("codes", part.shape, self.bits),
            *split_planes("F16", groups, "scale/"),
            *split_planes("F16", groups, "zero/"),
        ]

    def encode(self, data: NDArray[Any], part: Part, hints: StackHints = NO_HINTS) -> list[Codes]:
        """Quantize float32 values ``[H, T, D]`` to planes.

        Raises:
            UnrepresentableError: A scale or zero is beyond the range of fp16.

        """
        codes, scale, zero = quantize(data, self.bits, 1 if self.axis == "token" else 2, self.group)
        if not (np.isfinite(scale).all() and np.isfinite(zero).all()):
            raise UnrepresentableError("values beyond fp16 scale and zero")
        return [codes, *split(scale.view(np.uint16), "F16"), *split(zero.view(np.uint16), "F16")]

    def decode(self, codes: list[Codes], part: Part) -> Floats:
        """Return the values ``code * scale + zero``, float32 ``[H, T, D]``."""
        scale = join(codes[1:3], "F16").view(np.float16)
        zero = join(codes[3:5], "F16").view(np.float16)
        return dequantize(codes[0], scale, zero, 1 if self.axis == "token" else 2, self.group)

"""``affine``: asymmetric integers with a scale and a zero a group, as KIVI (arXiv 2402.02750, section 3).

A group is a run of tokens of one channel (``axis="token"`` groups along tokens: KIVI's keys) or a run of
dimensions of one token (``axis="channel"`` groups along channels: KIVI's values). Scale and zero are stored
in fp16; the last tokens stay whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpack.floats import from_float32, to_float32
from kvpack.stages.base import Codes, Floats, Part, PlaneSpec, Quantizer, UnrepresentableError
from kvpack.stages.quantizers.affine.reference import dequantize, quantize
from kvpack.stages.quantizers.float_split import join, split, split_planes


@dataclass(frozen=True)
class Affine(Quantizer):
    """``bits`` (1 to 8) a code, ``group`` elements along ``axis``, the last ``residual`` tokens exact.

    The residual is at least ``residual`` tokens: what is quantised is a whole number of groups of tokens, as
    published, so that a group of keys never waits for tokens to come.
    """

    name: ClassVar[str] = "affine"
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False

    bits: int
    axis: str
    group: int
    residual: int

    def __post_init__(self) -> None:
        """Check the configuration."""
        if not 1 <= self.bits <= 8 or self.axis not in ("token", "channel"):
            raise ValueError("bits is 1 to 8 and axis is token or channel")
        if not 1 <= self.group <= 65536 or not 0 <= self.residual <= 1 << 31:
            raise ValueError("group is 1 to 65536 and residual not negative")

    def _tokens(self, part: Part) -> int:
        """How many of the part's tokens are quantised."""
        quantised = max(0, part.total - self.residual) // self.group * self.group
        return min(max(quantised - part.first, 0), part.shape[1])

    def planes(self, part: Part) -> list[PlaneSpec]:
        """``codes``, then scale, zero and the residual tokens as sign-exponent and mantissa planes."""
        heads, tokens, dims = part.shape
        quantised = self._tokens(part)
        groups = (
            (heads, -(-quantised // self.group), dims)
            if self.axis == "token"
            else (heads, quantised, -(-dims // self.group))
        )
        return [
            PlaneSpec("codes", (heads, quantised, dims), self.bits),
            *split_planes("F16", groups, "scale/"),
            *split_planes("F16", groups, "zero/"),
            *split_planes(part.dtype, (heads, tokens - quantised, dims), "residual/"),
        ]

    def encode(self, data: NDArray[Any], part: Part) -> list[Codes]:
        """Float32 values ``[H, T, D]`` to planes.

        Raises:
            UnrepresentableError: NaN, Inf, or a scale or zero beyond fp16.

        """
        tokens = self._tokens(part)
        whole = np.ascontiguousarray(data[:, tokens:])
        codes, scale, zero = quantize(data[:, :tokens], self.bits, 1 if self.axis == "token" else 2, self.group)
        if not (np.isfinite(data).all() and np.isfinite(scale).all() and np.isfinite(zero).all()):
            raise UnrepresentableError("values beyond fp16 scale and zero")
        return [
            codes,
            *split(scale.view(np.uint16), "F16"),
            *split(zero.view(np.uint16), "F16"),
            *split(from_float32(whole, part.dtype), part.dtype),
        ]

    def decode(self, codes: list[Codes], part: Part) -> Floats:
        """Values ``code * scale + zero``, float32 ``[H, T, D]``."""
        scale = join(codes[1:3], "F16").view(np.float16)
        zero = join(codes[3:5], "F16").view(np.float16)
        values = dequantize(codes[0], scale, zero, 1 if self.axis == "token" else 2, self.group)
        return np.concatenate([values, to_float32(join(codes[5:7], part.dtype), part.dtype)], axis=1)

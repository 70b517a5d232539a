"""``float_split``: floats to sign-and-exponent symbols and mantissa bits; exact for every bit pattern.

Sign and exponent are as skewed as the channel's distribution and go through an entropy coder; the mantissa's
bits are close to uniform and are stored as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Codes, Part, PlaneSpec, Quantizer
from kvpack.codecs.context import NO_HINTS, StackHints
from kvpack.numerics.floats import FLOAT_BITS, UINT


def split_planes(dtype: str, shape: tuple[int, int, int], prefix: str = "") -> list[PlaneSpec]:
    """The two planes of floats ``[H, T, D]`` of ``dtype`` (BF16, F16, F32)."""
    exponent, mantissa = FLOAT_BITS[dtype]
    return [
        PlaneSpec(f"{prefix}sign_exponent", shape, 1 + exponent),
        PlaneSpec(f"{prefix}mantissa", shape, mantissa, modelled=False),
    ]


def split(bits: Codes, dtype: str) -> list[Codes]:
    """Bit patterns to [sign and exponent, mantissa]."""
    mantissa = FLOAT_BITS[dtype][1]
    low = bits & bits.dtype.type((1 << mantissa) - 1)
    return [bits >> bits.dtype.type(mantissa), low]


def join(codes: list[Codes], dtype: str) -> Codes:
    """The inverse of :func:`split`."""
    unsigned = UINT[dtype]
    high, low = codes
    bits: Codes = high.astype(unsigned, copy=not high.flags.writeable)  # decoded planes are ours to reuse
    bits <<= unsigned(FLOAT_BITS[dtype][1])
    bits |= low
    return bits


@dataclass(frozen=True)
class FloatSplit(Quantizer):
    """Lossless for BF16, F16 and F32: NaN payloads, infinities and signed zeros included."""

    name: ClassVar[str] = "float_split"
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = True

    def planes(self, part: Part) -> list[PlaneSpec]:
        """``sign_exponent`` (1 + exponent bits) and ``mantissa``."""
        return split_planes(part.dtype, part.shape)

    def encode(self, data: NDArray[Any], part: Part, hints: StackHints = NO_HINTS) -> list[Codes]:
        """Bit patterns ``[H, T, D]`` to the two planes."""
        return split(data, part.dtype)

    def decode(self, codes: list[Codes], part: Part) -> NDArray[np.unsignedinteger[Any]]:
        """The bit patterns again."""
        return join(codes, part.dtype)

"""``float_split``: splits floats into sign-and-exponent symbols and mantissa bits, exactly for every bit pattern.

The distribution of sign and exponent is as skewed as that of the channel, so an entropy coder codes them. The
mantissa's bits are close to uniform and are stored raw.
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
    """Return the two planes of floats of this ``shape`` ``(H, T, D)`` and ``dtype`` (BF16, F16 or F32)."""
    exponent, mantissa = FLOAT_BITS[dtype]
    return [
        PlaneSpec(f"{prefix}sign_exponent", shape, 1 + exponent),
        PlaneSpec(f"{prefix}mantissa", shape, mantissa, modelled=False),
    ]


def split(bits: Codes, dtype: str) -> list[Codes]:
    """Split bit patterns into [sign and exponent, mantissa]."""
    mantissa = FLOAT_BITS[dtype][1]
    low = bits & bits.dtype.type((1 << mantissa) - 1)
    return [bits >> bits.dtype.type(mantissa), low]


def join(codes: list[Codes], dtype: str) -> Codes:
    """Undo :func:`split`; may overwrite the first of ``codes``."""
    unsigned = UINT[dtype]
    high, low = codes
    if high.size and not any(high.strides) and not any(low.strides):  # each repeats one code, and takes no memory
        one = (unsigned(high.flat[0]) << unsigned(FLOAT_BITS[dtype][1])) | unsigned(low.flat[0])
        return np.broadcast_to(one, high.shape)
    bits: Codes = high.astype(unsigned, copy=not high.flags.writeable)  # Decoded planes may be overwritten.
    bits <<= unsigned(FLOAT_BITS[dtype][1])
    bits |= low
    return bits


@dataclass(frozen=True)
class FloatSplit(Quantizer):
    """Lossless quantizer of BF16, F16 and F32, including NaN payloads, infinities and signed zeros."""

    name: ClassVar[str] = "float_split"
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = True

    def planes(self, part: Part) -> list[PlaneSpec]:
        """Return the planes ``sign_exponent`` (1 + exponent bits) and ``mantissa``."""
        return split_planes(part.dtype, part.shape)

    def encode(self, data: NDArray[Any], part: Part, hints: StackHints = NO_HINTS) -> list[Codes]:
        """Split bit patterns ``[H, T, D]`` into the two planes."""
        return split(data, part.dtype)

    def decode(self, codes: list[Codes], part: Part) -> NDArray[np.unsignedinteger[Any]]:
        """Return the bit patterns, ``[H, T, D]``."""
        return join(codes, part.dtype)

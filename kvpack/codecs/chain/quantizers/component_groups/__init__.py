"""``component_groups``: quantizes groups of transform coefficients, each group with its own number type.

This is KVTC's quantizer (arXiv 2511.01815, section 3). Neighbouring components form groups; each group is dropped or
stored as int2, int4 or fp8 (E4M3). Dynamic programming on calibration data chooses groups and types once. Every group
and token has a shift of 16 bits and a scale of 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Codes, Floats, Part, PlaneSpec, Quantizer, UnrepresentableError
from kvpack.codecs.context import NO_HINTS, StackHints
from kvpack.codecs.protocol import Need
from kvpack.errors import FormatError, MismatchError

Halves = NDArray[np.float16]
TYPES = {2: "int2", 4: "int4", 8: "fp8"}
"""Name of a group's type by its bits per code; a group of 0 bits is dropped."""


def _e4m3() -> Floats:
    """Return the finite magnitudes of E4M3 (OCP FP8), those of codes 0 to 126, ascending."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(exponent > 0, normal, mantissa / 8 * 2.0**-6).astype(np.float32)


E4M3 = _e4m3()
_MIDDLES = (E4M3[1:] + E4M3[:-1]) / 2


def quantize(block: Floats, bits: int) -> tuple[Codes, Halves, Halves]:
    """Quantize a group ``[T, S]`` to codes ``[T, S]``, shifts ``[T]`` and scales ``[T]``.

    For integers, shift = min and scale = (max - min) / (2**bits - 1). For fp8, the shift is the middle of the range,
    and the scale maps the ends of the range to E4M3's largest magnitude.
    """
    low, high = block.min(axis=1), block.max(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        if bits == 8:
            shift = ((low + high) / 2).astype(np.float16)
            scale = ((high - low) / (2 * E4M3[-1])).astype(np.float16)
        else:
            shift = low.astype(np.float16)
            scale = ((high - low) / np.float32(2**bits - 1)).astype(np.float16)
        steps = np.where(scale > 0, scale, np.float16(np.inf)).astype(np.float32)[:, None]
        x = (block - shift.astype(np.float32)[:, None]) / steps
    if bits == 8:
        magnitude = np.searchsorted(_MIDDLES, np.nan_to_num(np.abs(x)))
        return (magnitude | np.where(x < 0, 128, 0)).astype(np.uint8), shift, scale
    return np.clip(np.rint(np.nan_to_num(x)), 0, 2**bits - 1).astype(np.uint8), shift, scale


def dequantize(codes: Codes, shift: Halves, scale: Halves, bits: int) -> Floats:
    """Undo :func:`quantize`; returns float32 ``[T, S]``."""
    x = codes.astype(np.float32)
    if bits == 8:
        magnitude = E4M3[np.minimum(codes & 127, 126)]
        x = np.where(codes & 128, -magnitude, magnitude)
    with np.errstate(over="ignore", invalid="ignore"):
        return x * scale.astype(np.float32)[:, None] + shift.astype(np.float32)[:, None]


@dataclass(frozen=True)
class ComponentGroups(Quantizer):
    """Quantizer of groups as the profile's ``{section}.plan.{plan}`` ``[G, 2]`` lists them.

    Each row of the plan is the size and the bits (0, 2, 4 or 8) of a group, in the order of components.
    """

    name: ClassVar[str] = "component_groups"
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROFILE})

    section: str
    plan: str

    def _groups(self, part: Part) -> list[tuple[int, int]]:
        plan = part.integers(f"{self.section}.plan.{self.plan}", None, 2, least=0, most=1 << 24)
        groups = [(int(size), int(bits)) for size, bits in plan]
        sound = all(size > 0 and bits in (0, *TYPES) for size, bits in groups)
        if not sound or sum(size for size, _ in groups) > part.shape[2]:
            raise MismatchError("the profile's plan is not for its own basis")
        return groups

    def require(self, part: Part) -> None:
        """Check that the array has one row, as the transforms before make it."""
        if part.shape[0] != 1:
            raise FormatError(f"stage {self.name!r} takes one row, not {part.shape[0]}: the codec's stages do not fit")

    def planes(self, part: Part) -> list[PlaneSpec]:
        """Return one plane for each type, then the planes ``shift`` and ``scale``."""
        rows, tokens, _ = part.shape
        groups = self._groups(part)
        stored = sum(bits > 0 for _, bits in groups)
        return [
            *(
                PlaneSpec(name, (rows, tokens, sum(size for size, b in groups if b == bits)), bits)
                for bits, name in TYPES.items()
            ),
            *(PlaneSpec(name, (rows, tokens, stored), 16, modelled=False) for name in ("shift", "scale")),
        ]

    def encode(self, data: NDArray[Any], part: Part, hints: StackHints = NO_HINTS) -> list[Codes]:
        """Quantize float32 coefficients ``[1, T, R]`` to planes.

        Raises:
            UnrepresentableError: Coefficients are beyond the range of fp16.

        """
        codes = [np.zeros(plane.shape, plane.code_dtype) for plane in self.planes(part)]
        for at, size, bits, number, start, plane in self._walk(part):
            block = data[0, :, at : at + size]
            codes[plane][0, :, start : start + size], shift, scale = quantize(block, bits)
            if not (np.isfinite(shift).all() and np.isfinite(scale).all()):
                raise UnrepresentableError("coefficients beyond fp16")
            codes[3][0, :, number], codes[4][0, :, number] = shift.view(np.uint16), scale.view(np.uint16)
        return codes

    def decode(self, codes: list[Codes], part: Part) -> Floats:
        """Return the coefficients, float32 ``[1, T, R]``; dropped ones are zero."""
        values = np.zeros(part.shape, np.float32)
        shifts, scales = (np.ascontiguousarray(c, np.uint16).view(np.float16) for c in codes[3:5])
        for at, size, bits, number, start, plane in self._walk(part):
            block = codes[plane][0, :, start : start + size]
            values[0, :, at : at + size] = dequantize(block, shifts[0, :, number], scales[0, :, number], bits)
        return values

    def _walk(self, part: Part) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Yield for each stored group: first component, size, bits, group index, offset in its plane, plane index."""
        at = number = 0
        filled = dict.fromkeys(TYPES, 0)
        for size, bits in self._groups(part):
            if bits:
                yield at, size, bits, number, filled[bits], list(TYPES).index(bits)
                filled[bits] += size
                number += 1
            at += size

"""``lloyd_max``: stores one norm per vector and Lloyd-Max codes of its coordinates (TurboQuant, arXiv 2504.19874).

A random rotation must come first. The coordinates of a rotated unit vector of D dimensions are close to N(0, 1/D)
for any vector (section 3.1 of the paper), so that one codebook serves all vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Codes, Floats, Part, PlaneSpec, Quantizer, UnrepresentableError
from kvpack.codecs.chain.quantizers.float_split import join, split, split_planes
from kvpack.codecs.chain.quantizers.lloyd_max import reference
from kvpack.codecs.context import NO_HINTS, StackHints


@dataclass(frozen=True)
class LloydMax(Quantizer):
    """Lloyd-Max quantizer with ``bits`` bits (1 to 4) per coordinate.

    ``prod`` selects the paper's inner-product variant (section 3.2). It has ``bits - 1`` bits of Lloyd-Max, then one
    bit for the sign of a Gaussian projection of the residual (a QJL sketch, seeded by ``seed``), and the residual's
    norm.
    """

    name: ClassVar[str] = "lloyd_max"
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False

    bits: int
    prod: bool
    seed: int

    def __post_init__(self) -> None:
        """Check the configuration."""
        if not 1 <= self.bits <= 4 or not 0 <= self.seed < 1 << 63:
            raise ValueError("bits is 1 to 4 and seed not negative")

    @property
    def _mse_bits(self) -> int:
        return self.bits - self.prod

    def planes(self, part: Part) -> list[PlaneSpec]:
        """Return the planes ``codes`` and norms; with ``prod`` also ``signs`` and the residuals' norms."""
        heads, tokens, _ = part.shape
        norms = (heads, tokens, 1)
        planes = [PlaneSpec("codes", part.shape, self._mse_bits), *split_planes("F16", norms, "norm/")]
        if self.prod:
            planes += [PlaneSpec("signs", part.shape, 1), *split_planes("F16", norms, "residual_norm/")]
        return planes

    def encode(self, data: NDArray[Any], part: Part, hints: StackHints = NO_HINTS) -> list[Codes]:
        """Quantize float32 values ``[H, T, D]`` to planes.

        Raises:
            UnrepresentableError: There are NaN or Inf, or fp16 cannot represent the norm of a vector.

        """
        with np.errstate(over="ignore", invalid="ignore"):
            norm = np.sqrt(np.square(data).sum(-1, keepdims=True)).astype(np.float16)
        nonzero = data.any(axis=-1, keepdims=True)
        if not np.isfinite(norm).all() or (nonzero & (norm == 0)).any():
            raise UnrepresentableError("vector norms beyond fp16")
        unit = np.asarray(data / np.where(norm > 0, norm, np.float16(1)).astype(np.float32), np.float32)
        codes = reference.quantize(unit, self._mse_bits)
        planes = [codes, *split(norm.view(np.uint16), "F16")]
        if self.prod:
            residual = unit - reference.dequantize(codes, self._mse_bits, part.shape[2])
            signs, length = reference.sketch(residual, self.seed)
            planes += [signs, *split(length.view(np.uint16), "F16")]
        return planes

    def decode(self, codes: list[Codes], part: Part) -> Floats:
        """Return the values, float32 ``[H, T, D]``."""
        unit = reference.dequantize(codes[0], self._mse_bits, part.shape[2])
        if self.prod:
            length = join(codes[4:6], "F16").view(np.float16)
            unit = unit + reference.unsketch(codes[3], length, self.seed)
        with np.errstate(over="ignore", invalid="ignore"):
            return unit * join(codes[1:3], "F16").view(np.float16).astype(np.float32)

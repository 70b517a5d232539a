"""``dead_zone``: uniform quantizer with a dead zone around zero, and a level and a shift for each token.

The step of token t is ``2 ** (log_step / 32 + level_t / 4)``. All coefficients of a token have the same step, because
they are coordinates of a whitened space (reverse water-filling; Cover & Thomas, 10.3.3). Tokens that attention reads
more have a finer step. If the loss is the sum of m_t times the squared error of token t, the best step is proportional
to m_t ** -1/2. The exponent used here is smaller, because the attention mass of the last queries only estimates what
later queries read.

The coefficients of a token scatter more or less than those of others; its shift is the difference in classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Codes, Floats, Part, PlaneSpec, Quantizer, Scales, UnrepresentableError
from kvpack.codecs.chain.quantizers.dead_zone import cpu
from kvpack.codecs.chain.quantizers.dead_zone.reference import MAX_SHIFT, magnitude_costs, thresholds
from kvpack.codecs.chain.symbols import ALPHABET, BUCKETS, LARGEST
from kvpack.codecs.context import NO_HINTS, StackHints
from kvpack.codecs.protocol import Hint, Need, Profile
from kvpack.errors import FormatError, MismatchError

FARTHEST = 1 << 20
"""The largest magnitude of a column's scale, in 32nds of an octave. Sums of scales then stay within 32 bits."""

MIDDLE = 16
"""Code of level 0; levels range from -16 to 15."""

MASS_EXPONENT, AGE_EXPONENT = 0.6, 0.6
"""Exponents in a token's weight of its attention mass, and of 1 / its distance from the end.

They come from a regression on gradients (docs/fisher.md).
"""


@dataclass(frozen=True)
class DeadZone(Quantizer):
    """Dead-zone quantizer whose step is ``log_step`` 32nds of an octave at level 0.

    ``importance`` is the exponent of a token's weight in hundredths. The stage uses the profile's
    ``{section}.columns`` ``[R]``, ``{section}.tables`` ``[K, 63]`` and ``{section}.centroids`` ``[K, 4]``; centroids
    are the mean positions in their bins of coefficients of magnitude 1, 2 and more.
    """

    name: ClassVar[str] = "dead_zone"
    version: ClassVar[int] = 2
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROFILE})
    hints: ClassVar[frozenset[Hint]] = frozenset({Hint.MASS})

    section: str
    log_step: int
    importance: int

    def __post_init__(self) -> None:
        """Check the configuration."""
        require_settings(self.log_step, self.importance)

    @property
    def prefix_stable(self) -> bool:
        """Whether no token's level depends on its distance from the end."""
        return self.importance == 0

    def require(self, part: Part) -> None:
        """Check that the array has one row, as the transforms before make it."""
        if part.shape[0] != 1:
            raise FormatError(f"stage {self.name!r} takes one row, not {part.shape[0]}: the codec's stages do not fit")

    def planes(self, part: Part) -> list[PlaneSpec]:
        """Return the planes ``levels`` and ``shifts`` ``[1, T, 1]``, then ``coefficients`` ``[1, T, R]``."""
        rows, tokens, rank = part.shape
        one = (rows, tokens, 1)
        coefficients = PlaneSpec("coefficients", (rows, tokens, rank), 16)
        return [PlaneSpec("levels", one, 5), PlaneSpec("shifts", one, 4), coefficients]

    def scaled(self, plane: PlaneSpec, before: Mapping[str, Codes], part: Part) -> PlaneSpec:
        """Return the plane; that of coefficients has the profile's scales, divided by the token's step and shifted."""
        if plane.name != "coefficients":
            return plane
        levels, shifts = (before[name].reshape(-1).astype(np.int32) for name in ("levels", "shifts"))
        return replace(plane, scales=self._scales(levels - MIDDLE, part, shifts - MAX_SHIFT))

    def expected_bits(self, profile: Profile) -> float:
        """Return the expected bits of a token's coefficients at level 0 if they scatter as in calibration."""
        columns, tables = profile[f"{self.section}.columns"], profile[f"{self.section}.tables"]
        share = tables / tables.sum(1, keepdims=True)
        entropy = -(share * np.log2(share)).sum(1)
        scales = Scales(columns, self.rows(np.zeros(1, np.int32)), tables)
        return float(entropy[scales.classes()].sum())

    def rows(self, levels: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the step of each token in 32nds of an octave, ``[T]``."""
        return (self.log_step + 8 * levels).astype(np.int32)

    def _scales(self, levels: NDArray[np.int32], part: Part, shifts: NDArray[np.int32] | None = None) -> Scales:
        columns = part.integers(f"{self.section}.columns", part.shape[2], least=-FARTHEST, most=FARTHEST)
        tables = self.tables(part)
        rows = self.rows(levels)
        return Scales(columns, rows if shifts is None else rows - 8 * shifts, tables)

    def centroids(self, part: Part) -> Floats:
        """Return the profile's centroids, ``[K, 4]``."""
        centroids = part.floats(f"{self.section}.centroids", len(self.tables(part)), 4)
        if not np.isfinite(centroids).all():
            raise MismatchError(f"the profile's '{self.section}.centroids' are not finite: calibrate again")
        return centroids

    def tables(self, part: Part) -> NDArray[np.int32]:
        """Return the profile's frequency tables, ``[K, 63]``. The entropy coder checks their sums."""
        tables = part.integers(f"{self.section}.tables", None, ALPHABET, least=1, most=1 << 14)
        if not len(tables):
            raise MismatchError(f"the profile's section {self.section!r} has no frequency tables: calibrate again")
        return tables

    def steps(self, levels: NDArray[np.int32]) -> Floats:
        """Return the step of each token as a float32 number, ``[T, 1]``."""
        return np.exp2(self.log_step / 32 + levels[:, None] / 4).astype(np.float32)

    def encode(self, data: NDArray[Any], part: Part, hints: StackHints = NO_HINTS) -> list[Codes]:
        """Quantize float32 coefficients ``[1, T, R]`` to levels, shifts and zigzag codes.

        Raises:
            UnrepresentableError: Coefficients are too large for the step.

        """
        levels = token_levels(part, self.importance, hints.mass)
        scales, steps = self._scales(levels, part), self.steps(levels)
        with np.errstate(over="ignore"):
            if not (np.abs(data[0]).max(1, keepdims=True) < LARGEST * steps).all():
                raise UnrepresentableError("coefficients too large for the step")
        shifts, codes = quantize(data[0], steps, scales, self.centroids(part))
        every = (levels + MIDDLE).astype(np.uint8), (shifts + MAX_SHIFT).astype(np.uint8)
        return [*(plane[None, :, None] for plane in every), codes[None]]

    def decode(self, codes: list[Codes], part: Part) -> Floats:
        """Return the coefficients, float32 ``[1, T, R]``: the centroid of each bin times the token's step."""
        levels, shifts = (plane.reshape(-1).astype(np.int32) for plane in codes[:2])
        levels -= MIDDLE
        scales, steps = self._scales(levels, part, shifts - MAX_SHIFT), self.steps(levels).reshape(-1)
        out = np.zeros(part.shape, np.float32)
        cpu.restore(codes[2][0], steps, scales.columns, scales.rows, self.centroids(part), out[0])
        return out


def quantize(
    values: Floats, steps: Floats, scales: Scales, centroids: Floats
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """Return the shift of each token, ``[T]``, and zigzag codes of ``values``, ``[T, R]``.

    Codes are decided with the shifted classes.
    """
    choices = thresholds(scales.tables, centroids), magnitude_costs(scales.tables), BUCKETS
    shifts, codes = np.empty(len(values), np.int32), np.empty(values.shape, np.uint16)
    values, step = np.ascontiguousarray(values), steps.reshape(-1)
    cpu.quantize(values, step, scales.columns, scales.rows, *choices, shifts, codes)
    return shifts, codes


def require_settings(log_step: int, importance: int) -> None:
    """Check the settings that ``dead_zone`` and ``low_rank`` share.

    Raises:
        ValueError: A setting is out of range.

    """
    if not -1024 <= log_step <= 1024 or not 0 <= importance <= 100:
        raise ValueError("log_step is -1024 to 1024 and importance 0 to 100")


def token_levels(part: Part, importance: int, mass: Floats | None) -> NDArray[np.int32]:
    """Return the level of each token, ``[T]``.

    It depends on the token's distance from the end, and on its attention mass if the capture has it.
    """
    total = max(part.first + part.shape[1] if part.length is None else part.length, 1)
    weight = np.zeros(total)
    if part.length is not None:
        age = total - np.arange(total, dtype=np.float64)
        weight = -AGE_EXPONENT * np.log2(age / total)
    if mass is not None and len(mass) == total:
        mass = np.asarray(mass, np.float64)
        weight += MASS_EXPONENT * np.log2(np.maximum(mass / max(mass.mean(), 1e-30), 1e-3))
    weight = np.clip(weight - weight.mean(), -6, 6)
    levels: NDArray[np.int32] = np.rint(-4 * importance / 100 * weight).astype(np.int32)
    return np.clip(levels[part.first : part.first + part.shape[1]], -MIDDLE, MIDDLE - 1)

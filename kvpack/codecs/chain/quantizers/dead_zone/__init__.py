"""``dead_zone``: one uniform step for every coefficient, a dead zone about zero, a level and a shift a token.

The step of token t is ``2 ** (log_step / 32 + level_t / 4)``. Coefficients of a whitened space all take the same step:
reverse water-filling (Cover & Thomas, 10.3.3). A token that attention reads more gets a finer one: for a loss that
is the sum of m_t times a token's squared error, the best step goes as m_t ** -1/2; because the mass of the last
queries only suggests what later ones read, the exponent is smaller.

A token's coefficients scatter more or less than those of other tokens; its shift says by how many classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Codes, Floats, Part, PlaneSpec, Profile, Quantizer, Scales, UnrepresentableError
from kvpack.codecs.chain.quantizers.dead_zone import cpu
from kvpack.codecs.chain.quantizers.dead_zone.reference import MAX_SHIFT, magnitude_costs, thresholds
from kvpack.codecs.chain.symbols import BUCKETS, LARGEST
from kvpack.errors import MismatchError

MIDDLE = 16
"""Code of level 0; levels are -16 to 15."""

MASS_EXPONENT, AGE_EXPONENT = 0.6, 0.6
"""Of a token's weight: attention mass, and 1 / distance from the end (regressed on gradients; docs/fisher.md)."""


@dataclass(frozen=True)
class DeadZone(Quantizer):
    """``log_step`` in 32nds of an octave; ``importance`` is the exponent of a token's weight, in hundredths.

    With the profile's ``{section}.columns`` ``[R]``, ``{section}.tables`` ``[K, 63]`` and ``{section}.centroids``
    ``[K, 4]``: where in their bins coefficients of magnitude 1, 2 and more lie on average.
    """

    name: ClassVar[str] = "dead_zone"
    version: ClassVar[int] = 2
    exact: ClassVar[bool] = False
    profiled: ClassVar[bool] = True

    section: str
    log_step: int
    importance: int

    def __post_init__(self) -> None:
        """Check the configuration."""
        require_settings(self.log_step, self.importance)

    def planes(self, part: Part) -> list[PlaneSpec]:
        """``levels`` and ``shifts`` ``[1, T, 1]``, then ``coefficients`` ``[1, T, R]``."""
        rows, tokens, rank = part.shape
        one = (rows, tokens, 1)
        coefficients = PlaneSpec("coefficients", (rows, tokens, rank), 16)
        return [PlaneSpec("levels", one, 5), PlaneSpec("shifts", one, 4), coefficients]

    def scaled(self, plane: PlaneSpec, before: Mapping[str, Codes], part: Part) -> PlaneSpec:
        """Coefficients scatter as the profile says, over the token's step, a class more or less by its shift."""
        if plane.name != "coefficients":
            return plane
        levels, shifts = (before[name].reshape(-1).astype(np.int32) for name in ("levels", "shifts"))
        return replace(plane, scales=self._scales(levels - MIDDLE, part, shifts - MAX_SHIFT))

    def expected_bits(self, profile: Profile) -> float:
        """Bits of a token's coefficients, if they scatter as in calibration, at level 0."""
        columns, tables = profile[f"{self.section}.columns"], profile[f"{self.section}.tables"]
        share = tables / tables.sum(1, keepdims=True)
        entropy = -(share * np.log2(share)).sum(1)
        scales = Scales(columns, self.rows(np.zeros(1, np.int32)), tables)
        return float(entropy[scales.classes()].sum())

    def rows(self, levels: NDArray[np.int32]) -> NDArray[np.int32]:
        """Each token's step in 32nds of an octave, ``[T]``."""
        return (self.log_step + 8 * levels).astype(np.int32)

    def _scales(self, levels: NDArray[np.int32], part: Part, shifts: NDArray[np.int32] | None = None) -> Scales:
        columns, tables = part.array(f"{self.section}.columns"), part.array(f"{self.section}.tables")
        if columns.shape != (part.shape[2],) or tables.ndim != 2 or (tables < 1).any():
            raise MismatchError("the profile's scales are not for its own basis")
        rows = self.rows(levels)
        return Scales(columns, rows if shifts is None else rows - 8 * shifts, tables)

    def centroids(self, part: Part) -> Floats:
        """The profile's, ``[K, 4]``."""
        centroids, tables = part.array(f"{self.section}.centroids"), part.array(f"{self.section}.tables")
        if centroids.shape != (len(tables), 4):
            raise MismatchError("the profile's centroids are not for its own tables")
        return centroids

    def steps(self, levels: NDArray[np.int32]) -> Floats:
        """The same as a number, ``[T, 1]``."""
        return np.exp2(self.log_step / 32 + levels[:, None] / 4).astype(np.float32)

    def encode(self, data: NDArray[Any], part: Part) -> list[Codes]:
        """Coefficients ``[1, T, R]``, float32, to levels, shifts and zigzag codes.

        Raises:
            UnrepresentableError: coefficients too large for the step.

        """
        levels = token_levels(part, self.importance)
        scales, steps = self._scales(levels, part), self.steps(levels)
        with np.errstate(over="ignore"):
            if not (np.abs(data[0]).max(1, keepdims=True) < LARGEST * steps).all():
                raise UnrepresentableError("coefficients too large for the step")
        shifts, codes = quantize(data[0], steps, scales, self.centroids(part))
        every = (levels + MIDDLE).astype(np.uint8), (shifts + MAX_SHIFT).astype(np.uint8)
        return [*(plane[None, :, None] for plane in every), codes[None]]

    def decode(self, codes: list[Codes], part: Part) -> Floats:
        """Each magnitude at its bin's centroid, times the token's step."""
        levels, shifts = (plane.reshape(-1).astype(np.int32) for plane in codes[:2])
        levels -= MIDDLE
        scales, steps = self._scales(levels, part, shifts - MAX_SHIFT), self.steps(levels).reshape(-1)
        out = np.empty(part.shape, np.float32)
        cpu.restore(codes[2][0], steps, scales.columns, scales.rows, self.centroids(part), out[0])
        return out


def quantize(
    values: Floats, steps: Floats, scales: Scales, centroids: Floats
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """Each token's shift ``[T]``, and zigzag codes ``[T, R]`` of ``values``, decided with the shifted classes."""
    choices = thresholds(scales.tables, centroids), magnitude_costs(scales.tables), BUCKETS
    shifts, codes = np.empty(len(values), np.int32), np.empty(values.shape, np.uint16)
    values, step = np.ascontiguousarray(values), steps.reshape(-1)
    cpu.quantize(values, step, scales.columns, scales.rows, *choices, shifts, codes)
    return shifts, codes


def require_settings(log_step: int, importance: int) -> None:
    """Check settings, of ``low_rank`` too.

    Raises:
        ValueError: out of range.

    """
    if not -1024 <= log_step <= 1024 or not 0 <= importance <= 100:
        raise ValueError("log_step is -1024 to 1024 and importance 0 to 100")


def token_levels(part: Part, importance: int) -> NDArray[np.int32]:
    """Each token's level ``[T]``, from its attention mass where the capture has it, and its distance from the end."""
    total = max(part.total, 1)
    age = total - np.arange(total, dtype=np.float64)
    weight = -AGE_EXPONENT * np.log2(age / total)
    if part.side.mass is not None:
        mass = np.asarray(part.side.mass, np.float64)
        weight += MASS_EXPONENT * np.log2(np.maximum(mass / max(mass.mean(), 1e-30), 1e-3))
    weight = np.clip(weight - weight.mean(), -6, 6)
    levels: NDArray[np.int32] = np.rint(-4 * importance / 100 * weight).astype(np.int32)
    return np.clip(levels[part.first : part.first + part.shape[1]], -MIDDLE, MIDDLE - 1)

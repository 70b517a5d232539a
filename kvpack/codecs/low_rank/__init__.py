"""``low_rank``: codes all keys and values of a chunk as a product of two factors that are learnt from the chunk.

A stack is a matrix X ``[T, P]`` with one row per token and one column per element of a layer's head. X is scaled by a
step for each token and each element, and decomposed as X = U S Vt. The file has coefficients U S and a basis V S, both
rounded with step 1. An error of 1 in an entry of either factor is an error of 1 in X. Therefore one step for both is
reverse water-filling over both (Cover & Thomas, 10.3.3), and the bits of a learnt basis are weighed against the bits
that it saves. ``docs/fisher.md`` has the details.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Codes, Floats, Part, PlaneSpec, Quantizer, Scales
from kvpack.codecs.chain.quantizers.dead_zone import require_settings, token_levels
from kvpack.codecs.chain.rotary import rotate
from kvpack.codecs.chain.symbols import LARGEST, unzigzag, zigzag
from kvpack.codecs.context import NO_HINTS, StackHints
from kvpack.codecs.low_rank import factors
from kvpack.codecs.low_rank.tables import tables
from kvpack.codecs.low_rank.weights import element_weights
from kvpack.codecs.protocol import Hint, Scope

Array = NDArray[Any]

TOKEN_MIDDLE, STEP_MIDDLE, SPREAD_MIDDLE = 16, 512, 32
"""Codes that stand for 0 in the tokens' levels, the elements' steps and the elements' spreads."""

SINKS, SINK_LEVEL = 4, -16
"""Number of attention sinks, and their largest level.

The keys of these first tokens are far from all other keys, so their steps are four octaves finer.
"""


BLOCK, ROWS = 256, 8
"""Tokens, and rows of a stack, that are worked on at a time where that saves memory and changes no result."""


@dataclass(frozen=True)
class LowRank(Quantizer):
    """Low-rank quantizer with step ``log_step`` in 32nds of an octave.

    ``importance`` is the exponent of a token's weight in hundredths.
    """

    name: ClassVar[str] = "low_rank"
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    scope: ClassVar[Scope] = Scope.CACHE
    hints: ClassVar[frozenset[Hint]] = frozenset({Hint.MASS, Hint.WEIGHTS})

    log_step: int
    importance: int

    def __post_init__(self) -> None:
        """Check the configuration."""
        require_settings(self.log_step, self.importance)

    @property
    def prefix_stable(self) -> bool:
        """Whether no token's level depends on its distance from the end."""
        return self.importance == 0

    def planes(self, part: Part) -> list[PlaneSpec]:
        """Return the planes: RoPE's frequencies, scales of tokens, elements and directions, then the two factors."""
        rows, tokens, dims = part.shape
        most = min(tokens, rows * dims)
        return [
            PlaneSpec("frequencies", (1, 1, dims // 2), 32, modelled=False),
            PlaneSpec("token_levels", (1, tokens, 1), 5),
            PlaneSpec("element_steps", (1, rows, dims), 10),
            PlaneSpec("element_spreads", (1, rows, dims), 6),
            PlaneSpec("basis_classes", (1, most, 1), 7),
            PlaneSpec("coefficient_classes", (1, most, 1), 6),
            PlaneSpec("basis", (1, rows * dims, most), 16),
            PlaneSpec("coefficients", (1, tokens, most), 16),
        ]

    def scaled(self, plane: PlaneSpec, before: Mapping[str, Codes], part: Part) -> PlaneSpec:
        """Return the plane; a factor has one column per active direction, and scales from the classes."""
        if plane.name == "basis":
            rows, columns = _signed(before["element_spreads"], SPREAD_MIDDLE), _live(before) - 1
        elif plane.name == "coefficients":
            rows = -_signed(before["token_levels"], TOKEN_MIDDLE)
            columns = before["coefficient_classes"].reshape(-1)[: len(_live(before))].astype(np.int32)
        else:
            return plane
        scales = Scales((8 * columns).astype(np.int32), (-8 * rows).astype(np.int32), tables())
        return replace(plane, shape=(1, len(rows), len(columns)), scales=scales)

    def encode(self, data: Floats, part: Part, hints: StackHints = NO_HINTS) -> list[Codes]:
        """Quantize float32 ``[R, T, D]``, whose first rows are keys after RoPE, to the planes.

        Raises:
            UnrepresentableError: Values are too large for the step.

        """
        rows, tokens, dims = part.shape
        frequencies = _frequencies(part, hints)
        # The values of F32 tensors may be the capture's own memory; others are the pipeline's, and may be overwritten.
        data = _turned(data.copy() if part.dtype == "F32" else data, frequencies, part, -1)
        weights = element_weights(data, part, hints.weights)
        steps = np.clip(np.rint(-4 * np.log2(weights)), -STEP_MIDDLE, STEP_MIDDLE - 1).astype(np.int64)
        flat = np.array(data.transpose(1, 0, 2), order="C").reshape(tokens, rows * dims)
        del data
        flat /= _octaves(steps).reshape(-1)
        levels = self._levels(flat, part, hints)
        flat /= self._token_steps(levels)
        basis, coefficients = factors.factorize(flat, -levels, SPREAD_MIDDLE)
        classes = np.zeros((2, min(tokens, rows * dims)), np.uint8)
        live = basis.codes.shape[1]
        classes[0, :live], classes[1, :live] = basis.columns + 1, coefficients.columns
        stored = np.zeros(dims // 2, np.float32)
        stored[: len(frequencies)] = frequencies
        return [
            stored.view(np.uint32)[None, None],
            (levels + TOKEN_MIDDLE).astype(np.uint8)[None, :, None],
            (steps + STEP_MIDDLE).astype(np.uint16)[None],
            (basis.rows + SPREAD_MIDDLE).astype(np.uint8).reshape(1, rows, dims),
            classes[0][None, :, None],
            classes[1][None, :, None],
            zigzag(basis.codes)[None],
            zigzag(coefficients.codes)[None],
        ]

    def decode(self, codes: list[Codes], part: Part) -> Floats:
        """Return the values, float32 ``[R, T, D]``.

        They are the product of coefficients and basis, whose columns have norm 1, times the steps of tokens and
        elements.
        """
        rows, tokens, dims = part.shape
        levels, steps = _signed(codes[1], TOKEN_MIDDLE), _signed(codes[2], STEP_MIDDLE)
        basis = factors.unit_columns(unzigzag(codes[6][0])) * _octaves(steps)[:, None]
        coefficients = unzigzag(codes[7][0]).astype(np.float32) * self._token_steps(levels)
        flat: Floats = coefficients @ basis.T
        data = np.array(flat.reshape(tokens, rows, dims).transpose(1, 0, 2), order="C")
        del flat
        frequencies = codes[0].reshape(-1).astype(np.uint32).view(np.float32)
        turning = int(np.argmin(np.append(frequencies != 0, False)))
        return _turned(data, frequencies[:turning], part, 1)

    def _levels(self, rows: Floats, part: Part, hints: StackHints) -> Array:
        """Return the level of each token, ``[T]``: lower (finer) for tokens that attention reads, lowest for sinks.

        ``rows`` ``[T, P]`` are in units of the elements' steps. Levels are high enough that all coefficients fit their
        codes.
        """
        levels = token_levels(part, self.importance, hints.mass).astype(np.int64)
        sinks = part.position + np.arange(len(levels)) < SINKS
        levels = np.where(sinks, np.minimum(levels, SINK_LEVEL), levels)
        energy = [np.square(rows[i : i + BLOCK]).sum(1, dtype=np.float64) for i in range(0, len(rows), BLOCK)]
        norms = np.sqrt(np.concatenate([np.zeros(0), *energy]))
        least = np.ceil(4 * np.log2(np.maximum(norms, 1e-30) * 2 / LARGEST) - self.log_step / 8)
        found: Array = np.clip(np.maximum(levels, least), -TOKEN_MIDDLE, TOKEN_MIDDLE - 1).astype(np.int64)
        return found

    def _token_steps(self, levels: Array) -> Floats:
        """Return the step of each token, ``[T, 1]``."""
        steps: Floats = np.exp2(self.log_step / 32 + levels[:, None] / 4).astype(np.float32)
        return steps


def _octaves(quarters: Array) -> Floats:
    return np.exp2(quarters / 4).astype(np.float32)


def _signed(codes: Codes, middle: int) -> NDArray[np.int32]:
    return codes.reshape(-1).astype(np.int32) - middle


def _live(before: Mapping[str, Codes]) -> NDArray[np.int32]:
    """Return the class plus one of each active direction of the basis: the entries before the first 0."""
    classes = before["basis_classes"].reshape(-1).astype(np.int32)
    return classes[: int(np.argmin(np.append(classes != 0, False)))]


def _frequencies(part: Part, hints: StackHints) -> Floats:
    """Return RoPE's frequencies if they are known, positive and fit the keys' dimensions, and else an empty array."""
    found = hints.frequencies
    fits = found is not None and 2 * len(found) <= part.shape[2] and (found > 0).all()
    return found if fits and found is not None else np.zeros(0, np.float32)


def _turned(data: Floats, frequencies: Floats, part: Part, sign: int) -> Floats:
    """Apply RoPE to the keys of ``data`` (``sign`` 1) or undo it (-1), in place, and return ``data``."""
    if len(frequencies):
        for first in range(0, part.keys, ROWS):
            some = slice(first, min(first + ROWS, part.keys))
            data[some] = rotate(data[some], frequencies, part.position, sign)
    return data

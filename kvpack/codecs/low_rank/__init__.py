"""``low_rank``: all keys and values of a chunk as a product of two small factors, learnt from the chunk itself.

A stack is a matrix X ``[T, P]``, a row a token, a column an element of a layer's head. In units of a step chosen for
each token and element, X = U S Vt; the file has coefficients U S and a basis V S, both rounded with step 1. An error
of 1 in a number of either is an error of 1 in X, so one step for both is reverse water-filling over both (Cover &
Thomas, 10.3.3), and what a learnt basis costs is weighed against what it saves. ``docs/fisher.md`` tells more.
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
"""Codes that mean 0 of tokens' levels, elements' steps and elements' spreads."""

SINKS, SINK_LEVEL = 4, -16
"""The first tokens, whose keys are far from all others' (attention sinks), have steps four octaves finer."""


@dataclass(frozen=True)
class LowRank(Quantizer):
    """``log_step`` in 32nds of an octave; ``importance`` is the exponent of a token's weight, in hundredths."""

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
        """RoPE's frequencies; what each token, element and direction is like; the two factors."""
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
        """The factors have as many columns as there are live directions, and the scatter that classes say."""
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
        """``[R, T, D]`` float32, keys after RoPE first, to the planes.

        Raises:
            UnrepresentableError: values too large for the step.

        """
        rows, tokens, dims = part.shape
        frequencies = _frequencies(part, hints)
        turned = _turned(data, frequencies, part, -1)
        weights = element_weights(turned, part, hints.weights)
        steps = np.clip(np.rint(-4 * np.log2(weights)), -STEP_MIDDLE, STEP_MIDDLE - 1).astype(np.int64)
        flat = turned.transpose(1, 0, 2).reshape(tokens, rows * dims) / _octaves(steps).reshape(-1)
        levels = self._levels(flat, part, hints)
        scaled = flat / self._token_steps(levels)
        basis, coefficients = factors.factorize(scaled, -levels, SPREAD_MIDDLE)
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
        """Coefficients times the basis, each column of which has norm 1, in the tokens' and elements' steps."""
        rows, tokens, dims = part.shape
        levels, steps = _signed(codes[1], TOKEN_MIDDLE), _signed(codes[2], STEP_MIDDLE)
        basis = factors.unit_columns(unzigzag(codes[6][0])) * _octaves(steps)[:, None]
        coefficients = unzigzag(codes[7][0]).astype(np.float32) * self._token_steps(levels)
        flat: Floats = coefficients @ basis.T
        data = np.ascontiguousarray(flat.reshape(tokens, rows, dims).transpose(1, 0, 2))
        frequencies = codes[0].reshape(-1).astype(np.uint32).view(np.float32)
        turning = int(np.argmin(np.append(frequencies != 0, False)))
        return _turned(data, frequencies[:turning], part, 1)

    def _levels(self, rows: Floats, part: Part, hints: StackHints) -> Array:
        """Each token's level ``[T]``: finer for what attention reads, finer still for the first tokens.

        ``rows`` ``[T, P]`` are in elements' steps; no level is so fine that coefficients would not fit their codes.
        """
        levels = token_levels(part, self.importance, hints.mass).astype(np.int64)
        sinks = part.position + np.arange(len(levels)) < SINKS
        levels = np.where(sinks, np.minimum(levels, SINK_LEVEL), levels)
        norms = np.sqrt(np.square(rows).sum(1, dtype=np.float64))
        least = np.ceil(4 * np.log2(np.maximum(norms, 1e-30) * 2 / LARGEST) - self.log_step / 8)
        found: Array = np.clip(np.maximum(levels, least), -TOKEN_MIDDLE, TOKEN_MIDDLE - 1).astype(np.int64)
        return found

    def _token_steps(self, levels: Array) -> Floats:
        """Each token's step ``[T, 1]``."""
        steps: Floats = np.exp2(self.log_step / 32 + levels[:, None] / 4).astype(np.float32)
        return steps


def _octaves(quarters: Array) -> Floats:
    return np.exp2(quarters / 4).astype(np.float32)


def _signed(codes: Codes, middle: int) -> NDArray[np.int32]:
    return codes.reshape(-1).astype(np.int32) - middle


def _live(before: Mapping[str, Codes]) -> NDArray[np.int32]:
    """Class of each live direction of the basis, plus one: those before the first 0."""
    classes = before["basis_classes"].reshape(-1).astype(np.int32)
    return classes[: int(np.argmin(np.append(classes != 0, False)))]


def _frequencies(part: Part, hints: StackHints) -> Floats:
    """RoPE's frequencies where the capture tells them and they fit keys of this width; else none."""
    found = hints.frequencies
    fits = found is not None and 2 * len(found) <= part.shape[2] and (found > 0).all()
    return found if fits and found is not None else np.zeros(0, np.float32)


def _turned(data: Floats, frequencies: Floats, part: Part, sign: int) -> Floats:
    """``data`` with its keys turned by RoPE, or back."""
    if not len(frequencies) or not part.keys:
        return data
    out = data.copy()
    out[: part.keys] = rotate(data[: part.keys], frequencies, part.position, sign)
    return out

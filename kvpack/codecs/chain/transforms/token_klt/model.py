"""The unpacked profile section of ``token_klt``: its matrices and the prediction from token ids."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Floats, Part
from kvpack.codecs.chain.packed import unpack_matrix
from kvpack.codecs.protocol import Profile
from kvpack.errors import MismatchError
from kvpack.numerics.jit import njit

MAX_SINKS = 4
MOST_LAYERS = 1 << 16
"""A group's number is below this."""

PLACES = 3
LAGS = 3
DECAYS = (0.6, 0.85, 0.96, 0.99)
"""Decay factors per token of the means over earlier tokens.

A token is predicted from itself, from the ``LAGS`` tokens before it, and from one decaying mean for each factor.
"""

BEHIND = 2048
"""Number of tokens before a part that the decaying means include; 0.99 ** 2048 is 1e-9."""

_held: list[tuple[Profile, str, TokenModel]] = []
_lock = threading.Lock()


@dataclass(frozen=True)
class LayerGroupBasis:
    """Basis of the residual of the common directions: C directions for each of G groups of consecutive layers.

    Attributes:
        bounds: range of each group's key elements in a row, ``[G, 2]``. The group's value elements lie P / 2 further.
        analysis: for each group, the matrix ``[2 * n, C]`` from its n key elements and n value elements to
            coordinates.
        synthesis: for each group, the matrix ``[C, 2 * n]`` from coordinates back to its elements.
        cross: share of the group coordinates that the R common coordinates already account for, ``[R, G * C]``.

    """

    bounds: list[tuple[int, int]]
    analysis: list[Floats]
    synthesis: list[Floats]
    cross: Floats

    @property
    def width(self) -> int:
        """Number of coordinates of all groups, G * C."""
        return int(self.cross.shape[1])

    def coordinates(self, flat: Floats, common: Floats, out: Floats) -> None:
        """Write the group coordinates of centred rows ``flat`` ``[T, P]`` into ``out`` ``[T, G * C]``.

        ``common`` ``[T, R]`` are the common coordinates of the same rows.
        """
        half, at = flat.shape[1] // 2, 0
        for (a, b), analysis in zip(self.bounds, self.analysis, strict=True):
            mine = out[:, at : at + analysis.shape[1]]
            np.matmul(flat[:, a:b], analysis[: b - a], out=mine)
            mine += flat[:, half + a : half + b] @ analysis[b - a :]
            at += analysis.shape[1]
        out -= common @ self.cross

    def add_rows(self, coordinates: Floats, flat: Floats) -> None:
        """Add the contribution of group coordinates ``[T, G * C]`` to the rows ``flat`` ``[T, P]``."""
        half, at = flat.shape[1] // 2, 0
        for (a, b), synthesis in zip(self.bounds, self.synthesis, strict=True):
            mine = coordinates[:, at : at + len(synthesis)]
            flat[:, a:b] += mine @ synthesis[:, : b - a]
            flat[:, half + a : half + b] += mine @ synthesis[:, b - a :]
            at += len(synthesis)


@dataclass(frozen=True)
class Predictor:
    """Predicts coordinates from token ids with a table of vectors and one layer of rectified units.

    Attributes:
        table: one vector for each token id, ``[V, E]``.
        scale: factor of each input that :func:`token_inputs` returns, ``[I]``.
        hidden: weights of the H rectified units, ``[I, H]``.
        weights: linear weights of the inputs and of the units, ``[I + H, R]``.

    """

    table: Floats
    scale: Floats
    hidden: Floats
    weights: Floats

    def expected(self, tokens: NDArray[np.int32], start: int, out: Floats) -> None:
        """Write the predicted coordinates of ``tokens`` ``[T]`` from ``start`` on into ``out`` ``[T - start, R]``."""
        reach = (len(self.scale) - PLACES - self.table.shape[1]) // (LAGS + len(DECAYS))
        first = max(0, start - BEHIND)
        inputs = token_inputs(self.table[tokens[first:]], reach, start - first, first)
        inputs /= self.scale
        np.matmul(inputs, self.weights[: len(self.scale)], out=out)
        out += np.maximum(inputs @ self.hidden, 0) @ self.weights[len(self.scale) :]


@dataclass(frozen=True)
class TokenModel:
    """Model of P elements per token in R + G * C coordinates.

    The S leading tokens are attention sinks (arXiv 2309.17453). They are reconstructed from their means alone.

    Attributes:
        frequencies: RoPE's frequencies in radians per position.
        mean: mean of each of the S sinks, then the mean of all other tokens, ``[S + 1, P]``.
        analysis: matrix from elements to common coordinates, ``[P, R]``.
        synthesis: matrix from common coordinates to elements, ``[R, P]``.
        local: basis of each group of layers.
        predictor: prediction of the coordinates from token ids.

    """

    frequencies: Floats
    mean: Floats
    analysis: Floats
    synthesis: Floats
    local: LayerGroupBasis
    predictor: Predictor

    @property
    def sinks(self) -> int:
        """Number of attention sinks, S."""
        return len(self.mean) - 1

    @property
    def rank(self) -> int:
        """Number of coordinates per token, R + G * C."""
        return int(self.analysis.shape[1]) + self.local.width

    def means(self, first: int, tokens: int) -> list[tuple[slice, Floats]]:
        """Return the ranges of sinks and of other tokens, each with its means.

        The ranges index ``tokens`` tokens whose first has position ``first``.
        """
        sinks = min(max(self.sinks - first, 0), tokens)
        return [
            (slice(sinks), self.mean[first : first + sinks]),
            (slice(sinks, tokens), self.mean[self.sinks :]),
        ]

    def coordinates(self, flat: Floats, part: Part) -> Floats:
        """Return the coordinates to code for the rows ``flat`` ``[T, P]``: ``[T, rank]``, 0 for sinks.

        The prediction is subtracted already. ``flat`` is overwritten.
        """
        for tokens, mean in self.means(part.position, len(flat)):
            flat[tokens] -= mean
        common = self.analysis.shape[1]
        found = np.empty((len(flat), self.rank), np.float32)
        np.matmul(flat, self.analysis, out=found[:, :common])
        self.local.coordinates(flat, found[:, :common], found[:, common:])
        found -= self.predict(part)
        found[: max(self.sinks - part.position, 0)] = 0
        return found

    def rows(self, coordinates: Floats, part: Part) -> Floats:
        """Undo :meth:`coordinates`: return the rows ``[T, P]``."""
        common = self.analysis.shape[1]
        whole = self.predict(part)
        whole += coordinates
        flat: Floats = whole[:, :common] @ self.synthesis
        self.local.add_rows(whole[:, common:], flat)
        for tokens, mean in self.means(part.position, len(flat)):
            flat[tokens] += mean
        return flat

    def require(self, tokens: NDArray[np.int32]) -> None:
        """Check that the profile's model has all these token ids.

        Raises:
            MismatchError: It does not have some of them.

        """
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.predictor.table):
            raise MismatchError("the capture has token ids that the profile's model does not have")

    def predict(self, part: Part) -> Floats:
        """Return the predicted coordinates ``[T, rank]`` of the part's tokens.

        They are 0 for sinks, and for all tokens if the token ids are unknown.

        Raises:
            MismatchError: The profile's model does not have some of the token ids.

        """
        tokens = part.context.tokens
        stop = part.position + part.shape[1]
        out = np.zeros((part.shape[1], self.rank), np.float32)
        if tokens is None:
            return out
        self.require(tokens)
        start = max(part.position, self.sinks)
        if start < stop:
            self.predictor.expected(tokens[:stop], start, out[start - part.position :])
        return out


def token_inputs(vectors: Floats, reach: int, start: int, first: int = 0) -> Floats:
    """Return the predictor's inputs for the tokens from ``start`` on.

    ``vectors`` ``[T, E]`` are the vectors of tokens whose first has position ``first``. The inputs of a token are its
    own vector, then the lags and decaying means of the leading ``reach`` elements of earlier vectors, then functions
    of its position. The shape is ``[T - start, E + (LAGS + len(DECAYS)) * reach + PLACES]``.
    """
    behind = context_inputs(np.ascontiguousarray(vectors[:, :reach]))[:, start:]
    return np.concatenate([vectors[start:], *behind, places(first + start, first + len(vectors))], axis=1)


def places(start: int, stop: int) -> Floats:
    """Return functions of the positions from ``start`` to ``stop``, ``[stop - start, PLACES]``.

    They are constant beyond the sequence length of calibration.
    """
    n = np.minimum(np.arange(start, stop), 2047).astype(np.float32)
    return np.stack([np.ones_like(n), np.log1p(n) / 8, 1 / np.sqrt(n + 1)], axis=1).astype(np.float32)


def context_inputs(rows: Floats) -> Floats:
    """Return the lags and decaying means before each of ``rows`` ``[T, M]``: ``[LAGS + len(DECAYS), T, M]``.

    Lags that reach before the first row are zero.
    """
    out = np.zeros((LAGS + len(DECAYS), *rows.shape), np.float32)
    for lag in range(1, LAGS + 1):
        out[lag - 1, lag:] = rows[: len(rows) - lag]
    _decaying(np.ascontiguousarray(rows, np.float32), np.array(DECAYS, np.float32), out[LAGS:])
    return out


@njit
def _decaying(rows: Floats, decays: Floats, out: Floats) -> None:
    """Write the weighted means of all rows before each row into ``out`` ``[len(decays), T, M]``.

    The weights fall by the factor of ``decays`` with each token of distance.
    """
    tokens, dims = rows.shape
    for i in range(len(decays)):
        decay, weight = decays[i], np.float32(0)
        total = np.zeros(dims, np.float32)
        for t in range(tokens):
            if weight > 0:
                for m in range(dims):
                    out[i, t, m] = total[m] / weight
            for m in range(dims):
                total[m] = total[m] * decay + rows[t, m]
            weight = weight * decay + np.float32(1)


def model_of(part: Part, section: str) -> TokenModel:
    """Return the unpacked ``section`` of the part's profile; the last two models are cached.

    Raises:
        MismatchError: There is no profile, it lacks the section, or the section's arrays do not fit together.

    """
    part.floats(f"{section}.mean", None, None)
    given = part.context.profile
    assert given is not None
    with _lock:
        for profile, name, model in _held:
            if profile is given and name == section:
                return model
        model = _load(part, section)
        _held.append((given, section, model))
        del _held[:-2]
        return model


def _load(part: Part, section: str) -> TokenModel:
    def matrix(name: str) -> Floats:
        return unpack_matrix(part, f"{section}.{name}")

    mean, whiten, spread, basis, local = (
        part.floats(f"{section}.mean", None, None),
        matrix("whiten"),
        part.floats(f"{section}.spread", None),
        matrix("basis"),
        matrix("local"),
    )
    dims, size = whiten.shape[1], len(whiten)
    predictor = _predictor(part, section)
    groups = part.integers(f"{section}.groups", None, least=0, most=MOST_LAYERS)
    count = len(groups)
    sound = (
        size % dims == 0 and 1 <= len(mean) <= 1 + MAX_SINKS and mean.shape[1] == size,
        spread.shape == (size,) and len(basis) == len(local) == size,
        count and size % (2 * count * dims) == 0,
    )
    if not all(sound) or groups[0] != 0 or not ((np.diff(groups) >= 0) & (np.diff(groups) <= 1)).all():
        raise _unfit(section)
    if predictor.weights.shape[1] != basis.shape[1] + (int(groups[-1]) + 1) * local.shape[1]:
        raise _unfit(section)
    frequencies = part.floats("rope.inv_freq", None)
    if not all(np.isfinite(array).all() for array in (mean, spread, frequencies)):
        raise _unfit(section)
    blocks = whiten.reshape(-1, dims, dims)
    try:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            synthesis = np.ascontiguousarray((basis * spread[:, None]).T)
            own = layer_group_basis(blocks, synthesis, local * spread[:, None], groups)
            return TokenModel(frequencies, mean, dual(blocks, synthesis), synthesis, own, predictor)
    except np.linalg.LinAlgError:  # directions that are not independent, or sums that overflow
        raise _unfit(section) from None


def _predictor(part: Part, section: str) -> Predictor:
    rows = unpack_matrix(part, f"{section}.table")
    order = part.integers(f"{section}.order", None, least=0, most=len(rows) - 1)
    if not len(order):
        raise MismatchError(f"the profile's section {section!r} orders no tokens")
    scale = part.floats(f"{section}.scale", None)
    hidden, weights = (unpack_matrix(part, f"{section}.{name}") for name in ("hidden", "weights"))
    reach, rest = divmod(scale.size - PLACES - rows.shape[1], LAGS + len(DECAYS))
    sound = (scale > 0).all() and np.isfinite(scale).all() and not rest and 0 < reach <= rows.shape[1]
    if not sound or len(hidden) != len(scale) or len(weights) != len(scale) + hidden.shape[1]:
        raise _unfit(section)
    return Predictor(rows[order], scale, hidden, weights)


def _unfit(section: str) -> MismatchError:
    return MismatchError(f"the profile's section {section!r} does not fit together: calibrate again")


def layer_group_basis(whiten: Floats, synthesis: Floats, local: Floats, groups: NDArray[np.int32]) -> LayerGroupBasis:
    """Return the basis of all layer groups.

    ``local`` ``[P, C]`` are the directions of each group's elements, and ``groups`` ``[L]`` is the group of each layer.
    ``whiten`` ``[B, D, D]`` are the whitening blocks, and ``synthesis`` ``[R, P]`` are the common directions.
    """
    half, dims = len(local) // 2, whiten.shape[1]
    layer = half // len(groups)
    found = LayerGroupBasis([], [], [], np.empty((len(synthesis), (int(groups[-1]) + 1) * local.shape[1]), np.float32))
    for group in range(int(groups[-1]) + 1):
        a, b = (int(np.searchsorted(groups, group, side)) * layer for side in ("left", "right"))
        mine = np.ascontiguousarray(np.concatenate([local[a:b], local[half + a : half + b]]).T)
        blocks = np.concatenate([whiten[a // dims : b // dims], whiten[(half + a) // dims : (half + b) // dims]])
        analysis = dual(blocks, mine)
        found.bounds.append((a, b))
        found.analysis.append(analysis)
        found.synthesis.append(mine)
        columns = slice(group * local.shape[1], (group + 1) * local.shape[1])
        found.cross[:, columns] = (
            synthesis[:, a:b] @ analysis[: b - a] + synthesis[:, half + a : half + b] @ analysis[b - a :]
        )
    return found


def dual(whiten: Floats, synthesis: Floats) -> Floats:
    """Return the analysis matrix ``[P, R]`` that belongs to ``synthesis`` ``[R, P]``.

    It maps a row to the coordinates whose synthesis is nearest to the row, measured in the space whitened by
    ``whiten`` ``[B, D, D]``. The rows of ``synthesis`` are rounded, and therefore not quite orthonormal in that space.
    """
    blocks, dims, _ = whiten.shape
    columns = np.ascontiguousarray(synthesis.T).reshape(blocks, dims, -1)
    white: Floats = (whiten.transpose(0, 2, 1) @ columns).reshape(blocks * dims, -1)
    gram = white.T.astype(np.float64) @ white
    gram += (1e-10 * gram.trace() / len(gram) + 1e-30) * np.eye(len(gram))  # Rounding may make a direction zero.
    inverse = np.linalg.inv(gram).astype(np.float32)
    found: Floats = (whiten @ (white @ inverse).reshape(blocks, dims, -1)).reshape(blocks * dims, -1)
    return found

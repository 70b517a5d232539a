"""What a profile says of ``token_klt``, unpacked: matrices, and the prediction from token ids."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Floats, Part, Profile
from kvpack.codecs.chain.packed import unpack_matrix
from kvpack.errors import MismatchError
from kvpack.numerics.jit import njit

MAX_SINKS = 4
PLACES = 3
LAGS = 3
DECAYS = (0.6, 0.85, 0.96, 0.99)
"""A token is predicted from itself, from ``LAGS`` tokens before it, and from decaying means of those before it."""

BEHIND = 2048
"""Tokens before a part that its means reach back to: 0.99 ** 2048 is 1e-9."""

_held: list[tuple[Profile, str, TokenModel]] = []
_lock = threading.Lock()


@dataclass(frozen=True)
class LayerGroupBasis:
    """Directions of a few layers each, for what the common ones leave: C in each of G groups of layers.

    ``bounds`` ``[G, 2]`` are elements of each group's keys; its values lie P / 2 further. ``analysis`` and
    ``synthesis`` are, for each group, ``[2 * n, C]`` and ``[C, 2 * n]`` of its n elements of keys, then of values;
    ``cross`` ``[R, G * C]`` is what the common coordinates have told already.
    """

    bounds: list[tuple[int, int]]
    analysis: list[Floats]
    synthesis: list[Floats]
    cross: Floats

    @property
    def width(self) -> int:
        """G * C."""
        return int(self.cross.shape[1])

    def coordinates(self, flat: Floats, common: Floats, out: Floats) -> None:
        """Of centred rows ``[T, P]`` and their common coordinates ``[T, R]``, into ``out`` ``[T, G * C]``."""
        half, at = flat.shape[1] // 2, 0
        for (a, b), analysis in zip(self.bounds, self.analysis, strict=True):
            mine = out[:, at : at + analysis.shape[1]]
            np.matmul(flat[:, a:b], analysis[: b - a], out=mine)
            mine += flat[:, half + a : half + b] @ analysis[b - a :]
            at += analysis.shape[1]
        out -= common @ self.cross

    def add_rows(self, coordinates: Floats, flat: Floats) -> None:
        """Add to rows ``[T, P]`` what coordinates ``[T, G * C]`` say."""
        half, at = flat.shape[1] // 2, 0
        for (a, b), synthesis in zip(self.bounds, self.synthesis, strict=True):
            mine = coordinates[:, at : at + len(synthesis)]
            flat[:, a:b] += mine @ synthesis[:, : b - a]
            flat[:, half + a : half + b] += mine @ synthesis[:, b - a :]
            at += len(synthesis)


@dataclass(frozen=True)
class Predictor:
    """What token ids tell: ``table`` ``[V, E]`` has a vector of each id, ``scale`` ``[I]`` goes over what
    :func:`token_inputs` gives, ``hidden`` ``[I, H]`` are rectified units, ``weights`` ``[I + H, R]`` of both.
    """

    table: Floats
    scale: Floats
    hidden: Floats
    weights: Floats

    def expected(self, tokens: NDArray[np.int32], start: int, out: Floats) -> None:
        """Into ``out`` ``[T - start, R]``: coordinates of tokens ``[T]`` from ``start`` on."""
        reach = (len(self.scale) - PLACES - self.table.shape[1]) // (LAGS + len(DECAYS))
        first = max(0, start - BEHIND)
        inputs = token_inputs(self.table[tokens[first:]], reach, start - first, first)
        inputs /= self.scale
        np.matmul(inputs, self.weights[: len(self.scale)], out=out)
        out += np.maximum(inputs @ self.hidden, 0) @ self.weights[len(self.scale) :]


@dataclass(frozen=True)
class TokenModel:
    """Of P elements a token and R + G * C coordinates.

    ``mean`` ``[S + 1, P]``: of each of the S leading tokens that are attention sinks (arXiv 2309.17453), which are
    given by their means alone, and of the others. ``analysis`` ``[P, R]``, ``synthesis`` ``[R, P]``.
    """

    frequencies: Floats
    mean: Floats
    analysis: Floats
    synthesis: Floats
    local: LayerGroupBasis
    predictor: Predictor

    @property
    def sinks(self) -> int:
        """S."""
        return len(self.mean) - 1

    @property
    def rank(self) -> int:
        """R + G * C."""
        return int(self.analysis.shape[1]) + self.local.width

    def means(self, first: int, tokens: int) -> list[tuple[slice, Floats]]:
        """Of ``tokens`` tokens from position ``first`` on, the sinks and then the others: which, and their means."""
        sinks = min(max(self.sinks - first, 0), tokens)
        return [
            (slice(sinks), self.mean[first : first + sinks]),
            (slice(sinks, tokens), self.mean[self.sinks :]),
        ]

    def coordinates(self, flat: Floats, part: Part) -> Floats:
        """What is coded of rows ``[T, P]``, which are overwritten: ``[T, rank]``, 0 for sinks."""
        for tokens, mean in self.means(part.first, len(flat)):
            flat[tokens] -= mean
        common = self.analysis.shape[1]
        found = np.empty((len(flat), self.rank), np.float32)
        np.matmul(flat, self.analysis, out=found[:, :common])
        self.local.coordinates(flat, found[:, :common], found[:, common:])
        found -= self.predict(part)
        found[: max(self.sinks - part.first, 0)] = 0
        return found

    def rows(self, coordinates: Floats, part: Part) -> Floats:
        """The inverse: ``[T, P]``."""
        common = self.analysis.shape[1]
        whole = self.predict(part)
        whole += coordinates
        flat: Floats = whole[:, :common] @ self.synthesis
        self.local.add_rows(whole[:, common:], flat)
        for tokens, mean in self.means(part.first, len(flat)):
            flat[tokens] += mean
        return flat

    def require(self, tokens: NDArray[np.int32]) -> None:
        """Check token ids.

        Raises:
            MismatchError: some that the profile's model does not have.

        """
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.predictor.table):
            raise MismatchError("the capture has token ids that the profile's model does not have")

    def predict(self, part: Part) -> Floats:
        """Expected coordinates ``[T, rank]`` of the part's tokens; 0 for sinks, and without token ids.

        Raises:
            MismatchError: token ids that the profile's model does not have.

        """
        tokens = part.side.tokens
        stop = part.first + part.shape[1]
        out = np.zeros((part.shape[1], self.rank), np.float32)
        if tokens is None:
            return out
        self.require(tokens)
        start = max(part.first, self.sinks)
        if start < stop:
            self.predictor.expected(tokens[:stop], start, out[start - part.first :])
        return out


def token_inputs(vectors: Floats, reach: int, start: int, first: int = 0) -> Floats:
    """What tokens are predicted from, from ``start`` on: ``[T - start, E + (LAGS + len(DECAYS)) * reach + PLACES]``.

    A token's own vector, of ``vectors`` ``[T, E]``, which begin at position ``first``; the leading ``reach`` of those
    behind it; its place.
    """
    behind = context_inputs(np.ascontiguousarray(vectors[:, :reach]))[:, start:]
    return np.concatenate([vectors[start:], *behind, places(first + start, first + len(vectors))], axis=1)


def places(start: int, stop: int) -> Floats:
    """Functions of the position ``[stop - start, PLACES]``; beyond the lengths of calibration they stay the same."""
    n = np.minimum(np.arange(start, stop), 2047).astype(np.float32)
    return np.stack([np.ones_like(n), np.log1p(n) / 8, 1 / np.sqrt(n + 1)], axis=1).astype(np.float32)


def context_inputs(rows: Floats) -> Floats:
    """Of tokens' rows ``[T, M]``, what is behind each: ``[LAGS + len(DECAYS), T, M]``, zero before the first."""
    out = np.zeros((LAGS + len(DECAYS), *rows.shape), np.float32)
    for lag in range(1, LAGS + 1):
        out[lag - 1, lag:] = rows[: len(rows) - lag]
    _decaying(np.ascontiguousarray(rows, np.float32), np.array(DECAYS, np.float32), out[LAGS:])
    return out


@njit
def _decaying(rows: Floats, decays: Floats, out: Floats) -> None:
    """Means of all rows before each, weights falling by a factor ``decay`` a token."""
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
    """The part's profile unpacked; the last two are kept.

    Raises:
        MismatchError: no profile, or one without such a section, or whose arrays do not fit together.

    """
    part.array(f"{section}.mean")
    assert part.profile is not None
    with _lock:
        for profile, name, model in _held:
            if profile is part.profile and name == section:
                return model
        model = _load(part, section)
        _held.append((part.profile, section, model))
        del _held[:-2]
        return model


def _load(part: Part, section: str) -> TokenModel:
    def array(name: str) -> NDArray[np.float32]:
        return part.array(f"{section}.{name}")

    def matrix(name: str) -> Floats:
        return unpack_matrix(part, f"{section}.{name}")

    mean, whiten, spread, basis, local = (
        array("mean"),
        matrix("whiten"),
        array("spread"),
        matrix("basis"),
        matrix("local"),
    )
    dims, size = whiten.shape[1], len(whiten)
    predictor = _predictor(part, section)
    groups: NDArray[np.int32] = part.array(f"{section}.groups")
    count = len(groups)
    sound = (
        size % dims == 0 and mean.ndim == 2 and 1 <= len(mean) <= 1 + MAX_SINKS and mean.shape[1] == size,
        spread.shape == (size,) and len(basis) == len(local) == size,
        groups.ndim == 1 and count and size % (2 * count * dims) == 0,
    )
    if not all(sound) or groups[0] != 0 or not ((np.diff(groups) >= 0) & (np.diff(groups) <= 1)).all():
        raise _unfit(section)
    if predictor.weights.shape[1] != basis.shape[1] + (int(groups[-1]) + 1) * local.shape[1]:
        raise _unfit(section)
    blocks = whiten.reshape(-1, dims, dims)
    synthesis = np.ascontiguousarray((basis * spread[:, None]).T)
    own = layer_group_basis(blocks, synthesis, local * spread[:, None], groups)
    return TokenModel(part.array("rope.inv_freq"), mean, dual(blocks, synthesis), synthesis, own, predictor)


def _predictor(part: Part, section: str) -> Predictor:
    rows, order = unpack_matrix(part, f"{section}.table"), part.array(f"{section}.order")
    if order.ndim != 1 or not len(order) or not 0 <= int(order.min()) <= int(order.max()) < len(rows):
        raise MismatchError(f"the profile's section {section!r} orders tokens that its table does not have")
    scale = part.array(f"{section}.scale")
    hidden, weights = (unpack_matrix(part, f"{section}.{name}") for name in ("hidden", "weights"))
    reach, rest = divmod(scale.size - PLACES - rows.shape[1], LAGS + len(DECAYS))
    sound = scale.ndim == 1 and (scale > 0).all() and not rest and 0 < reach <= rows.shape[1]
    if not sound or len(hidden) != len(scale) or len(weights) != len(scale) + hidden.shape[1]:
        raise _unfit(section)
    return Predictor(rows[order], scale, hidden, weights)


def _unfit(section: str) -> MismatchError:
    return MismatchError(f"the profile's section {section!r} does not fit together: calibrate again")


def layer_group_basis(whiten: Floats, synthesis: Floats, local: Floats, groups: NDArray[np.int32]) -> LayerGroupBasis:
    """Directions ``[P, C]`` of each group's elements, ``groups`` ``[L]`` being each layer's group."""
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
    """Analysis ``[P, R]``: coordinates whose ``synthesis`` ``[R, P]`` is nearest, measured whitened by ``[B, D, D]``.

    The rows of ``synthesis`` are rounded, and so not quite orthonormal there.
    """
    blocks, dims, _ = whiten.shape
    columns = np.ascontiguousarray(synthesis.T).reshape(blocks, dims, -1)
    white: Floats = (whiten.transpose(0, 2, 1) @ columns).reshape(blocks * dims, -1)
    gram = white.T.astype(np.float64) @ white
    gram += (1e-10 * gram.trace() / len(gram) + 1e-30) * np.eye(len(gram))  # directions may be rounded to nothing
    inverse = np.linalg.inv(gram).astype(np.float32)
    found: Floats = (whiten @ (white @ inverse).reshape(blocks, dims, -1)).reshape(blocks * dims, -1)
    return found

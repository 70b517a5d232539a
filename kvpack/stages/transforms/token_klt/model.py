"""What a profile says of ``token_klt``, unpacked: matrices, and the prediction from token ids."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import MismatchError
from kvpack.stages.base import Floats, Part, Profile
from kvpack.stages.jit import njit
from kvpack.stages.packed import unpack_matrix

MOST_SINKS = 4
PLACES = 3
LAGS = 3
DECAYS = (0.6, 0.85, 0.96, 0.99)
"""A token is predicted from itself, from ``LAGS`` tokens before it, and from decaying means of all before it."""

_held: list[tuple[Profile, str, TokenModel]] = []
_lock = threading.Lock()


@dataclass(frozen=True)
class TokenModel:
    """Of P elements a token and R coordinates.

    ``mean`` ``[S + 1, P]``: of each of the S leading tokens that are attention sinks (arXiv 2309.17453), which are
    given by their means alone, and of the others. ``analysis`` ``[P, R]``, ``synthesis`` ``[R, P]``. ``table``
    ``[V, E]``: a vector of each token id. ``weights`` ``[I, R]``: of what :func:`token_inputs` gives.
    """

    frequencies: Floats
    mean: Floats
    analysis: Floats
    synthesis: Floats
    table: Floats
    weights: Floats

    @property
    def sinks(self) -> int:
        """S."""
        return len(self.mean) - 1

    @property
    def rank(self) -> int:
        """R."""
        return int(self.analysis.shape[1])

    def means(self, first: int, tokens: int) -> Floats:
        """The mean of each token from position ``first`` on, ``[tokens, P]`` or one that broadcasts to it."""
        if first >= self.sinks:
            return self.mean[self.sinks :]
        return self.mean[np.minimum(np.arange(first, first + tokens), self.sinks)]

    def coordinates(self, flat: Floats, part: Part) -> Floats:
        """What is coded of rows ``[T, P]``, which are overwritten: ``[T, R]``, 0 for sinks."""
        flat -= self.means(part.first, len(flat))
        found = np.asarray(flat @ self.analysis - self.predict(part), np.float32)
        found[: max(self.sinks - part.first, 0)] = 0
        return found

    def rows(self, coordinates: Floats, part: Part) -> Floats:
        """The inverse: ``[T, P]``."""
        flat = np.asarray((coordinates + self.predict(part)) @ self.synthesis, np.float32)
        flat += self.means(part.first, len(flat))
        return flat

    def require(self, tokens: NDArray[np.int32]) -> None:
        """Check token ids.

        Raises:
            MismatchError: some that the profile's model does not have.

        """
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.table):
            raise MismatchError("the capture has token ids that the profile's model does not have")

    def predict(self, part: Part) -> Floats:
        """Expected coordinates ``[T, R]`` of the part's tokens; 0 for sinks, and without token ids.

        Raises:
            MismatchError: token ids that the profile's model does not have.

        """
        tokens = part.side.tokens
        stop = part.first + part.shape[1]
        if tokens is None:
            return np.zeros((part.shape[1], self.rank), np.float32)
        self.require(tokens)
        start = max(part.first, self.sinks)
        out = np.zeros((part.shape[1], self.rank), np.float32)
        if start < stop:
            reach = (len(self.weights) - PLACES - self.table.shape[1]) // (LAGS + len(DECAYS))
            out[start - part.first :] = token_inputs(self.table[tokens[:stop]], reach, start) @ self.weights
        return out


def token_inputs(vectors: Floats, reach: int, start: int) -> Floats:
    """What tokens are predicted from, from ``start`` on: ``[T - start, E + (LAGS + len(DECAYS)) * reach + PLACES]``.

    A token's own vector, of ``vectors`` ``[T, E]``; the leading ``reach`` of those behind it; its place.
    """
    behind = context_inputs(np.ascontiguousarray(vectors[:, :reach]))[:, start:]
    return np.concatenate([vectors[start:], *behind, places(start, len(vectors))], axis=1)


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

    mean, whiten = array("mean"), unpack_matrix(part, f"{section}.whiten")
    dims = whiten.shape[1]
    blocks = len(whiten) // dims
    whiten = whiten.reshape(blocks, dims, dims)
    spread = array("spread")
    basis = unpack_matrix(part, f"{section}.basis")
    rows, order = unpack_matrix(part, f"{section}.table"), part.array(f"{section}.order")
    if order.ndim != 1 or not len(order) or not 0 <= int(order.min()) <= int(order.max()) < len(rows):
        raise MismatchError(f"the profile's section {section!r} orders tokens that its table does not have")
    table = rows[order]
    weights = unpack_matrix(part, f"{section}.weights")
    reach, rest = divmod(len(weights) - PLACES - table.shape[1], LAGS + len(DECAYS))
    sound = (
        mean.ndim == 2 and 1 <= len(mean) <= 1 + MOST_SINKS and mean.shape[1] == blocks * dims,
        spread.shape == (blocks * dims,) and basis.shape[0] == blocks * dims,
        weights.shape[1] == basis.shape[1],
        not rest and 0 < reach <= table.shape[1],
    )
    if not all(sound):
        raise MismatchError(f"the profile's section {section!r} does not fit together: calibrate again")
    synthesis = np.ascontiguousarray((basis * spread[:, None]).T)
    analysis = dual(whiten, synthesis)
    return TokenModel(part.array("rope.inv_freq"), mean, analysis, synthesis, table, weights)


def dual(whiten: Floats, synthesis: Floats) -> Floats:
    """Analysis ``[P, R]``: coordinates whose ``synthesis`` ``[R, P]`` is nearest, measured whitened by ``[B, D, D]``.

    The rows of ``synthesis`` are rounded, and so not quite orthonormal there.
    """
    blocks, dims, _ = whiten.shape
    columns = np.ascontiguousarray(synthesis.T).reshape(blocks, dims, -1)
    white: Floats = (whiten.transpose(0, 2, 1) @ columns).reshape(blocks * dims, -1)
    inverse = np.linalg.inv(white.T.astype(np.float64) @ white).astype(np.float32)
    found: Floats = (whiten @ (white @ inverse).reshape(blocks, dims, -1)).reshape(blocks * dims, -1)
    return found

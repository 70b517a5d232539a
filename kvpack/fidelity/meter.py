"""Attention fidelity: what a layer's attention makes of the reconstructed cache, by probe queries.

For a query q at position p, the row of attention is ``softmax(scale * q . k_t)`` over tokens t = 0..p, and the output
is the mean of the values under it (arXiv 1706.03762, section 3.2.1; grouped queries: arXiv 2305.13245). Everything is
computed in float64, so that the noise of the figures themselves is near 1e-15.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import FormatError
from kvpack.fidelity.attention import Attention, Doubles, RowFigures, Shape, require_fit
from kvpack.fidelity.map import AttentionMap, Bins, map_attention
from kvpack.fidelity.softmax import TOP_K, OnlineAttention

BLOCK = 1 << 20
"""The number of attention weights (rows times tokens) that are held at a time."""

STEP = 1 << 11
"""The number of tokens that are taken at a time at most, however few rows there are."""


class AttentionMeter:
    """Measures one layer's attention over the original cache and over another one, window of tokens by window.

    Its memory does not depend on the number of tokens: for every row it holds the query, two outputs and two lists of
    the 16 best tokens. As long as both caches are the same, it computes only one of them.
    """

    def __init__(
        self,
        queries: NDArray[Any],
        positions: NDArray[np.integer[Any]],
        scale: float,
        keys: Shape,
        values: Shape,
        *,
        bins: Bins | None = None,
    ) -> None:
        """Prepare for a layer's probe queries.

        Args:
            queries: ``[H_q, P, D]`` floats, after RoPE. Query head h reads the key-value head ``h // (H_q / H)``.
            positions: ``[P]``; the query at position p sees tokens 0 to p inclusive.
            scale: The factor of the dot products.
            keys: The shape ``(H, T, D)`` of the layer's keys.
            values: The shape ``(H, T, D_v)`` of the layer's values.
            bins: The ranges of tokens of :meth:`map`, if that will be asked for.

        Raises:
            FormatError: The shapes do not belong together, or a position is not that of a token.

        """
        require_fit(queries.shape, positions, keys, values)
        heads = keys[0]
        group = queries.shape[0] // heads if heads else 0
        rows = group * queries.shape[1]
        self._queries = queries.reshape(heads, rows, keys[2])
        self._positions = np.tile(positions, group).astype(np.int64)
        self._scale = float(scale)
        self.seen = int(positions.max()) + 1 if heads * rows else 0
        """The number of tokens that any query sees. Later ones need not be added."""
        self._next = 0
        self._ours = self._theirs = OnlineAttention(heads, rows, values[2])
        self._bins = bins
        self._masses = self._masses_hat = np.zeros((heads, rows, bins.count if bins else 0))
        self._gaps: Doubles = np.zeros((heads, rows))
        self._vanished: Doubles = np.full((heads, rows), -inf)

    def add(
        self,
        first: int,
        keys: NDArray[Any],
        values: NDArray[Any],
        other_keys: NDArray[Any],
        other_values: NDArray[Any],
    ) -> None:
        """Take in the next tokens, ``first`` and those that follow it.

        Args:
            first: The index of the window's first token; it must be the number of tokens added before.
            keys: Floats ``[H, t, D]`` of the original.
            values: Floats ``[H, t, D_v]`` of the original.
            other_keys: The same tokens of the other cache. Passing the very object ``keys`` says that they are exact.
            other_values: The same for values.

        Raises:
            ValueError: ``first`` is not the next token.

        """
        if first != self._next:
            raise ValueError(f"token {self._next} is next, not {first}")
        self._next = first + keys.shape[1]
        tokens = min(keys.shape[1], self.seen - first)
        step = min(max(BLOCK // max(self._gaps.size, 1), 1), STEP)
        for start in range(0, tokens, step):
            cut = slice(start, min(start + step, tokens))
            ours, ours_v = keys[:, cut].astype(np.float64), values[:, cut].astype(np.float64)
            theirs = ours if other_keys is keys else other_keys[:, cut].astype(np.float64)
            theirs_v = ours_v if other_values is values else other_values[:, cut].astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):
                self._add(first + start, (ours, ours_v), (theirs, theirs_v))

    def result(self) -> Attention:
        """The figures over all tokens added.

        Rows that are not finite in the original are left out and counted. Rows that only the other cache makes
        non-finite have infinite KL and output error, and no overlap.

        Raises:
            FormatError: Tokens that a query sees have not been added.

        """
        if self._next < self.seen:
            raise FormatError(f"only {self._next} of the {self.seen} tokens that probe queries see were given")
        if not self.seen:
            return Attention()
        energy, error, measured = self._outputs()
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            kl = np.maximum(self._kl(), 0.0)
        lost = np.isinf(error)
        columns = (np.where(lost, inf, kl), np.where(lost, 0.0, self._overlap()), energy, error)
        return RowFigures(*(column[measured] for column in columns)).summarise(measured.size)

    def map(self) -> AttentionMap | None:
        """Where attention differs, by ranges of tokens; None without bins or rows. Errors are those of `result`."""
        if self._bins is None or not self.seen:
            return None
        ours, theirs = self._ours, self._theirs
        energy, error, measured = self._outputs()
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            moved = np.abs(self._masses / ours.total[..., None] - self._masses_hat / theirs.total[..., None])
        moved[~_is_defined(theirs)] = inf
        return map_attention(self._bins, self._positions, moved, energy, error, measured)

    def _outputs(self) -> tuple[Doubles, Doubles, NDArray[np.bool_]]:
        """Of every row ``[H, R]`` ||o||^2, ||o - o^||^2 (infinite where the other is lost), and whether it counts."""
        ours, theirs = self._ours, self._theirs
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            output = ours.outputs()
            energy = (output**2).sum(-1)
            error = np.zeros_like(energy) if theirs is ours else ((output - theirs.outputs()) ** 2).sum(-1)
        measured = np.isfinite(energy) & _is_defined(ours)
        lost = ~np.isfinite(error) | ~_is_defined(theirs)
        return energy, np.where(lost, inf, error), measured

    def _add(self, first: int, ours: tuple[Doubles, Doubles], theirs: tuple[Doubles, Doubles]) -> None:
        """Take in tokens whose weights fit into memory, as pairs of keys and values."""
        hidden = np.arange(first, first + ours[0].shape[1]) > self._positions[:, None]
        scores = self._scores(ours[0], hidden)
        exact = ours[0] is theirs[0] and ours[1] is theirs[1]
        if not exact and self._theirs is self._ours:
            self._theirs, self._masses_hat = self._ours.copy(), self._masses.copy()
        weights, factor = self._ours.add(first, scores, ours[1], hidden)
        self._add_masses(self._masses, first, weights, factor)
        self._gaps *= factor
        if self._theirs is self._ours:
            return
        scores_hat = scores if theirs[0] is ours[0] else self._scores(theirs[0], hidden)
        self._add_masses(self._masses_hat, first, *self._theirs.add(first, scores_hat, theirs[1], hidden))
        if scores_hat is not scores:
            self._add_gaps(weights, scores, scores_hat)

    def _add_masses(self, masses: Doubles, first: int, weights: Doubles, factor: Doubles) -> None:
        """Add the weights ``[H, R, t]`` of a window to the sums ``[H, R, B]`` of its ranges, if there are any."""
        if self._bins is not None:
            masses *= factor[..., None]
            self._bins.add(masses, first, weights)

    def _scores(self, keys: Doubles, hidden: NDArray[np.bool_]) -> Doubles:
        """Scaled dot products ``[H, R, t]``, -inf where the row does not see the token."""
        scores: Doubles = (self._queries.astype(np.float64) * self._scale) @ keys.transpose(0, 2, 1)
        scores[:, hidden] = -inf
        return scores

    def _add_gaps(self, weights: Doubles, scores: Doubles, scores_hat: Doubles) -> None:
        """Add ``weight * (score - score^)`` of a window, from which KL follows.

        A token with a weight whose other score is -inf has been lost altogether, and KL is infinite. Only the greatest
        score of such tokens is kept, because their weights may still shrink to 0 when the peak rises.
        """
        attended = weights > 0
        gone = attended & (scores_hat == -inf)
        if gone.any():
            attended &= ~gone
            self._vanished = np.maximum(self._vanished, np.where(gone, scores, -inf).max(-1))
        gaps = np.subtract(scores, scores_hat, out=np.zeros_like(scores), where=attended)
        self._gaps += np.einsum("hrt,hrt->hr", weights, gaps)

    def _kl(self) -> Doubles:
        """KL ``[H, R]``: the mean of ``score - score^``, less the difference of the two log-sum-exps."""
        ours, theirs = self._ours, self._theirs
        peaks, totals = ours.peak - theirs.peak, np.log(ours.total) - np.log(theirs.total)
        kl = self._gaps / ours.total - (peaks + totals)
        vanished = np.exp(self._vanished - ours.peak - np.log(ours.total)) > 0
        result: Doubles = np.where(vanished, inf, kl)
        return result

    def _overlap(self) -> Doubles:
        """The share ``[H, R]`` of each row's best tokens in common; 1 where no more than 16 are visible."""
        result = np.ones_like(self._gaps)
        many = np.flatnonzero(self._positions >= TOP_K)
        if self._theirs is self._ours or not many.size:
            return result
        ours, theirs = (part.best_tokens[:, many] for part in (self._ours, self._theirs))
        result[:, many] = (ours[..., :, None] == theirs[..., None, :]).sum(axis=(-2, -1)) / TOP_K
        return result


def measure_attention(
    queries: NDArray[Any],
    positions: NDArray[np.integer[Any]],
    original: tuple[NDArray[Any], NDArray[Any]],
    other: tuple[NDArray[Any], NDArray[Any]],
    scale: float,
) -> Attention:
    """Attention over ``original`` compared with attention over ``other``, with all tokens of one layer at once.

    Args:
        queries: ``[H_q, P, D]`` floats, after RoPE. Query head h reads the key-value head ``h // (H_q / H)``.
        positions: ``[P]``; the query at position p sees tokens 0 to p inclusive.
        original: Keys ``[H, T, D]`` and values ``[H, T, D_v]``, floats.
        other: The same, reconstructed. Passing the very same array says that it is exact.
        scale: The factor of the dot products.

    Raises:
        FormatError: The shapes do not belong together, or a position is not that of a token.

    """
    shapes = [part.shape for part in original]
    if shapes != [part.shape for part in other]:
        raise FormatError("original and reconstructed keys or values differ in shape")
    meter = AttentionMeter(queries, positions, scale, *shapes)
    meter.add(0, *original, *other)
    return meter.result()


def _is_defined(part: OnlineAttention) -> NDArray[np.bool_]:
    """Whether attention ``[H, R]`` is defined: some token was seen, and no score was NaN or +inf."""
    return np.isfinite(part.total) & (part.total > 0)

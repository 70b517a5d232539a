"""Attention computed window of tokens by window, without ever holding a whole row.

The softmax of a row is kept as the greatest score so far and the sum of ``exp(score - greatest)``. When a window
brings a greater score, what was summed before is scaled down to it ("online softmax", arXiv 1805.02867).
"""

from __future__ import annotations

from math import inf

import numpy as np
from numpy.typing import NDArray

from kvpack.fidelity.attention import Doubles

TOP_K = 16
"""The number of most-attended tokens whose overlap is measured."""

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


class OnlineAttention:
    """Attention of rows ``[H, R]`` (key-value heads, and the queries that read each) over the tokens seen so far.

    All arrays are float64. A row whose scores are NaN or +inf has a ``total`` of NaN, and a row without any score
    above -inf has a ``total`` of 0; both mean that its attention is not defined.

    Attributes:
        peak: ``[H, R]``, the greatest score.
        total: ``[H, R]``, the sum of ``exp(score - peak)``.
        sums: ``[H, R, D_v]``, the sum of ``exp(score - peak) * value``. It is NaN in rows that saw a value that is
            not finite.
        best_scores: ``[H, R, K]``, the greatest scores, at most :data:`TOP_K` of them.
        best_tokens: ``[H, R, K]``, the tokens of those scores. Of equal scores the earlier tokens are kept.

    """

    def __init__(self, heads: int, rows: int, value_dims: int) -> None:
        """Start without any tokens."""
        self.peak: Doubles = np.full((heads, rows), -inf)
        self.total: Doubles = np.zeros((heads, rows))
        self.sums: Doubles = np.zeros((heads, rows, value_dims))
        self.best_scores: Doubles = np.empty((heads, rows, 0))
        self.best_tokens: Indices = np.empty((heads, rows, 0), np.int64)

    def copy(self) -> OnlineAttention:
        """The same state, to be continued over other tokens."""
        other = OnlineAttention(0, 0, 0)
        other.peak, other.total, other.sums = self.peak.copy(), self.total.copy(), self.sums.copy()
        other.best_scores, other.best_tokens = self.best_scores.copy(), self.best_tokens.copy()
        return other

    def add(self, first: int, scores: Doubles, values: Doubles, hidden: Mask) -> tuple[Doubles, Doubles]:
        """Take in the next tokens, ``first`` and those that follow it.

        Args:
            first: The index of the window's first token.
            scores: ``[H, R, t]``, the scaled dot products; -inf where the row does not see the token.
            values: ``[H, t, D_v]``.
            hidden: ``[R, t]``, where the row does not see the token.

        Returns:
            ``exp(score - peak)`` of the window ``[H, R, t]``, and the factor ``[H, R]`` by which sums over earlier
            tokens have to be multiplied because the peak rose.

        """
        peak = np.maximum(self.peak, scores.max(-1))
        base = np.where(peak == -inf, 0.0, peak)
        factor = np.exp(self.peak - base)
        weights = scores - base[..., None]
        np.exp(weights, out=weights)
        self.peak, self.total = peak, self.total * factor + weights.sum(-1)
        self.sums *= factor[..., None]
        self.sums += _weigh(weights, values, hidden)
        self._keep_best(first, scores)
        return weights, factor

    def outputs(self) -> Doubles:
        """The attention outputs ``[H, R, D_v]``, not finite where attention is not defined."""
        result: Doubles = self.sums / self.total[..., None]
        return result

    def _keep_best(self, first: int, scores: Doubles) -> None:
        if np.isnan(self.peak).any():
            scores = np.where(np.isnan(scores), -inf, scores)
        tokens = np.broadcast_to(np.arange(first, first + scores.shape[-1]), scores.shape)
        scores, tokens = _greatest(scores, tokens)
        scores = np.concatenate([self.best_scores, scores], axis=-1)
        tokens = np.concatenate([self.best_tokens, tokens], axis=-1)
        self.best_scores, self.best_tokens = _greatest(scores, tokens)


def _weigh(weights: Doubles, values: Doubles, hidden: Mask) -> Doubles:
    """The weighted sums of values ``[H, R, D_v]``; NaN in rows that see a value that is not finite.

    A weight of 0 times NaN would be NaN, so that hidden tokens would spoil rows that do not see them.
    """
    finite = np.isfinite(values)
    if finite.all():
        return weights @ values
    sums: Doubles = weights @ np.where(finite, values, 0.0)
    spoilt = np.any(~finite, axis=-1, keepdims=True).transpose(0, 2, 1)
    sums[(spoilt & ~hidden).any(-1)] = np.nan
    return sums


def _greatest(scores: Doubles, tokens: Indices) -> tuple[Doubles, Indices]:
    """The :data:`TOP_K` greatest of the scores ``[H, R, c]`` without NaN, and their tokens, in the order given.

    Of scores that are equal to the least one kept, the first are kept.
    """
    surplus = scores.shape[-1] - TOP_K
    if surplus <= 0:
        return scores, tokens
    flat = scores.reshape(-1, scores.shape[-1])
    least = np.partition(flat, surplus, axis=-1)[:, surplus, None]
    chosen = flat >= least
    tied = np.flatnonzero(chosen.sum(-1) > TOP_K)
    if tied.size:
        chosen[tied] = _first_of_ties(flat[tied], least[tied])
    chosen = chosen.reshape(scores.shape)
    shape = (*scores.shape[:-1], TOP_K)
    return scores[chosen].reshape(shape), tokens[chosen].reshape(shape)


def _first_of_ties(scores: Doubles, least: Doubles) -> Mask:
    """Which of the scores ``[N, c]`` to keep: all above ``least`` ``[N, 1]``, and the first that equal it."""
    above, ties = scores > least, scores == least
    spare = TOP_K - above.sum(-1, keepdims=True)
    kept: Mask = above | (ties & (ties.cumsum(-1) <= spare))
    return kept

"""What the model's attention would read: rows and outputs at the capture's probe queries.

For a probe query q at position p, attention over the cached tokens 0 … p is softmax(scale · K q) and its output
that row times V. Both are computed from the original and from the reconstructed keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import FormatError
from kvpack.fidelity.reconstruction import finite

Floats = NDArray[np.floating[Any]]

TOP_K = 16
"""How many most-attended tokens the overlap looks at."""


@dataclass(frozen=True)
class Attention:
    """Attention fidelity over query heads and probes, kept so that layers can be merged.

    ``divergences`` holds KL(p ‖ p̂) in nats of every row; ``overlaps`` the sum over rows of the share of the
    top-k tokens that stay; ``error`` and ``energy`` the sums of ‖o - ô‖² and ‖o‖² over outputs.
    """

    divergences: NDArray[np.float64]
    overlaps: float
    error: float
    energy: float

    @property
    def rows(self) -> int:
        """Number of attention rows compared."""
        return len(self.divergences)

    @property
    def kl(self) -> float:
        """Mean KL divergence of attention rows, nats."""
        return float(self.divergences.mean())

    @property
    def kl_p99(self) -> float:
        """99th percentile of the rows' KL divergence, nats."""
        return float(np.quantile(self.divergences, 0.99))

    @property
    def topk_overlap(self) -> float:
        """Mean share of the k most attended tokens that are so in both."""
        return self.overlaps / self.rows

    @property
    def output_error(self) -> float:
        """Relative error of the attention output, sqrt(Σ‖o - ô‖² / Σ‖o‖²)."""
        if self.error == 0:
            return 0.0
        return math.sqrt(self.error / self.energy) if self.energy else math.inf

    def to_json(self) -> dict[str, Any]:
        """Figures; an infinite one is null."""
        return {
            "kl": finite(self.kl),
            "kl_p99": finite(self.kl_p99),
            "topk_overlap": finite(self.topk_overlap),
            "output_error": finite(self.output_error),
        }


def compare_attention(
    queries: Floats,
    positions: NDArray[np.integer[Any]],
    original: tuple[Floats, Floats],
    other: tuple[Floats, Floats],
    scale: float,
) -> Attention | None:
    """Compare attention at probe queries ``[H_q, P, D]`` over keys and values ``[H_kv, T, D]``.

    Query head i reads KV head i // (H_q / H_kv). Returns None where there is nothing to compare.

    Raises:
        FormatError: heads that do not divide, or positions outside the cache.

    """
    heads, tokens, dims = original[0].shape
    if not queries.size or not tokens:
        return None
    if queries.shape[0] % heads or queries.shape[2] != dims or len(positions) != queries.shape[1]:
        raise FormatError(f"queries of shape {queries.shape} do not fit keys of shape {original[0].shape}")
    if positions.min() < 0 or positions.max() >= tokens:
        raise FormatError(f"a probe query's position is outside the cache's {tokens} tokens")
    group = queries.shape[0] // heads
    visible = np.tile(np.arange(tokens)[None, :] <= positions[:, None], (group, 1))
    parts = []
    for head in range(heads):
        rows = queries[head * group : (head + 1) * group].reshape(-1, dims).astype(np.float64) * scale
        pairs = [(keys[head], values[head]) for keys, values in (original, other)]
        parts.append(_compare_head(rows, visible, pairs))
    return merge(parts)


def _compare_head(
    rows: NDArray[np.float64], visible: NDArray[np.bool_], pairs: Sequence[tuple[Floats, Floats]]
) -> Attention:
    """One KV head: scaled queries ``[R, D]``, visibility ``[R, T]``, (keys, values) of both sides."""
    with np.errstate(invalid="ignore", over="ignore"):
        logs = [_log_softmax(np.where(visible, rows @ keys.T.astype(np.float64), -np.inf)) for keys, _ in pairs]
        p, q = np.exp(logs[0]), np.exp(logs[1])
        gaps = np.where(visible, logs[0], 0.0) - np.where(visible, logs[1], 0.0)
        divergences = np.maximum((p * gaps).sum(-1), 0.0)
        outputs = [weights @ values.astype(np.float64) for weights, (_, values) in zip((p, q), pairs, strict=True)]
        error = float(np.square(outputs[0] - outputs[1]).sum())
    return Attention(
        divergences=np.nan_to_num(divergences, nan=np.inf),
        overlaps=_overlap(p, q, visible),
        error=math.inf if math.isnan(error) else error,
        energy=float(np.nan_to_num(np.square(outputs[0])).sum()),
    )


def _log_softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = scores - scores.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _overlap(p: NDArray[np.float64], q: NDArray[np.float64], visible: NDArray[np.bool_]) -> float:
    """Sum over rows of |top-k(p) ∩ top-k(q)| / k, k = min(16, visible tokens)."""
    total = 0.0
    for row in range(len(p)):
        count = int(visible[row].sum())
        k = min(TOP_K, count)
        tops = [set(np.argsort(-side[row, :count], kind="stable")[:k].tolist()) for side in (p, q)]
        total += len(tops[0] & tops[1]) / k
    return total


def merge(parts: Sequence[Attention]) -> Attention:
    """The figures of several heads or layers together."""
    return Attention(
        divergences=np.concatenate([p.divergences for p in parts]),
        overlaps=sum(p.overlaps for p in parts),
        error=sum(p.error for p in parts),
        energy=sum(p.energy for p in parts),
    )

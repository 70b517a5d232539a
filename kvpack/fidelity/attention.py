"""Attention fidelity: what a layer's attention makes of the reconstructed cache, by probe queries.

For a query q at position p, the row of attention is ``softmax(scale * q . k_t)`` over tokens t = 0..p, and
the output is the values' mean under it (arXiv 1706.03762, section 3.2.1; grouped queries: arXiv 2305.13245).
Everything is computed in float64, so that the figures' own noise is near 1e-15.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import FormatError
from kvpack.fidelity.reconstruction import ratio

TOP_K = 16
"""Most-attended tokens whose overlap is measured."""

BLOCK = 1 << 20
"""Attention weights (rows times tokens) held at a time."""

Doubles = NDArray[np.float64]


class Heads(Protocol):
    """Keys or values ``[H_kv, T, D]``: an array, or anything that gives ``[T, D]`` by head."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(H_kv, T, D)``."""

    def __getitem__(self, head: int, /) -> NDArray[Any]:
        """Values ``[T, D]`` of a head."""


@dataclass(frozen=True)
class Attention:
    """Figures over ``rows`` rows of attention (query heads times probes).

    ``kl``: mean KL(p || p^) in nats; ``kl_p99``: its 99th percentile over rows; ``topk_overlap``: mean share
    of the 16 most-attended tokens (fewer where fewer are visible) that stay so; ``energy`` and
    ``error_energy``: sum ||o||^2 and sum ||o - o^||^2 of outputs; ``skipped``: rows left out, not finite in
    the original itself.
    """

    rows: int = 0
    kl: float = 0.0
    kl_p99: float = 0.0
    topk_overlap: float = 1.0
    energy: float = 0.0
    error_energy: float = 0.0
    skipped: int = 0

    @property
    def output_error(self) -> float:
        """Relative L2 error of the attention output, ``sqrt(sum ||o - o^||^2 / sum ||o||^2)``."""
        return sqrt(ratio(self.error_energy, self.energy))

    @classmethod
    def merge(cls, layers: Iterable[Attention]) -> Attention:
        """Over layers: means of ``kl`` and ``topk_overlap``, the largest ``kl_p99``, outputs pooled."""
        parts = [layer for layer in layers if layer.rows]
        if not parts:
            return cls()
        return cls(
            sum(part.rows for part in parts),
            sum(part.kl for part in parts) / len(parts),
            max(part.kl_p99 for part in parts),
            sum(part.topk_overlap for part in parts) / len(parts),
            sum(part.energy for part in parts),
            sum(part.error_energy for part in parts),
            sum(part.skipped for part in parts),
        )


class _Rows(NamedTuple):
    """Per row ``[R]``: KL in nats, top-k overlap, ||o||^2, ||o - o^||^2; rows measured only."""

    kl: Doubles
    overlap: Doubles
    energy: Doubles
    error: Doubles


def measure_attention(
    queries: NDArray[Any],
    positions: NDArray[np.integer[Any]],
    original: tuple[Heads, Heads],
    other: tuple[Heads, Heads],
    scale: float,
) -> Attention:
    """Attention over ``original`` against attention over ``other``, each ``(keys, values)`` of one layer.

    Args:
        queries: ``[H_q, P, D]`` floats, after RoPE; query head h reads key-value head ``h // (H_q / H_kv)``.
        positions: ``[P]``; the query at position p sees tokens 0 to p inclusive.
        original: keys ``[H_kv, T, D]`` and values ``[H_kv, T, D_v]``.
        other: the same, reconstructed. Passing the very same object says that it is exact.
        scale: factor of the dot products.

    Rows that are not finite in the original are left out and counted; rows that only ``other`` makes
    non-finite have infinite KL and output error and no overlap.

    Raises:
        FormatError: shapes or positions that do not fit.

    """
    _check_shapes(queries, positions, original, other)
    heads = original[0].shape[0]
    if not queries.shape[0] or not queries.shape[1]:
        return Attention()
    group = queries.shape[0] // heads
    seen = int(positions.max()) + 1
    order = np.tile(positions, group).astype(np.int64)
    blocks: list[_Rows] = []
    for head in range(heads):
        rows = queries[head * group : (head + 1) * group].reshape(order.size, -1) * np.float64(scale)
        k, v = (_doubles(part[head][:seen]) for part in original)
        k_hat = k if other[0] is original[0] else _doubles(other[0][head][:seen])
        v_hat = v if other[1] is original[1] else _doubles(other[1][head][:seen])
        step = max(1, BLOCK // seen)
        for first in range(0, order.size, step):
            cut = slice(first, first + step)
            blocks.append(_measure_rows(rows[cut], order[cut], (k, v), (k_hat, v_hat)))
    columns = (np.concatenate(column) for column in zip(*blocks, strict=True))
    return _summarise(_Rows(*columns), heads * order.size)


def _doubles(values: NDArray[Any]) -> Doubles:
    return values.astype(np.float64)


def _measure_rows(
    queries: Doubles,
    positions: NDArray[np.int64],
    original: tuple[Doubles, Doubles],
    other: tuple[Doubles, Doubles],
) -> _Rows:
    """Rows ``[R, D]`` of scaled queries against one head's keys ``[T, D]`` and values ``[T, D_v]``."""
    hidden = np.arange(len(original[0])) > positions[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        log_p = _log_softmax(queries, original[0], hidden)
        log_q = log_p if other[0] is original[0] else _log_softmax(queries, other[0], hidden)
        p = np.exp(log_p)
        outputs = p @ original[1]
        exact = log_q is log_p and other[1] is original[1]
        outputs_hat = outputs if exact else np.exp(log_q) @ other[1]
        gaps = np.subtract(log_p, log_q, out=np.zeros_like(p), where=p > 0)
        kl = np.maximum(np.einsum("rt,rt->r", p, gaps), 0.0)
        energy, error = (outputs**2).sum(axis=1), ((outputs - outputs_hat) ** 2).sum(axis=1)
    measured = np.isfinite(energy) & np.isfinite(p.sum(axis=1))
    lost = ~np.isfinite(error) | ~np.isfinite(log_q.max(axis=1))
    overlap = np.where(lost, 0.0, _overlap(log_p, log_q, positions))
    kl, error = np.where(lost, inf, kl), np.where(lost, inf, error)
    return _Rows(kl[measured], overlap[measured], energy[measured], error[measured])


def _log_softmax(queries: Doubles, keys: Doubles, hidden: NDArray[np.bool_]) -> Doubles:
    """Log of attention ``[R, T]``: -inf where hidden."""
    logits: Doubles = queries @ keys.T
    logits[hidden] = -inf
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def _overlap(log_p: Doubles, log_q: Doubles, positions: NDArray[np.int64]) -> Doubles:
    """Share ``[R]`` of each row's top k tokens in common; where no more than k are visible, all are."""
    result = np.ones(len(log_p))
    many = np.flatnonzero(positions >= TOP_K)
    if log_q is log_p or not many.size:
        return result
    top_p, top_q = (np.argpartition(rows[many], -TOP_K, axis=1)[:, -TOP_K:] for rows in (log_p, log_q))
    result[many] = (top_p[:, :, None] == top_q[:, None, :]).sum(axis=(1, 2)) / TOP_K
    return result


def _summarise(rows: _Rows, asked: int) -> Attention:
    measured = rows.kl.size
    if not measured:
        return Attention(skipped=asked)
    return Attention(
        measured,
        float(rows.kl.mean()),
        float(np.quantile(rows.kl, 0.99, method="higher")),
        float(rows.overlap.mean()),
        float(rows.energy.sum()),
        float(rows.error.sum()),
        asked - measured,
    )


def _check_shapes(
    queries: NDArray[Any],
    positions: NDArray[Any],
    original: tuple[Heads, Heads],
    other: tuple[Heads, Heads],
) -> None:
    keys, values = (part.shape for part in original)
    if (keys, values) != tuple(part.shape for part in other):
        raise FormatError("original and reconstructed keys or values differ in shape")
    if len(keys) != 3 or len(values) != 3 or keys[:2] != values[:2]:
        raise FormatError(f"keys {list(keys)} and values {list(values)} are not of the same heads and tokens")
    if queries.ndim != 3 or queries.shape[2] != keys[2]:
        raise FormatError(f"queries {list(queries.shape)} do not fit keys {list(keys)}: head_dim differs")
    if (queries.shape[0] % keys[0]) if keys[0] else queries.shape[0]:
        raise FormatError(f"{queries.shape[0]} query heads are not a multiple of {keys[0]} key-value heads")
    if positions.shape != (queries.shape[1],):
        shape = list(positions.shape)
        raise FormatError(f"{queries.shape[1]} probe queries a head, but query positions of shape {shape}")
    if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < keys[1]:
        low, high = int(positions.min()), int(positions.max())
        raise FormatError(f"query positions {low} to {high} are not within the cache's {keys[1]} tokens")

"""Records probe queries after RoPE, and how much attention mass each cached token receives.

It is registered with transformers as an attention implementation that records and then calls the standard SDPA.
Therefore it works for every architecture that uses ``AttentionInterface``, and it changes no result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

_active: list[Probe] = []


@dataclass
class Probe:
    """What to record, and what was recorded, over all forward passes of a capture.

    Attributes:
        positions: token positions of the probe queries, ascending.
        total: number of tokens that the cache will hold.
        window: number of last queries that count for the attention mass.
        queries: recorded queries of each layer, in pieces ``[H_q, N, D]``.
        mass: attention mass of each layer, ``[H_kv, total]`` float64.
        scales: attention scale of each layer.
        key_shapes: last shape of each layer's keys, ``(H_kv, T, D)``.

    """

    positions: list[int]
    total: int
    window: int
    queries: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    mass: dict[int, torch.Tensor] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)
    key_shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def record(self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """Record one call of attention.

        ``query`` ``[1, H_q, Q, D]`` are the queries of the last Q positions of ``key`` ``[1, H_kv, T, D]``.
        """
        held, count = key.shape[-2], query.shape[-2]
        first = held - count
        self.scales[layer] = scale
        self.key_shapes[layer] = tuple(key.shape[1:])
        rows = [p - first for p in self.positions if first <= p < held]
        self.queries.setdefault(layer, []).append(query[0][:, rows].cpu())
        start = max(first, self.total - self.window)
        if start < held:
            self._add_mass(layer, query[0][:, start - first :], key[0], start, scale)

    def _add_mass(self, layer: int, query: torch.Tensor, key: torch.Tensor, start: int, scale: float) -> None:
        """Add p * (1 - p) of the queries ``[H_q, Q, D]``, whose first has position ``start``, one KV head at a time.

        Here, p is the attention probability of a cached token.
        """
        heads, held, _ = key.shape
        grouped = query.reshape(heads, -1, *query.shape[1:])
        mass = self.mass.setdefault(layer, torch.zeros(heads, self.total, dtype=torch.float64))
        hidden = torch.arange(held)[None, :] > torch.arange(start, held)[:, None]
        for head in range(heads):
            scores = (grouped[head].float() @ key[head].float().T) * scale
            p = scores.masked_fill(hidden.to(scores.device), -torch.inf).softmax(-1)
            mass[head, :held] += (p * (1 - p)).sum((0, 1)).double().cpu()


@contextmanager
def listening(probe: Probe) -> Iterator[None]:
    """Record into ``probe`` during the ``with`` block."""
    _active.append(probe)
    try:
        yield
    finally:
        _active.remove(probe)


def register(name: str) -> None:
    """Register the recording attention with transformers under ``name``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> Any:
        for probe in _active:
            scale = options.get("scaling")
            probe.record(module.layer_idx, query, key, query.shape[-1] ** -0.5 if scale is None else float(scale))
        return stock(module, query, key, value, mask, **options)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

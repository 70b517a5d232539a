"""Estimates the Fisher information of a model's predictions with respect to its cache, by back-propagation.

For a small error d of the cache, KL(p || p^) = d' F d / 2 to second order, with F = E[g g'] and g = J' v. Here, J is
the Jacobian of the logits, and v has the covariance diag(p) - p p' of e_y - p for y ~ p (Martens, arXiv 1412.1193,
section 9.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from kvpack.calibration.corpus import SKIPPED, Sample
from kvpack.calibration.rotary import rotated
from kvpack.capture import Model

RECENT = 64
"""Number of last tokens that the average omits, besides the first ``SKIPPED``; their gradients would dominate it."""

SINK = 100.0

TEMPER, FLOOR = 0.5, 0.03
"""Exponent that reduces the weight of tokens with large gradients, and a bound for those with small gradients.

A token's share of the average is proportional to its gradient energy to the power ``1 - TEMPER``. Few tokens have most
of the gradient, and the stage ``dead_zone`` gives them finer steps anyway. ``FLOOR``, relative to the mean energy, is
added to a token's energy before the power is taken.
"""

JUDGED = 256
"""Number of tokens of a continuation; it is at most an eighth of the sequence."""

DIRECTIONS = 2
"""Number of random directions per continuation."""

PLAIN, REPEAT = "plain", "repeat"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Continuation:
    """Text that the model predicts after a cache of ``cached`` tokens.

    The model is fed the cache's last token ``last`` again, and then predicts ``labels``. ``kind`` is ``plain`` or
    ``repeat``.
    """

    kind: str
    cached: int
    last: int
    labels: NDArray[np.int32]


def continuations(tokens: NDArray[np.int32], seed: int) -> Iterator[Continuation]:
    """Yield two continuations of the cached part of ``tokens`` ``[T]``.

    The first is the rest of the sequence, the second a repeated passage of the cached part from a random position.
    """
    judged = min(JUDGED, len(tokens) // 8)
    cached = len(tokens) - judged
    yield Continuation(PLAIN, cached, int(tokens[cached - 1]), tokens[cached:])
    random = np.random.Generator(np.random.PCG64(seed))
    start = int(random.integers(min(SKIPPED, cached - judged), cached - judged + 1))
    yield Continuation(REPEAT, cached, int(tokens[cached - 1]), tokens[start : start + judged])


class Network:
    """A model that takes its cache as rows ``[T, 2 * L * H * D]``: all layers' keys before RoPE, then all values."""

    def __init__(self, model: Model, sample: Sample) -> None:
        """Use the layers and RoPE frequencies of ``sample``; the model's parameters get no gradients."""
        self._model, self.layers = model, sample.layers
        self.device, self.dtype = model.network.device, model.network.dtype
        for parameter in model.network.parameters():
            parameter.requires_grad_(False)
        config = model.config
        self.heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._frequencies = sample.frequencies

    def logits(self, rows: torch.Tensor, follow: Continuation) -> torch.Tensor:
        """Return float32 logits ``[N, V]`` of the continuation after the first ``cached - 1`` of ``rows``."""
        held = follow.cached - 1
        split = rows[:held].reshape(held, 2, self.layers, self.heads, -1).permute(1, 2, 3, 0, 4)
        keys, values = rotated(split[0], self._frequencies, 1).to(self.dtype), split[1].to(self.dtype)
        cache = DynamicCache(config=self._model.network.config)
        for layer in range(self.layers):
            cache.update(keys[layer][None], values[layer][None], layer)
        fed = torch.tensor([[follow.last, *follow.labels[:-1].tolist()]], device=self.device)
        return self._model.logits(fed, cache)[0].float()

    def gradients(self, rows: torch.Tensor, follow: Continuation, seed: int) -> Iterator[torch.Tensor]:
        """Yield :data:`DIRECTIONS` gradients g, ``[cached - 1, 2 * L * H * D]``; the expectation of g g' is F."""
        leaf = rows[: follow.cached - 1].clone().requires_grad_(True)
        logits = self.logits(leaf, follow)
        p = logits.detach().softmax(-1)
        random = torch.Generator().manual_seed(seed)
        for left in reversed(range(DIRECTIONS)):
            noise = torch.randn(p.shape, generator=random).to(p.device) * p.sqrt()
            direction = noise - p * noise.sum(-1, keepdim=True)
            (gradient,) = torch.autograd.grad((logits * direction).sum(), leaf, retain_graph=left > 0)
            yield gradient.float()


def fisher(
    network: Network, sample: Sample, sequences: list[int], plain_share: float, progress: Progress | None = None
) -> tuple[torch.Tensor, int]:
    """Return F for each head of all layers' keys and then values, ``[2 * L * H, D, D]``, and the number of sinks.

    F is a tempered mean over tokens. Sinks are the leading tokens up to the last of the first :data:`SKIPPED` tokens
    whose gradient has more than :data:`SINK` times the mean energy of the other tokens.

    ``plain_share`` is the weight of plain continuations. Repeated passages, from which the model must retrieve, have
    the remaining weight. Both are summed over the positions of the continuation.
    """
    total: torch.Tensor | None = None
    leading, mean = torch.zeros(SKIPPED, device=network.device), 0.0
    for i, s in enumerate(sequences):
        rows = rows_of(sample, s, network.device)
        blocks, dims = 2 * network.layers * network.heads, rows.shape[1] // (2 * network.layers * network.heads)
        for follow in continuations(sample.tokens[s], s):
            weight = plain_share if follow.kind == PLAIN else 1 - plain_share
            if weight <= 0:
                continue
            found = list(network.gradients(rows, follow, s))
            leading += sum(gradient[:SKIPPED].square().sum(1) for gradient in found)
            middle = torch.stack([gradient[SKIPPED : max(len(gradient) - RECENT, SKIPPED + 1)] for gradient in found])
            energy = middle.square().sum(2).mean(0)
            mean += float(energy.mean()) * len(found)
            calm = (energy / energy.mean().clamp_min(1e-30) + FLOOR) ** (-TEMPER / 2)
            split = (middle * calm[:, None]).reshape(-1, blocks, dims).transpose(0, 1)
            mine = torch.bmm(split.transpose(1, 2), split) * (weight / middle.shape[1])
            total = mine if total is None else total + mine
        if progress:
            progress(i + 1, len(sequences))
    assert total is not None
    loud = torch.nonzero(leading > SINK * mean)
    return total / (len(sequences) * DIRECTIONS), int(loud.max()) + 1 if len(loud) else 0


def rows_of(sample: Sample, sequence: int, device: torch.device | str) -> torch.Tensor:
    """Return the rows ``[T, P]`` float32 of a sequence: all layers' keys before RoPE, then all values."""
    return torch.from_numpy(sample.both[sequence]).to(device).float()

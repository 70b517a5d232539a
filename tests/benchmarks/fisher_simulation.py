"""The codec ``fisher`` in simulation, on one device: what it learns from, its transform and its prediction.

As in :mod:`kvpack.calibration`, but in floats, with every choice of the codec open: ``fisher_ablations.py`` has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from kvpack.calibration.corpus import SKIPPED, Sample
from kvpack.calibration.gradients import (
    DIRECTIONS,
    FLOOR,
    PLAIN,
    RECENT,
    REPEAT,
    SINK,
    Continuation,
    Network,
    continuations,
)
from kvpack.calibration.prediction import REACH, RIDGE, embedded, embeddings
from kvpack.calibration.prediction import _token_vectors as token_vectors
from kvpack.calibration.rotary import inverse_frequencies, rotated
from kvpack.calibration.run import PLAIN_SHARE
from kvpack.calibration.token_klt import Whitened, leading_directions
from kvpack.capture import CaptureOptions, Model, prefill, run_tokens
from kvpack.codecs.chain.base import Floats
from kvpack.codecs.chain.transforms.token_klt.model import DECAYS, LAGS, places

JUDGED = 256
BASIS_TOKENS = 131072
GRADIENTS = 64
"""Sequences that F is measured on; of their gradients one in :data:`KEPT` is kept whole."""

KEPT = 16
TEMPERS = (0.0, 0.35, 0.5, 0.65, 1.0)

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Document:
    """A judged document: rows ``[T, P]``, and continuations with the model's exact log-probabilities."""

    rows: torch.Tensor
    ids: torch.Tensor
    mass: Floats
    tests: list[tuple[Continuation, torch.Tensor]]


@dataclass(frozen=True)
class Material:
    """S sequences of T tokens, ``rows`` ``[S, T, P]`` fp16 on the device, and judged documents.

    ``mass`` has the attention mass ``[T]`` of each sequence held back, ``scale`` is what ranks are multiplied by.
    """

    model: Model
    network: Network
    table: torch.Tensor
    tokens: NDArray[np.int32]
    ids: torch.Tensor
    rows: torch.Tensor
    mass: dict[int, Floats]
    judged: list[Document]
    scale: float

    @property
    def learnt(self) -> list[int]:
        """Sequences that are not held back."""
        return [s for s in range(len(self.tokens)) if s not in self.mass]

    @cached_property
    def known(self) -> Information:
        """Measured once."""
        return information(self)

    def scaled(self, count: int) -> int:
        """A rank or another count, scaled."""
        return max(1, round(count * self.scale))

    def centred(self, sequence: int, mean: torch.Tensor) -> torch.Tensor:
        """``[T - SKIPPED, P]`` of a sequence."""
        return self.rows[sequence].float()[SKIPPED:] - mean[-1]


def material(model: Model, folder: Path, captures: list[Path], count: int, context: int, scale: float) -> Material:
    """At most ``count`` sequences of the texts in ``folder``, run by the model."""
    device = model.network.device
    tokens = sequences(model, folder, count, context)
    ids = torch.from_numpy(tokens).long().to(device)
    frequencies = inverse_frequencies(model)
    rows = torch.empty(0)
    for s, one in enumerate(tokens.tolist()):
        found = run(model, one, frequencies)
        if s == 0:
            rows = torch.empty(len(tokens), *found.shape, dtype=torch.float16, device=device)
        rows[s] = found
    layers = model.config.num_hidden_layers
    sample = Sample(np.empty((0, 0, 0), np.float16), tokens, {}, layers, rows.shape[2] // (2 * layers), frequencies, [])
    network, table = Network(model, sample), embeddings(model.network, sample, device)
    held = list(range(4, len(tokens), 40))[:24] or [0]
    options = CaptureOptions(queries=0)
    mass = {s: run_tokens(model, tokens[s].tolist(), options).attention_mass.float().mean((0, 1)).numpy() for s in held}
    judged = [document(model, network, frequencies, path) for path in captures]
    return Material(model, network, table, tokens, ids, rows, mass, judged, scale)


def sequences(model: Model, folder: Path, count: int, context: int) -> NDArray[np.int32]:
    """``[S, T]`` token ids, of the calibration texts of ``documents.py``; at random where more than ``count``."""
    found: list[list[int]] = []
    for path in sorted(folder.glob("calibration-*.txt")):
        ids = model.tokenizer(path.read_text()).input_ids
        mine = len(ids) // context
        stride = len(ids) // max(mine, 1)
        found += [ids[i * stride : i * stride + context] for i in range(mine)]
    chosen = np.sort(np.random.default_rng(0).permutation(len(found))[:count])
    return np.array(found, np.int32)[chosen]


def run(model: Model, ids: list[int], frequencies: Floats) -> torch.Tensor:
    """``[T, P]`` fp16: all layers' keys before RoPE, then values."""
    keys, values = (torch.stack(kind).float() for kind in prefill(model, ids))
    flat = torch.cat([rotated(keys, frequencies, -1), values]).permute(2, 0, 1, 3)
    return flat.reshape(len(ids), -1).half()


def document(model: Model, network: Network, frequencies: Floats, path: Path) -> Document:
    """From a capture; judged by its text's continuation, and by a passage from a third of it on."""
    with safe_open(path, "pt") as file:
        tokens, follow = (file.get_tensor(name).numpy() for name in ("tokens", "continuation"))
        mass = file.get_tensor("attention_mass").float().mean((0, 1)).numpy()
    rows = run(model, tokens.tolist(), frequencies).float()
    third, tests = len(tokens) // 3, []
    for kind, labels in ((PLAIN, follow[:JUDGED]), (REPEAT, tokens[third : third + JUDGED])):
        test = Continuation(kind, len(tokens), int(tokens[-1]), labels)
        with torch.inference_mode():
            tests.append((test, network.logits(rows, test).log_softmax(-1)))
    return Document(rows, torch.from_numpy(tokens).long().to(rows.device), mass, tests)


@dataclass(frozen=True)
class Information:
    """F ``[B, D, D]`` tempered by each of :data:`TEMPERS`, from half of the sequences, sinks, and whole gradients
    ``[N, P]``, scaled so that their mean of g g' is F.
    """

    tempered: dict[float, torch.Tensor]
    half: torch.Tensor
    sinks: int
    gradients: torch.Tensor

    def alike(self, temper: float) -> torch.Tensor:
        """A tempered F that has the mean diagonal of the plain one."""
        mine, plain = (f.diagonal(dim1=1, dim2=2).mean() for f in (self.tempered[temper], self.tempered[0.0]))
        return self.tempered[temper] * (plain / mine)


def information(data: Material) -> Information:
    """F of :func:`kvpack.calibration.gradients.fisher`, of several tempers at once."""
    chosen = data.learnt[:: max(1, len(data.learnt) // GRADIENTS)][:GRADIENTS]
    network, device = data.network, data.rows.device
    blocks, dims = 2 * network.layers * network.heads, data.rows.shape[2] // (2 * network.layers * network.heads)
    totals = {temper: torch.zeros(blocks, dims, dims, device=device) for temper in TEMPERS}
    half, leading, mean = totals[0.0].clone(), torch.zeros(SKIPPED, device=device), 0.0
    kept, random = [], torch.Generator().manual_seed(1)
    for i, s in enumerate(chosen):
        for follow in continuations(data.tokens[s], s):
            weight = PLAIN_SHARE if follow.kind == PLAIN else 1 - PLAIN_SHARE
            found = torch.stack(list(network.gradients(data.rows[s].float(), follow, s)))
            leading += found[:, :SKIPPED].square().sum((0, 2))
            found = found[:, SKIPPED:-RECENT]
            energy = found.square().sum(2).mean(0)
            mean += float(energy.mean()) * DIRECTIONS
            energy = energy / energy.mean() + FLOOR
            for temper in TEMPERS:
                calm = (found * energy.pow(-temper / 2)[:, None]).reshape(DIRECTIONS, -1, blocks, dims)
                totals[temper] += torch.einsum("stbd,stbe->bde", calm, calm) * (weight / len(energy))
            for gradient in found:
                some = torch.randperm(len(gradient), generator=random)[: len(gradient) // KEPT].to(device)
                kept.append((gradient[some] * math.sqrt(2 * weight)).bfloat16())
        if i == max(len(chosen) // 2 - 1, 0):
            half = totals[0.0] / ((i + 1) * DIRECTIONS)
    loud = torch.nonzero(leading > SINK * mean)
    tempered = {temper: total / (len(chosen) * DIRECTIONS) for temper, total in totals.items()}
    return Information(tempered, half, int(loud.max()) + 1 if len(loud) else 0, torch.cat(kept))


@dataclass(frozen=True)
class Codec:
    """Coordinates are ``(x - mean) @ analysis`` less their prediction; ``common`` of them are not local.

    ``vectors`` ``[V, E]`` of token ids; ``units`` ``[I, H]`` and what goes over them; ``weights`` ``[I + H, R]``.
    """

    white: Whitened
    vectors: torch.Tensor
    analysis: torch.Tensor
    synthesis: torch.Tensor
    weights: torch.Tensor
    common: int
    units: torch.Tensor | None = None
    activation: Callable[[torch.Tensor], torch.Tensor] = field(default=torch.relu)
    note: str = ""

    @property
    def sinks(self) -> int:
        """Leading tokens that are their means."""
        return len(self.white.mean) - 1

    def means(self, count: int) -> torch.Tensor:
        """Of each of the first ``count`` tokens: ``[T, P]``."""
        return self.white.mean[torch.arange(count, device=self.weights.device).clamp_max(self.sinks)]

    def inputs(self, ids: torch.Tensor, start: int = SKIPPED) -> torch.Tensor:
        """What token ids tell of each from ``start`` on: ``[T - start, I]``."""
        return inputs(self.vectors[ids], start)

    def predicted(self, ids: torch.Tensor) -> torch.Tensor:
        """``[T - sinks, R]``."""
        found = self.inputs(ids, self.sinks)
        if self.units is not None:
            found = torch.cat([found, self.activation(found @ self.units)], 1)
        return found @ self.weights

    def coordinates(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Of rows ``[T, P]``: ``[T, R]``."""
        found = (rows - self.means(len(rows))) @ self.analysis
        found[self.sinks :] -= self.predicted(ids)
        found[: self.sinks] = 0
        return found

    def back(self, coordinates: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The inverse."""
        found = coordinates.clone()
        found[self.sinks :] += self.predicted(ids)
        return found @ self.synthesis + self.means(len(found))


def inputs(vectors: torch.Tensor, start: int) -> torch.Tensor:
    """:func:`kvpack.codecs.chain.transforms.token_klt.model.token_inputs` on a device."""
    short, count = vectors[:, :REACH], len(vectors)
    blank = torch.zeros_like(short)
    behind = [torch.cat([blank[:lag], short[: count - lag]])[start:] for lag in range(1, LAGS + 1)]
    means = (_decaying(count, vectors.device) @ short)[:, start:]
    place = torch.from_numpy(places(start, count)).to(vectors.device)
    return torch.cat([vectors[start:], *behind, *means, place], 1)


@lru_cache(maxsize=2)
def _decaying(count: int, device: torch.device) -> torch.Tensor:
    """Weights ``[len(DECAYS), T, T]`` of each token's past."""
    place = torch.arange(count, device=device)
    lag = (place[:, None] - 1 - place[None]).float()
    every = torch.stack([torch.where(lag >= 0, decay ** lag.clamp_min(0), 0.0) for decay in DECAYS])
    return every / every.sum(2, keepdim=True).clamp_min(1e-9)


def regression(pairs: Iterable[Pair], ridge: float = RIDGE) -> torch.Tensor:
    """As :class:`kvpack.calibration.prediction.Ridge`, of any ridge."""
    gram = cross = torch.zeros(())
    for given, wanted in pairs:
        gram, cross = gram.to(given.device) + given.T @ given, cross.to(given.device) + given.T @ wanted
    gram = gram.double()
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    return torch.linalg.solve(gram, cross.double()).float()


def root(fisher: torch.Tensor, damping: float) -> torch.Tensor:
    """The symmetric square root of blocks ``[B, D, D]``, damped."""
    scale = fisher.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]
    values, vectors = torch.linalg.eigh(fisher.double() / scale + damping * torch.eye(fisher.shape[1]).to(scale))
    found = (vectors * values.clamp_min(damping / 2).sqrt()[:, None]) @ vectors.transpose(1, 2)
    return found.float() * scale.sqrt()


def whole_root(known: Information, shrink: float) -> torch.Tensor:
    """The root ``[1, P, P]`` of F between all elements, drawn towards its blocks by ``shrink``."""
    blocks = known.tempered[0.0]
    whole = (known.gradients.float().T @ known.gradients.float()) * ((1 - shrink) / len(known.gradients))
    whole += shrink * torch.block_diag(*blocks)
    whole.diagonal().add_(0.01 * blocks.diagonal(dim1=1, dim2=2).mean(1).repeat_interleave(blocks.shape[1]))
    values, vectors = torch.linalg.eigh(whole)
    return ((vectors * values.clamp_min(1e-12).sqrt()) @ vectors.T)[None]


def learn(data: Material, sequences: list[int], whiten: torch.Tensor, sinks: int, rank: int, own: bool) -> Codec:
    """``rank`` leading directions of what token ids leave; if ``own``, those that a token's own embedding predicts."""
    mean = torch.zeros(sinks + 1, data.rows.shape[2], dtype=torch.float64, device=data.rows.device)
    for s in sequences:
        rows = data.rows[s].double()
        mean += torch.cat([rows[:sinks], rows[SKIPPED:].mean(0, keepdim=True)]) / len(sequences)
    white = Whitened(mean.half().float(), whiten)

    def pair(s: int) -> Pair:
        return embedded(data.table, data.tokens[s]), white.whitened(data.centred(s, white.mean))

    weights = regression(map(pair, sequences))
    width = data.table.shape[1]
    span = _leading(data, sequences, pair, weights, data.scaled(rank))
    if own:
        told = torch.linalg.qr(weights[:width].T).Q[:, : data.scaled(width)]
        span = torch.linalg.qr(torch.cat([span, told], 1)).Q
    vectors = token_vectors(data.tokens[sequences], data.table, weights[:width])
    codec = Codec(white, vectors, white.whitened(span.T).T, white.unwhitened(span.T), weights, span.shape[1])
    return fitted(data, codec, sequences, turn=True)


def _leading(
    data: Material,
    sequences: list[int],
    pair: Callable[[int], Pair],
    weights: torch.Tensor,
    rank: int,
) -> torch.Tensor:
    """``[P, R]`` of what ``weights`` leave."""

    def left(s: int) -> torch.Tensor:
        given, wanted = pair(s)
        return wanted - given @ weights

    device = weights.device
    narrow = torch.bfloat16 if device.type == "cuda" else torch.float32
    stride = max(1, len(sequences) * data.tokens.shape[1] // BASIS_TOKENS)
    unit = torch.stack([left(s).square().mean() for s in sequences[:8]]).mean().sqrt()
    rest = [(left(s)[s % stride :: stride] / unit).to(narrow) for s in sequences]

    def spread(basis: torch.Tensor) -> torch.Tensor:
        total, short = torch.zeros_like(basis), basis.to(narrow)
        for rows in rest:
            total += (rows.T @ (rows @ short)).float()
        return total

    return leading_directions(spread, data.rows.shape[2], rank, device)[0]


def targets(data: Material, codec: Codec, sequences: Iterable[int], columns: int | None = None) -> Iterator[Pair]:
    """Of each sequence what its coordinates are predicted from, ``[T - SKIPPED, I]``, and they, ``[.., R]``."""
    analysis = codec.analysis[:, :columns].contiguous()
    for s in sequences:
        yield codec.inputs(data.ids[s]), data.centred(s, codec.white.mean) @ analysis


def fitted(data: Material, codec: Codec, sequences: list[int], turn: bool = False) -> Codec:
    """The codec with a linear prediction of its coordinates; if ``turn``, with principal axes of what that leaves."""
    weights = regression(targets(data, codec, sequences))
    codec = replace(codec, weights=weights, units=None)
    if not turn:
        return codec
    axes = torch.linalg.eigh(residual(data, codec, sequences)).eigenvectors.flip(1).float()
    return replace(
        codec, analysis=codec.analysis @ axes, synthesis=axes.T @ codec.synthesis, weights=codec.weights @ axes
    )


def residual(data: Material, codec: Codec, sequences: list[int]) -> torch.Tensor:
    """Covariance ``[R, R]`` of what a linear prediction leaves, float64."""
    total, count = torch.zeros((), dtype=torch.float64, device=codec.weights.device), 0
    for given, wanted in targets(data, codec, sequences):
        left = wanted - given @ codec.weights
        total, count = total + (left.T @ left).double(), count + len(left)
    return total / count

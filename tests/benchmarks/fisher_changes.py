"""What ``fisher_ablations.py`` does to a learnt codec: another metric, rounding, local directions, units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from fisher_simulation import Codec, Material, fitted, regression, residual, targets

from kvpack.calibration.corpus import SKIPPED
from kvpack.calibration.prediction import RATE
from kvpack.calibration.token_klt import leading_directions

HARM_DAMPING, HARM_TEMPER = 0.1, 0.5
REFERENCE_POWER = 2.0 ** (-234 / 16)
"""Of a step, squared: what errors of a prediction are held against."""

AT_ONCE = 3
"""Sequences of a step of descent."""

UNITS_RIDGE = 1e-5

Activation = Callable[[torch.Tensor], torch.Tensor]
Change = Callable[[Material, Codec], Codec]


@dataclass(frozen=True)
class Rounding:
    """Of an element's share in a direction that deviates by 1, in standard deviations of the element over the harm that
    rounding does in its block to the power ``power / 2``.
    """

    step: float
    power: float = 0.0

    def unit(self, data: Material) -> torch.Tensor:
        """What shares ``[P]`` are counted in."""
        variance = torch.stack([data.rows[s][SKIPPED:].float().var(0) for s in data.learnt[::8]]).mean(0)
        weights = data.known.tempered[HARM_TEMPER].diagonal(dim1=1, dim2=2)
        weights = weights + HARM_DAMPING * weights.mean(1, keepdim=True)
        harm = (variance.reshape(weights.shape) * weights).mean(1)
        relative = (harm / harm.log().mean().exp()) ** (self.power / 2)
        return variance.sqrt() / relative.repeat_interleave(weights.shape[1])

    def steps(self, shares: torch.Tensor, deviations: torch.Tensor) -> torch.Tensor:
        """Of columns ``[1, R]``, the finer the more goes along them."""
        return torch.maximum(self.step / deviations, shares.abs().amax(0) / 127)[None]


def remetric(data: Material, codec: Codec, shrink: float) -> Codec:
    """Coordinates whose squared error is harm by the whole of F within the span, drawn to its mean by ``shrink``."""
    along = codec.synthesis @ data.known.gradients.float().T
    metric = (along @ along.T / along.shape[1]).double()
    metric = (1 - shrink) * metric + shrink * metric.diagonal().mean() * torch.eye(len(metric)).to(metric)
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(1e-30).sqrt()
    there, back = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
    axes = torch.linalg.eigh(there @ residual(data, codec, data.learnt[::4]) @ there).eigenvectors.flip(1)
    to, fro = (there @ axes).float(), (axes.T @ back).float()
    return replace(codec, analysis=codec.analysis @ to, synthesis=fro @ codec.synthesis, weights=codec.weights @ to)


def _megabytes(integers: torch.Tensor, columns: int = 64) -> float:
    """By their order-0 entropy in each so many columns."""
    bits = 0.0
    for some in integers.split(columns, 1):
        counts = torch.bincount((some + 128).long().flatten()).double()
        bits -= float((counts * (counts / counts.sum()).clamp_min(1e-12).log2()).sum())
    return bits / 8e6


def _dual(codec: Codec, synthesis: torch.Tensor) -> torch.Tensor:
    """:func:`kvpack.codecs.chain.transforms.token_klt.model.dual` on a device."""
    white = codec.white.whitened(synthesis).T
    gram = white.T.double() @ white.double()
    gram += (1e-10 * gram.diagonal().mean() + 1e-30) * torch.eye(len(gram)).to(gram)
    return codec.white.whitened((white @ torch.linalg.inv(gram).float()).T).T


def rounded(data: Material, codec: Codec, rounding: Rounding) -> Codec:
    """The basis as a profile would have it, and the prediction for that."""
    squares = [wanted.square().mean(0) for _, wanted in targets(data, codec, data.learnt[::8])]
    unit = rounding.unit(data)
    shares = (codec.synthesis / unit).T
    steps = rounding.steps(shares, torch.stack(squares).mean(0).sqrt())
    integers = (shares / steps).round()
    synthesis = ((integers * steps) * unit[:, None]).T
    note = f"basis {_megabytes(integers):.2f} MB"
    return refitted(data, replace(codec, analysis=_dual(codec, synthesis), synthesis=synthesis, note=note))


def refitted(data: Material, codec: Codec) -> Codec:
    """With a prediction for the basis that it has now."""
    return fitted(data, codec, data.learnt[::3])


def local(data: Material, codec: Codec, groups: int, count: int, rounding: Rounding | None = None) -> Codec:
    """Directions besides, of ``groups`` groups of layers, for what the common ones leave: ``count`` of each."""
    cells = _cells(data, groups)
    return _joined(data, codec, cells, _axes(data, codec, cells, count), rounding)


def local_of_all(data: Material, codec: Codec, groups: int, count: int) -> Codec:
    """As :func:`local`, but the ``count`` leading ones of all groups."""
    cells = _cells(data, groups)
    found = _axes(data, codec, cells, count)
    least = torch.cat([values for _, values in found]).sort(descending=True).values[: data.scaled(count)][-1]
    return _joined(data, codec, cells, [(v[:, s >= least], s[s >= least]) for v, s in found], None)


def _cells(data: Material, groups: int) -> list[torch.Tensor]:
    """Elements of each group's keys and values."""
    layers, half = data.network.layers, data.rows.shape[2] // 2
    groups, each = min(groups, layers), half // layers
    bounds = [(g * layers // groups * each, (g + 1) * layers // groups * each) for g in range(groups)]
    device = data.rows.device
    return [torch.cat([torch.arange(a, b), half + torch.arange(a, b)]).to(device) for a, b in bounds]


Axes = list[tuple[torch.Tensor, torch.Tensor]]
"""Of each group directions ``[n, C]`` of its elements, and the variances ``[C]`` along them."""


def _axes(data: Material, codec: Codec, cells: list[torch.Tensor], count: int) -> Axes:
    totals = [torch.zeros(len(e), len(e), device=e.device) for e in cells]
    some = data.learnt[::4]
    for s in some:
        rows = data.centred(s, codec.white.mean)
        rest = codec.white.whitened(rows - (rows @ codec.analysis) @ codec.synthesis)
        for total, e in zip(totals, cells, strict=True):
            total.add_(rest[:, e].T @ rest[:, e], alpha=1 / (len(rest) * len(some)))
    most = data.scaled(count)
    every = zip(totals, cells, strict=True)
    return [leading_directions(partial(torch.matmul, total), len(e), most, e.device) for total, e in every]


def _joined(data: Material, codec: Codec, cells: list[torch.Tensor], axes: Axes, rounding: Rounding | None) -> Codec:
    """The codec with local directions, and a prediction of all coordinates."""
    columns = sum(vectors.shape[1] for vectors, _ in axes)
    directions, at = torch.zeros(data.rows.shape[2], columns, device=data.rows.device), 0
    for (vectors, _), e in zip(axes, cells, strict=True):
        directions[e, at : at + vectors.shape[1]] = vectors
        at += vectors.shape[1]
    synthesis = codec.white.unwhitened(directions.T)
    note = f"{codec.note} local {sum(vectors.numel() for vectors, _ in axes) / 1e6:.2f} M"
    if rounding:
        unit, deviations = rounding.unit(data), torch.cat([values for _, values in axes]).clamp_min(1e-30).sqrt()
        shares = (synthesis / unit).T
        steps = rounding.steps(shares, deviations.float())
        integers = (shares / steps).round()
        synthesis = ((integers * steps) * unit[:, None]).T
        widths = [vectors.shape[1] for vectors, _ in axes]
        parts = [mine[e] for mine, e in zip(integers.split(widths, 1), cells, strict=True)]
        note += f" {sum(map(_megabytes, parts)):.2f} MB"
    own = _dual(codec, synthesis)
    own = own - codec.analysis @ (codec.synthesis @ own)
    analysis, synthesis = torch.cat([codec.analysis, own], 1), torch.cat([codec.synthesis, synthesis])
    return refitted(data, replace(codec, analysis=analysis, synthesis=synthesis, note=note))


def common_only(_: Material, codec: Codec) -> Codec:
    """Without a prediction of local coordinates."""
    weights = codec.weights.clone()
    weights[:, codec.common :] = 0
    return replace(codec, weights=weights)


def with_units(
    data: Material,
    codec: Codec,
    hidden: int,
    steps: int,
    activation: Activation = torch.relu,
    solved: bool = True,
) -> Codec:
    """Units in the prediction of common coordinates; if ``solved``, the last layer by regression in the end."""
    some = list(targets(data, codec, data.learnt[::16], codec.common))
    start = codec.weights[:, : codec.common].contiguous()
    power = torch.stack([(wanted - given @ start).square().mean(0) for given, wanted in some]).mean(0)
    scale = torch.stack([given.square().mean(0) for given, _ in some]).mean(0).sqrt().clamp_min(1e-6)
    harm = power / (power + REFERENCE_POWER)
    del some
    first, last = _descended(data, codec, start, (scale, power.sqrt(), harm), (hidden, steps), activation)
    units = first / scale[:, None]

    def features(given: torch.Tensor) -> torch.Tensor:
        return torch.cat([given, activation(given @ units)], 1)

    weights = torch.cat([start, last * power.sqrt()])
    if solved:
        pairs = ((features(given), wanted) for given, wanted in targets(data, codec, data.learnt, codec.common))
        weights = regression(pairs, UNITS_RIDGE)
    error = before = 0.0
    for given, wanted in targets(data, codec, list(data.mass), codec.common):
        error += float(((wanted - features(given) @ weights).square() / power * harm).mean())
        before += float(((wanted - given @ start).square() / power * harm).mean())
    weights = torch.nn.functional.pad(weights, (0, codec.analysis.shape[1] - codec.common))
    note = f"{codec.note} error held back {error / before:.3f} of linear"
    return replace(codec, units=units, activation=activation, weights=weights, note=note)


def _descended(
    data: Material,
    codec: Codec,
    start: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    size: tuple[int, int],
    activation: Activation,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[I, H]`` and ``[H, R]`` by Adam, of inputs and outputs over their scales, errors weighted by harm."""
    (scale, deviation, harm), (hidden, steps), device = scales, map(data.scaled, size), start.device
    initial = torch.randn(len(scale), hidden, generator=torch.Generator().manual_seed(0)) / len(scale) ** 0.5
    first = initial.to(device).requires_grad_(True)
    last = torch.zeros(hidden, start.shape[1], device=device, requires_grad=True)
    descent, random = torch.optim.Adam([first, last], lr=RATE, betas=(0.9, 0.98)), np.random.default_rng(0)
    for step in range(steps):
        descent.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 100) * (1 - step / steps)
        some = random.choice(data.learnt, min(AT_ONCE, len(data.learnt)), replace=False).tolist()
        given, wanted = map(torch.cat, zip(*targets(data, codec, some, codec.common), strict=True))
        wanted = (wanted - given @ start) / deviation
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            guess = activation((given / scale) @ first) @ last
        loss = ((wanted - guess.float()).square() * harm).mean()
        descent.zero_grad()
        loss.backward()
        descent.step()
    return first.detach(), last.detach()

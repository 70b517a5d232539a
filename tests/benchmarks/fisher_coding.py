"""What coordinates of ``fisher_simulation.py`` cost by ideal code lengths, and the KL that their rounding does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from fisher_simulation import Codec, Document, Material

from kvpack.calibration.corpus import SKIPPED
from kvpack.calibration.gradients import PLAIN, REPEAT
from kvpack.calibration.scales import CLASSES, DEAD_ZONE, UNIT_CLASS, tables
from kvpack.codecs.chain.base import Floats, Part
from kvpack.codecs.chain.quantizers.dead_zone import token_levels
from kvpack.codecs.chain.quantizers.dead_zone.reference import SHIFT_BITS, magnitude_bits
from kvpack.codecs.chain.symbols import BUCKETS, LARGEST, SMALLEST

ROUNDS = 3
SEEN = 100
"""Magnitudes of a class from which its centroid is used."""

Point = tuple[float, float, float]
"""Bits per element, KL after plain continuations, KL after repeated passages; nats per token."""


@dataclass(frozen=True)
class Coding:
    """Log steps in 32nds of an octave; ``penalty`` is steps squared a bit, or None for a dead zone; a token's classes
    are shifted by up to ``shifts``.
    """

    steps: tuple[int, ...]
    importance: int = 20
    penalty: float | None = None
    shifts: int = 0


@dataclass(frozen=True)
class Coded:
    """Of a document: classes and magnitudes ``[T, R]``, steps ``[T, 1]``, bits of its levels and shifts."""

    classes: torch.Tensor
    magnitudes: torch.Tensor
    steps: torch.Tensor
    side_bits: float


class Coder:
    """Static tables, columns and centroids, learnt from sequences held back; without a penalty until there are some."""

    def __init__(self, data: Material, codec: Codec, coding: Coding) -> None:
        """From the sequences held back, at all steps."""
        self.coding, self._buckets = coding, torch.from_numpy(BUCKETS.astype(np.int64)).to(data.rows.device)
        some = [(codec.coordinates(data.rows[s].float(), data.ids[s]), data.mass[s]) for s in data.mass]
        power = torch.stack([z[SKIPPED:].double().square().mean(0) for z, _ in some]).mean(0)
        self._columns = (16 * power.clamp_min(1e-30).log2()).round().int() + 8 * UNIT_CLASS + 4
        self._bits: torch.Tensor | None = None
        self._centroids = torch.zeros(CLASSES, 4, device=data.rows.device)
        self._learn(some, codec.sinks)

    def _learn(self, some: list[tuple[torch.Tensor, Floats]], sinks: int) -> None:
        device, width = self._columns.device, len(SMALLEST)
        for _ in range(ROUNDS):
            counts = torch.zeros(CLASSES * width, device=device, dtype=torch.double)
            above, seen = (torch.zeros(CLASSES * 4, device=device, dtype=torch.double) for _ in range(2))
            for step in self.coding.steps:
                for z, mass in some:
                    coded = self.code(z, mass, step)
                    scaled = (z.abs() / coded.steps)[sinks:]
                    k, found = coded.classes[sinks:], coded.magnitudes[sinks:]
                    counts += torch.bincount((k * width + self._bucket(found)).flatten(), minlength=CLASSES * width)
                    place = (k * 4 + found.clamp_max(3)).flatten()
                    above += torch.bincount(place, (scaled - found).flatten().double(), minlength=CLASSES * 4)
                    seen += torch.bincount(place, minlength=CLASSES * 4)
            bits = magnitude_bits(tables(counts.reshape(CLASSES, width).cpu().numpy()))
            self._bits = torch.from_numpy(bits).float().to(device)
            self._centroids = torch.where(seen > SEEN, above / seen.clamp_min(1), 0.0).reshape(CLASSES, 4).float()
            self._centroids[:, 0] = 0

    def code(self, z: torch.Tensor, mass: Floats, log_step: int) -> Coded:
        """Coordinates ``[T, R]`` at a step."""
        part = Part("F32", (1, len(z), 1), 0, len(z))
        levels = torch.from_numpy(token_levels(part, self.coding.importance, mass)).to(z.device)
        rows = log_step + 8 * levels
        steps = torch.exp2(rows / 32)[:, None]
        classes = ((self._columns[None] - rows[:, None]) >> 3).clamp(0, CLASSES - 1).long()
        side = _entropy(levels)
        if self.coding.shifts and self._bits is not None:
            shifts = self._shifts(classes, self._magnitudes(z, steps, classes))
            classes, side = (classes + shifts[:, None]).clamp(0, CLASSES - 1), side + _entropy(shifts)
        return Coded(classes, self._magnitudes(z, steps, classes), steps, side)

    def bits(self, coded: Coded, sinks: int) -> float:
        """Of a document's tokens."""
        return float(self._cost(coded.classes[sinks:], coded.magnitudes[sinks:]).sum()) + coded.side_bits

    def read(self, coded: Coded, z: torch.Tensor) -> torch.Tensor:
        """What a decoder has, the signs of ``z`` given."""
        return z.sign() * self._value(coded.classes, coded.magnitudes) * coded.steps

    def _bucket(self, magnitudes: torch.Tensor) -> torch.Tensor:
        return self._buckets[magnitudes.clamp_max(LARGEST)]

    def _cost(self, classes: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
        assert self._bits is not None
        return self._bits[classes, self._bucket(magnitudes)]

    def _value(self, classes: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
        return magnitudes + self._centroids[classes, magnitudes.clamp_max(3)]

    def _magnitudes(self, z: torch.Tensor, steps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Rounded in a dead zone, or the cheapest of the nearest, the one below and 0, error and bits together."""
        scaled = z.abs() / steps
        if self.coding.penalty is None or self._bits is None:
            return (scaled + DEAD_ZONE).floor().long()
        near = (scaled + 0.5).floor().long()
        found, least = near, torch.full_like(scaled, math.inf)
        for trial in (near, (near - 1).clamp_min(0), torch.zeros_like(near)):
            error = (scaled - self._value(classes, trial)).square()
            cost = error + self.coding.penalty * self._cost(classes, trial)
            found, least = torch.where(cost < least, trial, found), torch.minimum(cost, least)
        return found

    def _shifts(self, classes: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
        """Each token's cheapest shift ``[T]``."""
        every = range(-self.coding.shifts, self.coding.shifts + 1)
        costs = [
            self._cost((classes + s).clamp(0, CLASSES - 1), magnitudes).sum(1) + SHIFT_BITS * abs(s) for s in every
        ]
        return torch.stack(costs).argmin(0) - self.coding.shifts


def _entropy(values: torch.Tensor) -> float:
    """Bits of all by their own order-0 statistics."""
    counts = torch.unique(values, return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum())


def curve(data: Material, codec: Codec, coder: Coder) -> Iterator[Point]:
    """At each of the coding's steps, means over the judged documents."""
    every = [(document, codec.coordinates(document.rows, document.ids)) for document in data.judged]
    for step in coder.coding.steps:
        points = []
        for document, z in every:
            coded = coder.code(z, document.mass, step)
            bits = coder.bits(coded, codec.sinks) / (len(z) * len(codec.analysis))
            points.append((bits, *divergence(data, codec, document, coder.read(coded, z))))
        yield _mean(points)


def floor(data: Material, codec: Codec) -> Point:
    """The same without rounding: what the directions leave out."""
    every = [(document, codec.coordinates(document.rows, document.ids)) for document in data.judged]
    return _mean([(math.nan, *divergence(data, codec, document, z)) for document, z in every])


def _mean(points: list[Point]) -> Point:
    bits, plain, repeat = np.mean(points, axis=0).tolist()
    return bits, plain, repeat


def divergence(data: Material, codec: Codec, document: Document, z: torch.Tensor) -> tuple[float, float]:
    """KL after plain continuations and after repeated passages, of coordinates ``[T, R]``."""
    z = z.clone()
    z[: codec.sinks] = 0
    rows, found = codec.back(z, document.ids), {}
    for follow, exact in document.tests:
        with torch.inference_mode():
            other = data.network.logits(rows, follow).log_softmax(-1)
        p = exact.double()
        found[follow.kind] = max(float((p.exp() * (p - other.double())).sum(-1).mean()), 0.0)
    return found[PLAIN], found[REPEAT]


def bits_at(points: list[Point], limit: float, both: bool) -> float | None:
    """Bits at which KL is ``limit``, between points by logarithms; None where the finest step is above it."""
    ordered = sorted((bits, max(plain, repeat) if both else plain) for bits, plain, repeat in points)
    bits = np.log([b for b, _ in ordered])
    kl = np.minimum.accumulate(np.log([max(k, 1e-9) for _, k in ordered]))
    if kl[-1] > math.log(limit):
        return None
    return math.exp(np.interp(-math.log(limit), -kl, bits))

"""What ``dead_zone`` and ``scaled_rans`` learn: how coefficients of sequences held back scatter, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.calibration.corpus import SKIPPED, Sample
from kvpack.calibration.gradients import PLAIN, Continuation, Network, continuations, rows_of
from kvpack.codecs import FISHER_IMPORTANCE, FISHER_LEVELS, fisher_log_step
from kvpack.stages.base import Floats, Part, Scales, Side
from kvpack.stages.entropy.scaled_rans.reference import PRECISION
from kvpack.stages.quantizers.dead_zone import ROUNDING, DeadZone, token_levels
from kvpack.stages.symbols import ALPHABET, SMALLEST, split
from kvpack.stages.transforms.token_klt import TokenKlt, model_of

CLASSES = 64
UNIT_CLASS = 20
"""The class of a scatter as wide as the step; a class is a quarter of an octave."""

PRIOR = 60.0
"""Weight of the Laplace distribution beside counts, in symbols a class."""

SECTION = "fisher"
KLT = TokenKlt(section=SECTION)
Arrays = dict[str, NDArray[Any]]


def part_of(sample: Sample, sequence: int, cached: int, profile: Mapping[str, NDArray[Any]]) -> Part:
    """The part that a capture of the sequence's first ``cached`` tokens would be."""
    rows = 2 * sample.layers * (sample.channels // _dims(profile))
    side = Side(sample.tokens[sequence][:cached], sample.mass[sequence][:cached])
    return Part("F32", (rows, cached, _dims(profile)), 0, cached, profile=profile, side=side)


def _dims(profile: Mapping[str, NDArray[Any]]) -> int:
    return int(profile[f"{SECTION}.whiten.step"].shape[1])


def coefficients(sample: Sample, sequence: int, part: Part) -> Floats:
    """``[T, R]`` of a sequence, as :class:`TokenKlt` has them."""
    model = model_of(part, SECTION)
    rows = rows_of(sample, sequence, "cpu").numpy()[: part.shape[1]]
    return model.coordinates(rows, part)


def scatter(sample: Sample, sequences: list[int], profile: Mapping[str, NDArray[Any]]) -> Arrays:
    """``columns`` ``[R]``, ``tables`` ``[K, 63]`` and ``centroids`` ``[K, 4]`` from sequences held back."""
    parts = [part_of(sample, s, sample.tokens.shape[1], profile) for s in sequences]
    found = [coefficients(sample, s, part) for s, part in zip(sequences, parts, strict=True)]
    power = np.mean([np.square(z[SKIPPED:], dtype=np.float64).mean(0) for z in found], axis=0)
    columns = np.rint(16 * np.log2(np.maximum(power, 1e-30))).astype(np.int32) + 8 * UNIT_CLASS + 4
    counts = np.zeros((CLASSES, ALPHABET))
    offsets, weights = np.zeros((CLASSES, 4)), np.zeros((CLASSES, 4))
    unknown = np.ones((CLASSES, ALPHABET), np.int32)
    for level in FISHER_LEVELS:
        quantizer = _quantizer(level)
        for z, part in zip(found, parts, strict=True):
            levels = token_levels(part, FISHER_IMPORTANCE)
            classes = Scales(columns, quantizer.rows(levels), unknown).classes()
            scaled = np.abs(z) / quantizer.steps(levels)
            magnitude = np.floor(scaled + np.float32(ROUNDING)).astype(np.int64)
            symbols, _, _ = split(np.minimum(2 * magnitude, 60000).reshape(-1).astype(np.uint16))
            counts += _histogram(classes, symbols.reshape(classes.shape), ALPHABET)
            bins = np.minimum(magnitude, 3)
            offsets += _histogram(classes, bins, 4, np.asarray(scaled - magnitude, np.float32))
            weights += _histogram(classes, bins, 4)
    centroids = np.where(weights > 100, offsets / np.maximum(weights, 1), 0).astype(np.float32)
    centroids[:, 0] = 0
    return {"columns": columns, "tables": tables(counts), "centroids": centroids}


def _quantizer(level: int) -> DeadZone:
    return DeadZone(section=SECTION, log_step=fisher_log_step(level), importance=FISHER_IMPORTANCE)


def _histogram(classes: NDArray[Any], bins: NDArray[Any], width: int, values: Floats | None = None) -> NDArray[Any]:
    """How often, or with what sum of ``values``, each class meets each bin: ``[CLASSES, width]``."""
    place = (classes * width + bins).reshape(-1)
    given = None if values is None else values.reshape(-1)
    return np.bincount(place, given, CLASSES * width).reshape(CLASSES, width)


def laplace(width: float) -> NDArray[np.float64]:
    """Probabilities of the symbols for a Laplace distribution of that deviation over the step, ``[63]``."""
    rate = np.sqrt(2) / width
    edges = np.concatenate([[0.0], np.append(SMALLEST[1:], 2.0 * SMALLEST[-1]) - ROUNDING])
    mass = np.diff(-np.exp(-rate * edges))
    return np.concatenate([[mass[0]], np.repeat(mass[1:] / 2, 2)])


def tables(counts: NDArray[np.float64]) -> NDArray[np.int32]:
    """Frequencies ``[K, 63]`` that sum to ``2**PRECISION``, each at least 1.

    ``counts`` of positive symbols are split evenly between the signs, and smoothed towards a Laplace distribution.
    """
    total = 1 << PRECISION
    out = np.empty(counts.shape, np.int32)
    for k, mine in enumerate(counts):
        magnitude = np.concatenate([mine[:1], mine[1::2] + mine[2::2]])
        even = np.concatenate([magnitude[:1], np.repeat(magnitude[1:] / 2, 2)])
        p = even + PRIOR * laplace(2.0 ** ((k + 0.5 - UNIT_CLASS) / 4))
        frequency = np.maximum(np.floor(p / p.sum() * total), 1)
        frequency[frequency.argmax()] += total - frequency.sum()
        out[k] = frequency
    return out


@dataclass(frozen=True)
class _Case:
    """A continuation behind a cache: coefficients ``[T, R]``, and the model's exact log-probabilities ``[N, V]``."""

    follow: Continuation
    part: Part
    z: Floats
    exact: torch.Tensor

    @classmethod
    def of(
        cls,
        network: Network,
        sample: Sample,
        sequence: int,
        follow: Continuation,
        profile: Mapping[str, NDArray[Any]],
    ) -> _Case:
        """Of a sequence's first ``follow.cached`` tokens."""
        part = part_of(sample, sequence, follow.cached, profile)
        with torch.inference_mode():
            exact = network.logits(rows_of(sample, sequence, network.device), follow).log_softmax(-1)
        return cls(follow, part, coefficients(sample, sequence, part), exact)

    def kl(self, network: Network, quantizer: DeadZone) -> float:
        """Next-token KL behind the quantised cache, nats a token."""
        small = KLT.output(self.part)
        back = quantizer.decode(quantizer.encode(self.z[None], small), small)[0]
        rows = model_of(self.part, SECTION).rows(back, self.part)
        with torch.inference_mode():
            other = network.logits(torch.from_numpy(rows).to(network.device), self.follow).log_softmax(-1)
        p = self.exact.double()
        return max(float((p.exp() * (p - other.double())).sum(-1).mean()), 0.0)


def curve(
    network: Network, sample: Sample, sequences: list[int], profile: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[int, list[float]]]:
    """Of each level a row: log_step, and next-token KL (plain: mean, largest; repeat: mean, largest), nats a token."""
    cases = [
        _Case.of(network, sample, s, follow, profile)
        for s in sequences
        for follow in continuations(sample.tokens[s], s)
    ]
    for level in FISHER_LEVELS:
        quantizer = _quantizer(level)
        found: dict[str, list[float]] = {}
        for case in cases:
            found.setdefault(case.follow.kind, []).append(case.kl(network, quantizer))
        row = [float(quantizer.log_step)]
        for kind in sorted(found, key=lambda kind: kind != PLAIN):
            row += [float(np.mean(found[kind])), max(found[kind])]
        yield level, row

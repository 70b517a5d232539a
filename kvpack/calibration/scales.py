"""Learns scales, frequency tables and centroids for ``dead_zone`` and ``scaled_rans`` from sequences held back.

It also measures the next-token KL of each level.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.calibration.corpus import SKIPPED, Sample
from kvpack.calibration.gradients import PLAIN, Continuation, Network, continuations, rows_of
from kvpack.codecs.chain.base import Floats, Part, Scales
from kvpack.codecs.chain.entropy.scaled_rans.reference import PRECISION
from kvpack.codecs.chain.quantizers.dead_zone import DeadZone, quantize, token_levels
from kvpack.codecs.chain.symbols import ALPHABET, BUCKETS, SMALLEST, unzigzag
from kvpack.codecs.chain.transforms.token_klt import TokenKlt, model_of
from kvpack.codecs.context import DecodeContext, StackHints
from kvpack.codecs.recipes import FISHER_IMPORTANCE, FISHER_LEVELS, fisher_log_step
from kvpack.engine.threads import ordered_map
from kvpack.numerics.jit import njit

CLASSES = 64
UNIT_CLASS = 20
"""Class of coefficients whose scatter equals the step; a class is a quarter of an octave."""

PRIOR = 60.0
"""Weight of the Laplace prior in the frequency tables, in symbols per class."""

DEAD_ZONE = 0.37
"""Rounding offset of the prior: magnitudes are rounded down after this is added."""

PROMISED = 0.9
"""Share of the sequences held back that ``--quality`` and ``--max-kl`` promise to keep within their limit."""

ROUNDS = 3

SECTION = "fisher"
KLT = TokenKlt(section=SECTION)
Array = NDArray[Any]
Arrays = dict[str, Array]


def part_of(sample: Sample, sequence: int, cached: int, profile: Mapping[str, NDArray[Any]]) -> Part:
    """Return the part that a capture of the sequence's first ``cached`` tokens would give."""
    rows = 2 * sample.layers * (sample.channels // _dims(profile))
    context = DecodeContext(profile, sample.tokens[sequence][:cached])
    return Part("F32", (rows, cached, _dims(profile)), 0, cached, context=context)


def _dims(profile: Mapping[str, NDArray[Any]]) -> int:
    return int(profile[f"{SECTION}.whiten.step"].shape[1])


def coefficients(sample: Sample, sequence: int, part: Part) -> Floats:
    """Return the coefficients ``[T, R]`` of a sequence as :class:`TokenKlt` computes them."""
    model = model_of(part, SECTION)
    rows = rows_of(sample, sequence, "cpu").numpy()[: part.shape[1]]
    return model.coordinates(rows, part)


def scatter(sample: Sample, sequences: list[int], profile: Mapping[str, NDArray[Any]]) -> Arrays:
    """Return ``columns`` ``[R]``, ``tables`` ``[K, 63]`` and ``centroids`` ``[K, 4]`` from ``sequences``.

    The encoder's decisions depend on the tables. Therefore the tables start as Laplace distributions and are counted
    anew :data:`ROUNDS` times.
    """
    parts = [part_of(sample, s, sample.tokens.shape[1], profile) for s in sequences]
    found = [coefficients(sample, s, part) for s, part in zip(sequences, parts, strict=True)]
    power = np.mean([np.square(z[SKIPPED:], dtype=np.float64).mean(0) for z in found], axis=0)
    columns = np.rint(16 * np.log2(np.maximum(power, 1e-30))).astype(np.int32) + 8 * UNIT_CLASS + 4
    counts, offsets = np.zeros((CLASSES, len(SMALLEST))), np.zeros((CLASSES, 4))
    learnt, centroids = tables(counts), np.zeros((CLASSES, 4), np.float32)
    for _ in range(ROUNDS):
        trial = partial(_trial, columns=columns, learnt=learnt, centroids=centroids)
        masses = [sample.mass[s] for s in sequences]
        every = list(zip(found, parts, masses, strict=True))
        jobs = [(level, *one) for level in FISHER_LEVELS for one in every]
        counts[:], offsets[:] = 0, 0
        for mine, above in ordered_map(trial, jobs):
            counts += mine
            offsets += above
        learnt = tables(counts)
        heavy = np.stack([counts[:, 0], counts[:, 1], counts[:, 2], counts[:, 3:].sum(1)], axis=1)
        centroids = np.where(heavy > 100, offsets / np.maximum(heavy, 1), 0).astype(np.float32)
        centroids[:, 0] = 0
    return {"columns": columns, "tables": learnt, "centroids": centroids}


def _trial(
    job: tuple[int, Floats, Part, Floats], columns: NDArray[np.int32], learnt: NDArray[np.int32], centroids: Floats
) -> tuple[Array, Array]:
    """Return the counts ``[K, 32]`` and offsets ``[K, 4]`` of an encoder's choices for one sequence and level."""
    level, z, part, mass = job
    quantizer, levels = _quantizer(level), token_levels(part, FISHER_IMPORTANCE, mass)
    scales, steps = Scales(columns, quantizer.rows(levels), learnt), quantizer.steps(levels)
    shifts, codes = quantize(z, steps, scales, centroids)
    magnitude = np.abs(unzigzag(codes))
    classes = Scales(columns, scales.rows - 8 * shifts, learnt).classes()
    counts, offsets, skip = np.zeros((CLASSES, len(SMALLEST))), np.zeros((CLASSES, 4)), slice(SKIPPED, None)
    _tally(z[skip], steps[skip, 0], classes[skip], magnitude[skip], BUCKETS, counts, offsets)
    return counts, offsets


@njit
def _tally(
    z: Floats, steps: Floats, classes: Array, magnitude: Array, buckets: Array, counts: Array, offsets: Array
) -> None:
    """Add the number of codes in each bucket to ``counts`` ``[K, 32]``.

    The distances of scaled values above their magnitudes are added to ``offsets`` ``[K, 4]``.
    """
    for t in range(len(z)):
        for d in range(z.shape[1]):
            k, m = classes[t, d], magnitude[t, d]
            counts[k, buckets[m]] += 1
            offsets[k, min(m, 3)] += abs(z[t, d]) / steps[t] - m


def _quantizer(level: int) -> DeadZone:
    return DeadZone(section=SECTION, log_step=fisher_log_step(level), importance=FISHER_IMPORTANCE)


def laplace(width: float) -> NDArray[np.float64]:
    """Return the probabilities of the buckets, ``[32]``, for a Laplace distribution of deviation ``width`` in steps."""
    rate = np.sqrt(2) / width
    edges = np.concatenate([[0.0], np.append(SMALLEST[1:], 2.0 * SMALLEST[-1]) - DEAD_ZONE])
    found: NDArray[np.float64] = np.diff(-np.exp(-rate * edges))
    return found


def tables(counts: NDArray[np.float64]) -> NDArray[np.int32]:
    """Return symbol frequencies ``[K, 63]``, each at least 1; each row sums to ``2**PRECISION``.

    The ``counts`` of buckets ``[K, 32]`` are split evenly between the signs and smoothed towards a Laplace
    distribution.
    """
    total = 1 << PRECISION
    out = np.empty((len(counts), ALPHABET), np.int32)
    for k, mine in enumerate(counts):
        p = mine + PRIOR * laplace(2.0 ** ((k + 0.5 - UNIT_CLASS) / 4))
        p = np.concatenate([p[:1], np.repeat(p[1:] / 2, 2)])
        frequency = np.maximum(np.floor(p / p.sum() * total), 1)
        frequency[frequency.argmax()] += total - frequency.sum()
        out[k] = frequency
    return out


@dataclass(frozen=True)
class _Case:
    """A continuation after a cache, to measure the KL of quantized caches.

    ``z`` ``[T, R]`` are the coefficients of the cache, and ``exact`` ``[N, V]`` the model's log-probabilities with the
    original cache.
    """

    follow: Continuation
    part: Part
    mass: Floats
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
        """Return the case whose cache is the sequence's first ``follow.cached`` tokens."""
        part = part_of(sample, sequence, follow.cached, profile)
        with torch.inference_mode():
            exact = network.logits(rows_of(sample, sequence, network.device), follow).log_softmax(-1)
        mass = sample.mass[sequence][: follow.cached]
        return cls(follow, part, mass, coefficients(sample, sequence, part), exact)

    def rows(self, quantizer: DeadZone) -> Floats:
        """Return the rows ``[T, P]`` of the quantized cache."""
        small = KLT.output(self.part)
        codes = quantizer.encode(self.z[None], small, StackHints(self.mass))
        back = quantizer.decode(codes, small)[0]
        return model_of(self.part, SECTION).rows(back, self.part)

    def kl(self, network: Network, rows: Floats) -> float:
        """Return the next-token KL with the cache ``rows`` ``[T, P]``, in nats per token."""
        with torch.inference_mode():
            other = network.logits(torch.from_numpy(rows).to(network.device), self.follow).log_softmax(-1)
        p = self.exact.double()
        return max(float((p.exp() * (p - other.double())).sum(-1).mean()), 0.0)


def curve(
    network: Network, sample: Sample, sequences: list[int], profile: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[int, list[float]]]:
    """Yield each level with its row of the curve.

    A row is log_step, then of the next-token KL of plain continuations the mean, the least figure that nine of ten
    sequences do not exceed, and the largest; then the same three of repeated passages. KL is in nats per token.
    """
    cases = [
        _Case.of(network, sample, s, follow, profile)
        for s in sequences
        for follow in continuations(sample.tokens[s], s)
    ]
    for level in FISHER_LEVELS:
        quantizer = _quantizer(level)
        found: dict[str, list[float]] = {}
        for case, rows in zip(cases, ordered_map(partial(_Case.rows, quantizer=quantizer), cases), strict=True):
            found.setdefault(case.follow.kind, []).append(case.kl(network, rows))
        row = [float(quantizer.log_step)]
        for kind in sorted(found, key=lambda kind: kind != PLAIN):
            most = np.quantile(found[kind], PROMISED, method="higher")
            row += [float(np.mean(found[kind])), float(most), max(found[kind])]
        yield level, row

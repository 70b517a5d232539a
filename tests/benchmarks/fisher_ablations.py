"""What each choice of the codec ``fisher`` is worth, in simulation: the ablations of docs/fisher.md.

    python tests/benchmarks/documents.py docs-text
    python tests/benchmarks/fisher_ablations.py docs-text CAPTURE... [--device cuda] [--only NAME...]

CAPTUREs are of the judged documents, as docs/benchmarks.md makes them. Each variant of the codec is learnt from the
calibration texts, in floats; its coefficients are quantised, and counted by ideal code lengths from static tables
that sequences held back have given; the KL is the model's, means over the captures. A row has the ratio to 16 bits per
element at which KL is 0.03 after plain continuations, and 0.03 and 0.06 after both (0.0 where the finest step is
above it); the KL without any rounding; bits per element and KL (plain/repeat) at every step.

Sequences of 2,048 tokens take 47 MB each of the device's memory, for SmolLM2-135M. Noise of the seeds is about 5%.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from fisher_changes import (
    Change,
    Rounding,
    common_only,
    local,
    local_of_all,
    remetric,
    rounded,
    with_units,
)
from fisher_coding import Coder, Coding, Point, bits_at, curve, floor
from fisher_simulation import Codec, Material, learn, material, root, whole_root

from kvpack.capture import load_model

STEPS = tuple(-170 - 16 * level for level in (7, 6, 5, 4, 3, 2))
ZONE = Coding(STEPS)
CHOSEN = Coding(STEPS[:5], penalty=0.10, shifts=4)
LAST = Coding(STEPS[1:5], penalty=0.10, shifts=4)


@dataclass(frozen=True)
class Basis:
    """``rank`` leading directions, and those of tokens' embeddings if ``own``, learnt from all or so many sequences.

    F is damped and tempered, of half of the gradients, brought to the plain one's mean (``alike``), or whole between
    all elements, drawn to its blocks by ``whole``.
    """

    rank: int = 1472
    own: bool = True
    damping: float = 0.1
    temper: float = 0.0
    alike: bool = False
    half: bool = False
    whole: float | None = None
    sequences: int | None = None

    def learnt(self, data: Material) -> Codec:
        """The codec in the simulation."""
        some = data.learnt
        if self.sequences:
            some = some[:: max(1, len(some) // self.sequences)][: self.sequences]
        return learn(data, some, self._whitening(data), data.known.sinks, self.rank, self.own)

    def _whitening(self, data: Material) -> torch.Tensor:
        if self.whole is not None:
            return whole_root(data.known, self.whole)
        fisher = data.known.alike(self.temper) if self.alike else data.known.tempered[self.temper]
        return root(data.known.half if self.half else fisher, self.damping)


@dataclass(frozen=True)
class Variant:
    """A basis, what is changed in turn, and how it is coded."""

    basis: Basis
    coding: Coding
    changes: tuple[Change, ...] = field(default=())


FIRST = {rank: Basis(rank, damping=0.01) for rank in (640, 1472, 3520)}
CHOICES = {
    "dead-zone": ZONE,
    "rdo-0.10": Coding(STEPS, penalty=0.10),
    "rdo-0.15": Coding(STEPS, penalty=0.15),
    "rdo-0.20": Coding(STEPS, penalty=0.20),
    "shifts-4": Coding(STEPS, shifts=4),
    "rdo-0.15-importance-30": Coding(STEPS, importance=30, penalty=0.15),
}


def first() -> dict[str, Variant]:
    """Ranks, choices of the encoder, and the metric; F is damped by 0.01."""
    found = {f"640+576-{name}": Variant(FIRST[640], coding) for name, coding in CHOICES.items()}
    found["640+576-metric-0.05"] = Variant(FIRST[640], ZONE, (partial(remetric, shrink=0.05),))
    found["640+576-metric-0.3"] = Variant(FIRST[640], ZONE, (partial(remetric, shrink=0.3),))
    for rank in (1472, 3520):
        found[f"{rank}+576-dead-zone"] = Variant(FIRST[rank], ZONE)
        found[f"{rank}+576-metric-0.05"] = Variant(FIRST[rank], ZONE, (partial(remetric, shrink=0.05),))
    for damping in (0.03, 0.1):
        found[f"1472+576-damping-{damping}"] = Variant(Basis(damping=damping), ZONE)
    found["1472+576-whole-metric-0.3"] = Variant(Basis(whole=0.3), ZONE)
    return found


def second() -> dict[str, Variant]:
    """At 1472 + 576 directions and a damping of 0.1: rounding, directions of layers, averages of F, how much data."""
    basis, small = Basis(), Basis(640)
    found = {
        "2048": Variant(basis, CHOSEN),
        "2048-dead-zone": Variant(basis, Coding(STEPS[:5])),
        "2048-rdo-0.13-shifts-6": Variant(basis, Coding(STEPS[:5], penalty=0.13, shifts=6)),
    }
    for importance in (10, 30):
        coding = Coding(STEPS[:5], importance, penalty=0.10, shifts=4)
        found[f"2048-importance-{importance}"] = Variant(basis, coding)
    for step in (0.003, 0.006, 0.012, 0.02):
        found[f"2048-rounded-{step}"] = Variant(basis, CHOSEN, (partial(rounded, rounding=Rounding(step)),))
    found["1216-rounded-0.003"] = Variant(small, CHOSEN, (partial(rounded, rounding=Rounding(0.003)),))
    for groups in (30, 6):
        change = partial(local_of_all, groups=groups, count=2500)
        found[f"1216-and-2500-of-{groups}-groups"] = Variant(small, CHOSEN, (change,))
    for temper in (0.5, 1.0):
        found[f"2048-alike-temper-{temper}"] = Variant(Basis(temper=temper, alike=True), CHOSEN)
    found["2048-half-of-gradients"] = Variant(Basis(half=True), CHOSEN)
    for count in (120, 300):
        found[f"2048-sequences-{count}"] = Variant(Basis(sequences=count), CHOSEN)
    units = partial(with_units, hidden=1024, steps=2500, activation=torch.nn.functional.gelu, solved=False)
    found["2048-gelu-units-1024"] = Variant(basis, CHOSEN, (units,))
    return found


def third() -> dict[str, Variant]:
    """F tempered by 0.5: 1216 common and some local directions, their rounding, and the prediction."""
    basis, six = Basis(640, temper=0.5), partial(local, groups=6, count=320)
    found = {"640+576-and-6x320": Variant(basis, LAST, (six,))}
    for step, power in ((0.003, 0.0), (0.004, 0.5), (0.006, 0.5), (0.004, 1.0), (0.006, 1.0)):
        found[f"640+576-and-6x320-rounded-{step}-harm-{power}"] = Variant(basis, LAST, rounding(step, power))
    found["1216-and-6x320"] = Variant(Basis(1216, own=False, temper=0.5), LAST, (six,))
    for groups, count in ((10, 192), (3, 320)):
        change = partial(local, groups=groups, count=count)
        found[f"640+576-and-{groups}x{count}"] = Variant(basis, LAST, (change,))
    for temper in (0.35, 0.65):
        found[f"2048-temper-{temper}"] = Variant(Basis(temper=temper), LAST)
    linear = (*rounding(0.004, 0.5), common_only)
    found["common-linear"] = Variant(basis, LAST, linear)
    for hidden, steps, importances in ((512, 300, (20,)), (512, 2500, (20, 30, 25)), (1024, 3000, (25,))):
        changes = (*linear, partial(with_units, hidden=hidden, steps=steps))
        for importance in importances:
            coding = Coding(LAST.steps, importance, LAST.penalty, LAST.shifts)
            suffix = "" if importance == 20 else f"-importance-{importance}"
            found[f"common-units-{hidden}-steps-{steps}{suffix}"] = Variant(basis, coding, changes)
    return found


def rounding(step: float, power: float) -> tuple[Change, Change]:
    """Common directions rounded, then six groups' for what they leave."""
    how = Rounding(step, power)
    return partial(rounded, rounding=how), partial(local, groups=6, count=320, rounding=how)


VARIANTS = first() | second() | third()


class Workshop:
    """Learns codecs, and keeps those that later variants begin with."""

    def __init__(self, data: Material) -> None:
        """Nothing learnt yet."""
        self._data = data
        self._learnt: dict[Basis, Codec] = {}
        self._changed: tuple[tuple[Basis, tuple[Change, ...]], Codec] | None = None

    def codec(self, variant: Variant) -> Codec:
        """The variant's."""
        key = variant.basis, variant.changes
        if self._changed is None or self._changed[0] != key:
            if variant.basis not in self._learnt:
                self._learnt[variant.basis] = variant.basis.learnt(self._data)
            codec = self._learnt[variant.basis]
            for change in variant.changes:
                codec = change(self._data, codec)
            self._changed = key, codec
        return self._changed[1]


def row(name: str, points: Sequence[Point], least: Point, note: str) -> str:
    """Of the table that is printed."""
    found = [bits_at(list(points), limit, both) for limit, both in ((0.03, False), (0.03, True), (0.06, True))]
    ratios = [f"{16 / bits if bits else 0:6.1f}x" for bits in found]
    every = " ".join(f"{bits:.4f}:{plain:.4f}/{repeat:.4f}" for bits, plain, repeat in points)
    floors = f"{least[1]:.4f}/{least[2]:.4f}"
    return f"{name:46s} {' '.join(ratios)}  {floors}  {every} {note}".rstrip()


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description="The ablations of docs/fisher.md.", epilog="; ".join(VARIANTS))
    parser.add_argument("texts", type=Path, help="the folder that documents.py has written")
    parser.add_argument("captures", type=Path, nargs="+", metavar="CAPTURE")
    parser.add_argument("--model", help="of the captures; without it, the embedded one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sequences", type=int, default=830, help="at most so many, at least 5")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--rank-scale", type=float, default=1.0, help="all ranks and units times this, for a trial")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants, or patterns of them", default=["*"])
    found = parser.parse_args(arguments)
    found.names = [name for name in VARIANTS if any(fnmatchcase(name, pattern) for pattern in found.only)]
    unknown = [pattern for pattern in found.only if not any(fnmatchcase(name, pattern) for name in VARIANTS)]
    if unknown or found.sequences < 5:
        parser.error(f"no variant is called {', '.join(unknown)}" if unknown else "at least 5 sequences")
    return found


def main() -> None:
    """Print a row a variant, as it is done."""
    given, start = options(sys.argv[1:]), time.monotonic()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = load_model(given.model, device=given.device)
    data = material(model, given.texts, given.captures, given.sequences, given.context, given.rank_scale)
    print(f"{len(data.tokens)} sequences of {given.context} tokens, {len(data.mass)} of them held back", flush=True)
    print(f"{data.known.sinks} sinks; F after {time.monotonic() - start:.0f} s", flush=True)
    print(f"{'variant':46s} plain.03 both.03 both.06  without rounding  bits:plain/repeat", flush=True)
    shop = Workshop(data)
    for name in given.names:
        codec = shop.codec(VARIANTS[name])
        points = list(curve(data, codec, Coder(data, codec, VARIANTS[name].coding)))
        print(row(name, points, floor(data, codec), codec.note), f"({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

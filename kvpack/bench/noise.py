"""Measures hardware noise: how far caches of the same tokens lie apart when they are computed in different ways.

Floating-point sums depend on the order in which they are added, and another machine, library or schedule adds in
another order. Each variant computes the capture's cache in one other way, with the same weights. Its cache is judged
like a codec's. A codec's loss below that of every variant means nothing: to move the model to another machine does
about as much.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch

from kvpack.bench.bounds import Simulated
from kvpack.bench.recompute import as_reader, run_schedule, schedule_of, tokens_of
from kvpack.bench.results import NOISE
from kvpack.capture import Model
from kvpack.fidelity import CacheReader

TAIL = 128
"""Number of last tokens that the variant ``schedule`` computes one by one."""


@dataclass(frozen=True)
class Noise:
    """One other way to compute a cache.

    ``kind`` is ``float32`` (the arithmetic in float32, rounded at the end), ``schedule`` (other runs of the model) or
    ``device`` (a GPU instead of the CPU, or the CPU instead of a GPU).
    """

    kind: str

    @property
    def name(self) -> str:
        """Name of the variant in result rows."""
        return NOISE + self.kind

    def compute(self, model: Model, capture: CacheReader) -> Simulated:
        """Compute the capture's cache with ``model`` in this way, and round it to the capture's dtype."""
        tokens, runs = tokens_of(capture), schedule_of(capture)
        if self.kind == "schedule":
            runs = other_schedule(runs)
        elif self.kind == "float32":
            # transformers' own `float` refuses models unpacked from quantised files, although these are plain bf16.
            model = replace(model, network=torch.nn.Module.float(copy.deepcopy(model.network)))
        else:
            model = replace(model, network=copy.deepcopy(model.network).to(_other_device(model)))
        return as_reader(capture, run_schedule(model, tokens, runs))


def variants(model: Model) -> list[Noise]:
    """Return the ways that this machine has: ``float32`` for models of a shorter dtype, ``device`` with a GPU."""
    found = [Noise("schedule")]
    if model.network.dtype != torch.float32:
        found.insert(0, Noise("float32"))
    if torch.cuda.is_available():
        found.append(Noise("device"))
    return found


def other_schedule(runs: list[int]) -> list[int]:
    """Return runs that differ from ``runs`` in schedule, and not in tokens.

    Runs that end in a decode step become one prefill. Others become a prefill and :data:`TAIL` decode steps, or half as
    many steps as there are tokens where these are few.
    """
    count = sum(runs)
    if runs[-1] == 1 and len(runs) > 1:
        return [count]
    tail = min(TAIL, count // 2)
    return [count - tail, *[1] * tail]


def _other_device(model: Model) -> str:
    return "cpu" if model.network.device.type == "cuda" else "cuda"

"""What each idea of ``local`` gives: bits per element and KL with it changed, one row each.

    python tests/benchmarks/local_ablations.py manual.safetensors code.safetensors

Means over the captures (with probes and attention mass, by ``kvpack capture``), at the step of ``local-3``. The
last rows leave out of the captures what each names, and compress what is left.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from kvpack import jobs
from kvpack.cache import PartSpec
from kvpack.capture import load_model
from kvpack.codecs import low_rank
from kvpack.codecs.low_rank import factors
from kvpack.codecs.low_rank.codec import LowRankCodec
from kvpack.codecs.recipes import local, local_log_step
from kvpack.fidelity.model import Judge
from kvpack.formats.safetensors import TensorFile, build_header
from kvpack.formats.source import Capture
from kvpack.jobs import hints
from kvpack.jobs.reader import KvpFile
from kvpack.kvp.inspection import inspect

STEP = local_log_step(3)


@contextmanager
def stacks_by(key: Callable[[PartSpec], object]) -> Iterator[None]:
    """Join the parts that have the same key, instead of all parts of one shape."""

    with patch.object(LowRankCodec, "stack_key", lambda _, part: key(part)):
        yield


def constants(**changed: Any) -> ExitStack:
    """Constants of the stage set otherwise."""
    stack = ExitStack()
    for name, value in changed.items():
        stack.enter_context(patch.object(factors if hasattr(factors, name) else low_rank, name, value))
    return stack


PROBES = ("queries.*", "query_positions")
ROWS: list[tuple[str, Any, int, tuple[str, ...], bool]] = [
    ("unchanged", ExitStack, 10, (), True),
    ("one basis per tensor", lambda: stacks_by(lambda plan: plan.tensor.name), 10, (), True),
    (
        "one basis per layer, for keys and values together",
        lambda: stacks_by(lambda plan: plan.tensor.layer),
        10,
        (),
        True,
    ),
    (
        "one basis for all keys and one for all values",
        lambda: stacks_by(lambda plan: plan.tensor.name.rpartition(".")[2]),
        10,
        (),
        True,
    ),
    ("basis rounded to the nearest numbers", lambda: constants(BASIS_PRICE=0.0), 10, (), True),
    ("no finer steps for the first four tokens", lambda: constants(SINKS=0), 10, (), True),
    ("equal steps for all tokens but the first four", ExitStack, 0, (), True),
    ("exponent of token weights 0.20 instead of 0.10", ExitStack, 20, (), True),
    ("no spread per element", lambda: constants(_spreads=lambda values: np.zeros(len(values), np.int64)), 10, (), True),
    (
        "errors of keys weighted twice as much",
        lambda: patch.object(hints, "KEY_WEIGHT", 2 * hints.KEY_WEIGHT),
        10,
        (),
        True,
    ),
    ("no attention mass", ExitStack, 10, ("attention_mass",), True),
    ("no probe queries, no attention mass", ExitStack, 10, ("attention_mass", *PROBES), True),
    ("no probe queries, no attention mass, RoPE unknown", ExitStack, 10, ("attention_mass", *PROBES), False),
]
"""What is changed, how, the importance, tensors left out of the capture, and whether its metadata are kept."""


def without(path: Path, out: Path, names: tuple[str, ...], metadata: bool) -> Path:
    """A copy of a capture without some tensors, or without its metadata."""
    file = TensorFile.open(path)
    gone = tuple(name.rstrip("*") for name in names)
    kept = [spec for spec in file.tensors.values() if not (gone and spec.name.startswith(gone))]
    header = build_header([(s.name, s.dtype, s.shape) for s in kept], dict(file.metadata) if metadata else {})
    data = b"".join(bytes(file.data(spec)) for spec in kept)
    out.write_bytes(len(header.raw).to_bytes(8, "little") + header.raw + data)
    return out


def main(paths: list[Path]) -> None:
    model, figures = load_model(None), np.zeros((len(ROWS), 3))
    with tempfile.TemporaryDirectory() as folder:
        packed, copy = Path(folder) / "x.kvp", Path(folder) / "x.safetensors"
        for path in paths:
            judge = Judge(model, Capture.open(path))
            for i, (_, changed, importance, names, metadata) in enumerate(ROWS):
                source = without(path, copy, names, metadata)
                with changed():
                    with packed.open("wb") as sink:
                        jobs.compress(source, sink, local(STEP, importance), drop=jobs.PROBES)
                    report = judge.measure(KvpFile.open(packed))
                assert report.plain
                assert report.repeat
                bits = inspect(packed).bits_per_element or 0
                figures[i] += np.array([bits, report.plain.kl_mean, report.repeat.kl_mean]) / len(paths)
    print("| changed | bits/elem | KL plain | KL repeat |\n| --- | --- | --- | --- |")
    for (name, *_), (bits, plain, repeat) in zip(ROWS, figures, strict=True):
        print(f"| {name} | {bits:.3f} | {plain:.4f} | {repeat:.4f} |")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])

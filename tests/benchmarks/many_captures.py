"""Many small captures: one by one on a GPU, together on a GPU, and on the CPU, from file to file.

    python tests/benchmarks/many_captures.py CAPTURE [--files 200] [--tokens 64 256] [--layers 30] [--rounds 5]
                                             [--folder /dev/shm]

Files are made from runs of tokens of CAPTURE (around its end to its start, where it is short), once of one length, as
pages are, once of lengths drawn from the range, as prompts are. Every way writes every file as the command line does,
and must give the same bytes. Rounds alternate between the ways; medians of the wall clock, GB/s of captures.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kvpack import jobs
from kvpack.codecs.recipes import CODECS
from kvpack.formats.captures import layer_of
from kvpack.formats.output import atomic_output
from kvpack.formats.safetensors import build_header
from kvpack.formats.source import Capture
from kvpack.gpu.engine import GpuEngine
from kvpack.gpu.runtime.host import find_gpu

LOSSLESS = CODECS["lossless"]


def write(path: Path, capture: Capture, first: int, tokens: int, layers: int) -> None:
    """A capture of ``tokens`` tokens from ``first`` on, the given one's layers repeated to ``layers``."""
    given = [spec for spec in capture.file.header.tensors if layer_of(spec) is not None]
    there = sorted({layer_of(spec) or 0 for spec in given})
    cuts: list[tuple[str, str, np.ndarray[Any, Any]]] = []
    for layer in range(layers or len(there)):
        for spec in given:
            if layer_of(spec) == there[layer % len(there)]:
                places = np.arange(first, first + tokens) % spec.shape[1]
                name = f"layers.{layer}.{spec.name.rpartition('.')[2]}"
                cuts.append((name, spec.dtype, capture.read(spec.name)[:, places]))
    ids = np.arange(first, first + tokens, dtype=np.int32)
    cuts.append(("tokens", "I32", ids))
    header = build_header([(name, dtype, bits.shape) for name, dtype, bits in cuts], capture.metadata)
    with path.open("wb") as file:
        file.write(len(header.raw).to_bytes(8, "little") + header.raw)
        for _, _, bits in cuts:
            file.write(np.ascontiguousarray(bits).tobytes())


def targets(paths: list[Path]) -> Iterator[tuple[Path, Path]]:
    return ((path, path.with_name(path.name + ".kvp")) for path in paths)


def one_by_one(paths: list[Path], gpu: Any) -> None:
    for path, target in targets(paths):
        with atomic_output(target, force=True) as sink:
            jobs.compress(path, sink, LOSSLESS, engine=GpuEngine(gpu))


def together(paths: list[Path], gpu: Any) -> None:
    plans = (jobs.prepare(Capture.open(path), LOSSLESS) for path in paths)
    for (_, target), writes in zip(targets(paths), jobs.compress_many(plans, engine=GpuEngine(gpu)), strict=True):
        with atomic_output(target, force=True) as sink:
            writes(sink, None)


def seconds(way: Callable[[], None]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def compare(lengths: str, paths: list[Path], gpu: Any, rounds: int) -> None:
    """Check that all ways give the same files, time them, and print a row each."""
    ways: dict[str, Callable[[], None]] = {
        "CPU": lambda: one_by_one(paths, None),
        "GPU, one by one": lambda: one_by_one(paths, gpu),
        "GPU, together": lambda: together(paths, gpu),
    }
    size, expected = sum(path.stat().st_size for path in paths), None
    for name, way in ways.items():
        way()
        made = [target.read_bytes() for _, target in targets(paths)]
        expected = expected or made
        if made != expected:
            sys.exit(f"{name}: not the CPU's files")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way))
    for name, taken in times.items():
        middle = median(taken)
        spread = f"{min(taken):.3f} to {max(taken):.3f}"
        print(
            f"{lengths:<22} {name:<16} {middle:8.3f} {spread:>16} {size / middle / 1e9:7.2f} {len(paths) / middle:9.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capture", type=Path)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--tokens", type=int, nargs=2, default=(64, 256), metavar=("LEAST", "MOST"))
    parser.add_argument("--layers", type=int, default=0, help="repeat the capture's layers to so many")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where files are made: a RAM disk")
    given = parser.parse_args()
    gpu, reason = find_gpu("cuda", 0)
    if gpu is None:
        sys.exit(f"needs a GPU: {reason}")
    capture, generator = Capture.open(given.capture), np.random.default_rng(0)
    least, most = given.tokens
    drawn = generator.integers(least, most + 1, given.files)
    print(f"{given.files} files per row, medians of {given.rounds} rounds")
    print(f"{'tokens per file':<22} {'way':<16} {'seconds':>8} {'spread':>16} {'GB/s':>7} {'files/s':>9}")
    for title, lengths in (
        (f"{most}", np.full(given.files, most)),
        (f"{least} to {most}", drawn),
        (f"{least} to {most}, by 16", -(-drawn // 16) * 16),
    ):
        folder = Path(tempfile.mkdtemp(prefix="kvpack-many-", dir=given.folder))
        try:
            paths = [folder / f"{i}.safetensors" for i in range(given.files)]
            for path, tokens in zip(paths, lengths.tolist(), strict=True):
                write(path, capture, int(generator.integers(1 << 16)), tokens, given.layers)
            compare(title, paths, gpu, given.rounds)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()

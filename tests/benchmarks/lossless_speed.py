"""Speed of the lossless codec beside zstandard, side by side in one run.

    python tests/benchmarks/lossless_speed.py CAPTURE [ROUNDS]

Both work from memory to memory with all processors: kvpack compresses every tensor of the capture, checksums
and container included; zstandard compresses the file's raw bytes at level 3, ``threads=-1``, one frame. Rounds
alternate, because other load comes and goes; the ratios of the two in the same round are what counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import zstandard

from kvpack import jobs
from kvpack.codecs.recipes import CODECS
from kvpack.formats.safetensors import TensorFile, parse_header
from kvpack.formats.source import Capture
from kvpack.jobs.reader import KvpFile
from kvpack.kvp import Container


class Sink(list[bytes]):
    """Collects what is written."""

    def write(self, data: bytes) -> None:
        self.append(data)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    path, rounds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 15
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    capture = Capture(TensorFile(path, parse_header(raw[8 : 8 + length]), memoryview(raw)))

    def kvpack_in() -> Sink:
        sink = Sink()
        next(jobs.compress_many([jobs.prepare(capture, CODECS["lossless"])]))(sink, None)
        return sink

    blob = memoryview(b"".join(kvpack_in()))
    frame = zstandard.ZstdCompressor(level=3, threads=-1).compress(raw)
    runs: dict[str, Callable[[], object]] = {
        "kvpack in": kvpack_in,
        "zstd in": lambda: zstandard.ZstdCompressor(level=3, threads=-1).compress(raw),
        "kvpack out": lambda: jobs.decompress(KvpFile(Container(blob)), Sink()),
        "zstd out": lambda: zstandard.ZstdDecompressor().decompress(frame),
    }
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    print(f"{path.name}: {len(raw)} bytes, {rounds} rounds")
    print(f"ratio: kvpack {len(raw) / len(blob):.3f}, zstd {len(raw) / len(frame):.3f}")
    for way in ("in", "out"):
        ours, theirs = times[f"kvpack {way}"], times[f"zstd {way}"]
        speeds = [f"{len(raw) / median(t) / 1e6:.0f}" for t in (ours, theirs)]
        relative = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        spread = f"{relative[len(relative) // 10]:.2f} to {relative[-1 - len(relative) // 10]:.2f}"
        print(f"{way}: kvpack {speeds[0]} MB/s, zstd {speeds[1]} MB/s; kvpack / zstd {median(relative):.2f} ({spread})")


if __name__ == "__main__":
    main()

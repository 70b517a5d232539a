"""How fast this machine copies from and to files in its page cache, by how many threads, in which way.

python tests/benchmarks/file_copies.py FOLDER MIB THREADS...
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

STEP = 4 << 20
Copy = Callable[[int, int], object]
"""Copies ``size`` bytes at ``offset``."""


def timed(what: str, size: int, threads: int, copy: Copy) -> None:
    """Copy everything once and say how fast."""
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first: copy(first, min(STEP, size - first)), range(0, size, STEP)))
    print(f"{what}, threads {threads}: {size / (time.perf_counter() - start) / 1e9:.2f} GB/s")


def main(folder: str, mib: str, *threads: str) -> None:
    """New files written with ``pwrite`` and through a mapping, one read with ``preadv`` and through a mapping."""
    size, path = int(mib) << 20, Path(folder) / "file_copies.tmp"
    source = np.random.default_rng(0).integers(0, 256, STEP, np.uint8)
    target = np.ones(size, np.uint8)

    def put(view: np.ndarray, first: int, count: int) -> None:
        view[first : first + count] = source[:count]

    def get(view: np.ndarray, first: int, count: int) -> None:
        target[first : first + count] = view[first : first + count]

    for count in map(int, threads):
        path.unlink(missing_ok=True)
        with path.open("w+b") as file:
            number = file.fileno()
            timed("pwrite", size, count, lambda first, n: os.pwrite(number, source[:n].data, first))  # noqa: B023
        path.unlink()
        with path.open("w+b") as file:
            file.truncate(size)
            written = np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)
            timed("written through a mapping", size, count, lambda first, n: put(written, first, n))  # noqa: B023
    for count in map(int, threads):
        with path.open("rb") as file:
            number = file.fileno()
            parts = lambda first, n: os.preadv(number, [target[first : first + n].data], first)  # noqa: B023, E731
            timed("preadv", size, count, parts)
            mapped = np.frombuffer(mmap.mmap(number, size, access=mmap.ACCESS_READ), np.uint8)
            timed("read through a mapping", size, count, lambda first, n: get(mapped, first, n))  # noqa: B023
    path.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])

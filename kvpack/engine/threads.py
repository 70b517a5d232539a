"""A thread pool that keeps order and bounds what is in flight. Compiled stages and hashes release the GIL."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def available_threads() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have the C library keep freed arrays for the next ones, where it is glibc.

    glibc gives arrays under its dynamic mmap threshold back to itself, not to the system, and raises the
    threshold to the largest array freed so far (mallopt(3)). Without this, every part's buffers are faulted in
    page by page again, which measured up to half of the time of decoding.
    """
    np.empty(30 << 20, np.uint8)


def ordered_map(function: Callable[[T], R], items: Iterable[T], threads: int | None = None) -> Iterator[R]:
    """``map`` over ``threads`` threads (default: all processors); results in order, few in flight."""
    threads = threads or available_threads()
    keep_freed_memory()
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

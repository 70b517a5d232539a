"""A thread pool that keeps order and limits the work in progress. Compiled stages and hashes release the GIL."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import numpy as np

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int], None]
"""A function that is called with the number of bytes done and the number of bytes in all."""


class Workers(ThreadPoolExecutor):
    """A pool of threads for a generator, which uses it as a context manager.

    When a generator is given up, Python closes it wherever the last reference goes: by the garbage collector in any
    thread, even in one that holds a lock of the module ``threading``. To wait for a thread there could take forever. So
    what has not begun is cancelled then, and the threads end by themselves. In all other cases they are waited for.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the threads end, and wait for them unless the generator was given up."""
        self.shutdown(wait=kind is not GeneratorExit, cancel_futures=kind is not None)


def available_threads() -> int:
    """Return the number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Make the C library, if it is glibc, keep freed arrays for reuse.

    glibc keeps freed arrays below its dynamic mmap threshold instead of returning them to the system, and it raises the
    threshold to the largest array freed so far (mallopt(3)). Without this call, every part's buffers would again cause
    a page fault for each page, which took up to half of the measured decoding time.
    """
    np.empty(30 << 20, np.uint8)


def ordered_map(function: Callable[[T], R], items: Iterable[T], threads: int | None = None) -> Iterator[R]:
    """Map ``function`` over items on ``threads`` threads (default: all), in order and with few items in progress."""
    threads = threads or available_threads()
    keep_freed_memory()
    pending: deque[Future[R]] = deque()
    with Workers(threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

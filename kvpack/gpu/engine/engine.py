"""The GPU engine: it codes tasks with the same key together, while CPU threads run the other tasks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from kvpack.engine import DecodeTask, Done, Task, Workers, available_threads
from kvpack.engine.cpu import run_task
from kvpack.engine.threads import keep_freed_memory
from kvpack.errors import CorruptError
from kvpack.gpu.engine.fisher import FisherDecoding, FisherEncoding
from kvpack.gpu.engine.kernels import Kernels, Outcome
from kvpack.gpu.engine.lossless import LosslessDecoding, LosslessEncoding
from kvpack.gpu.engine.planes import PlaneDecoding, PlaneEncoding
from kvpack.gpu.engine.staging import read_ahead
from kvpack.gpu.runtime.host import Slot
from kvpack.gpu.runtime.launch import Launcher

SLOTS = 5
"""The number of batches at a time: one staged, two running, one collected, and one whose results are in use."""

AHEAD_BYTES = 256 << 20
"""The most bytes of tasks that may be requested while a task waits for others with its key."""

AHEAD_JOBS = 32
"""The most jobs (files) whose tasks may be requested while a task waits for others with its key. Every job keeps a
file open, and so do the jobs of the running batches."""

AHEAD_CPU = 4
"""The most tasks for each thread that wait for the CPU or for their turn."""


@dataclass
class _Batch:
    """Tasks of one key that wait for more. ``since`` is the number of bytes requested when the first one came."""

    kernels: Kernels
    since: int
    tasks: list[Task] = field(default_factory=list)
    nbytes: int = 0

    def fits(self, task: Task, size: int) -> bool:
        small = self.nbytes + size <= self.kernels.batch_bytes
        return small and self.kernels.joins(self.tasks, task)


class GpuEngine:
    """Runs tasks on a GPU if there are kernels for them, and otherwise on ``threads`` CPU threads.

    ``pinned`` are regions of page-locked memory (uint8). Blocks that lie in them are sent without a copy.
    """

    def __init__(self, gpu: Launcher, threads: int | None = None, pinned: Sequence[torch.Tensor] = ()) -> None:
        """Use ``gpu``, which :func:`kvpack.gpu.runtime.host.find_gpu` returns."""
        self.gpu, self.threads = gpu, threads or available_threads()
        self._kernels: tuple[Kernels, ...] = (
            LosslessEncoding(gpu, pinned),
            LosslessDecoding(gpu, pinned),
            PlaneEncoding(gpu, pinned),
            PlaneDecoding(gpu, pinned),
            FisherEncoding(gpu, pinned),
            FisherDecoding(gpu, pinned),
        )
        self._lock = threading.Lock()
        self._idle: list[list[Slot]] = []

    def run(self, tasks: Iterable[Task]) -> Iterator[Done]:
        """Yield results in any order. See :class:`kvpack.engine.Engine`."""
        with self._lock:
            slots = self._idle.pop() if self._idle else [Slot(self.gpu) for _ in range(SLOTS)]
        slots[0].synchronize()  # rooms may have been made on other streams
        pipeline = _Pipeline(slots)
        keep_freed_memory()
        with Workers(self.threads) as pool:
            cpu = _Background(pool, AHEAD_CPU * self.threads)
            try:
                for kernels, batch in self._batches(tasks):
                    if kernels is None:
                        yield from cpu.add(batch[0])
                    else:
                        for outcome in pipeline.push(kernels, batch):
                            if isinstance(outcome, Done):
                                yield outcome
                            else:
                                yield from cpu.add(outcome)
                    yield from cpu.ready()
                for outcome in pipeline.drain():
                    if isinstance(outcome, Done):
                        yield outcome
                    else:
                        yield from cpu.add(outcome)
                yield from cpu.drain()
            finally:
                pipeline.wait()
        with self._lock:
            self._idle.append(slots)

    def _batches(self, tasks: Iterable[Task]) -> Iterator[tuple[Kernels | None, list[Task]]]:
        """Yield batches of tasks with one key, each limited in size and waiting, and single tasks without kernels."""
        waiting: dict[Hashable, _Batch] = {}
        passed = 0
        for task in read_ahead(tasks):
            kernels, key = self._route(task)
            size = task.nbytes
            if kernels is None:
                yield None, [task]
            else:
                held = waiting.get(key)
                if held is not None and not held.fits(task, size):
                    yield kernels, waiting.pop(key).tasks
                    held = None
                if held is None:
                    held = waiting[key] = _Batch(kernels, passed)
                held.tasks.append(task)
                held.nbytes += size
            passed += size
            while len(waiting) > (kernels is not None) and _overdue(next(iter(waiting.values())), passed, task):
                oldest = waiting.pop(next(iter(waiting)))
                yield oldest.kernels, oldest.tasks
        yield from ((batch.kernels, batch.tasks) for batch in waiting.values())

    def _route(self, task: Task) -> tuple[Kernels | None, Hashable]:
        for number, kernels in enumerate(self._kernels):
            key = kernels.key(task)
            if key is not None:
                return kernels, (number, key)
        return None, None


def _overdue(batch: _Batch, passed: int, task: Task) -> bool:
    return passed - batch.since >= AHEAD_BYTES or task.ticket.job - batch.tasks[0].ticket.job >= AHEAD_JOBS


class _Pipeline:
    """Batches at several steps: while one is finished, later ones are collected, running and staged."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots, self._number = slots, 0
        self._staged: deque[tuple[Kernels, Any]] = deque()
        self._under_way: deque[tuple[Kernels, Any]] = deque()
        self._collected: deque[tuple[Kernels, Any]] = deque()

    def push(self, kernels: Kernels, tasks: list[Task]) -> Iterator[Outcome]:
        """Take one more batch, and yield the results of an earlier one."""
        slot = self._slots[self._number % SLOTS]
        self._number += 1
        self._staged.append((kernels, kernels.stage(tasks, slot)))
        if len(self._staged) > 1:
            yield from self._start()
        if len(self._under_way) > 2:
            self._collect()
        if len(self._collected) > 1:
            yield from self._finish()

    def drain(self) -> Iterator[Outcome]:
        """Yield all remaining results."""
        while self._staged:
            yield from self._start()
        while self._under_way:
            self._collect()
            if len(self._collected) > 1:
                yield from self._finish()
        while self._collected:
            yield from self._finish()

    def wait(self) -> None:
        """Wait for the running batches, so that the memory they use can be released."""
        for slot in self._slots:
            slot.wait()

    def _start(self) -> Iterator[Outcome]:
        """Start the next batch. If it is corrupt, yield its tasks, so that the CPU reports what is wrong."""
        kernels, staged = self._staged.popleft()
        try:
            self._under_way.append((kernels, kernels.start(staged)))
        except CorruptError:
            yield from staged.tasks

    def _collect(self) -> None:
        kernels, started = self._under_way.popleft()
        self._collected.append((kernels, kernels.collect(started)))

    def _finish(self) -> Iterator[Outcome]:
        kernels, collected = self._collected.popleft()
        return kernels.finish(collected)


class _Background:
    """Tasks that the CPU runs at the same time. Their results are yielded in the order of the tasks."""

    def __init__(self, pool: ThreadPoolExecutor, most: int) -> None:
        self._pool, self._most = pool, most
        self._pending: deque[Future[Done]] = deque()

    def add(self, task: Task) -> Iterator[Done]:
        while len(self._pending) >= self._most:
            yield self._pending.popleft().result()
        self._pending.append(self._pool.submit(_on_cpu, task))

    def ready(self) -> Iterator[Done]:
        while self._pending and self._pending[0].done():
            yield self._pending.popleft().result()

    def drain(self) -> Iterator[Done]:
        while self._pending:
            yield self._pending.popleft().result()


def _on_cpu(task: Task) -> Done:
    """Run a task on the CPU. If its room is in a GPU's memory, send the decoded data there."""
    if not isinstance(task, DecodeTask) or task.room is None:
        return run_task(task)
    done = run_task(replace(task, room=None))
    if done.error is not None:
        return done
    for target, bits in zip(task.room.arrays, done.arrays, strict=True):
        signed = np.ascontiguousarray(bits).view(np.dtype(f"i{bits.itemsize}"))
        target.copy_(torch.from_numpy(signed))
    return Done(task.ticket)

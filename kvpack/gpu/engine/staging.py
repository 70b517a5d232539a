"""Bring bytes to a GPU: threads read them and copy them into pinned memory, or they are sent from where they are."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.cache import Window
from kvpack.engine import DecodeTask, Task, available_threads
from kvpack.gpu.runtime.host import Slot
from kvpack.kvp.frame import FramePart
from kvpack.kvp.reader import Stored
from kvpack.numerics.floats import Bits

ALIGNED = 256
"""Data is sent from addresses that are multiples of this."""

READERS = 4
"""The number of threads that read captures head by head. More would wait for each other: a read ends in Python."""

READ_BYTES = 192 << 20
"""Blocks of this many bytes, once decoded, are read ahead."""

RUN_BYTES = 8 << 20
"""The most bytes of a file that are read at a time."""

COPY_BYTES = 4 << 20
"""The number of bytes that a thread copies at a time."""


@dataclass(frozen=True)
class Staged:
    """Pinned bytes, which are complete once :meth:`ready` has returned. The requested bytes begin at ``skip``."""

    host: torch.Tensor
    copies: Sequence[Future[None]] = ()
    skip: int = 0
    alive: Any = None

    def ready(self) -> torch.Tensor:
        """Wait for the copies, and return the bytes."""
        for copy in self.copies:
            copy.result()
        return self.host


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(available_threads())


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(READERS, available_threads()))


def stage(slot: Slot, pieces: Iterable[NDArray[Any]], pinned: Sequence[torch.Tensor] = ()) -> Staged:
    """Copy contiguous pieces one after another into ``slot``'s pinned memory, whose last use must be over.

    If all pieces already lie in a row in one of the regions ``pinned``, they are not copied.
    """
    alive = list(pieces)
    runs = _merged(alive)
    if len(runs) == 1:
        for region in pinned:
            offset = runs[0][0] - region.data_ptr()
            if offset >= 0 and offset + runs[0][1] <= len(region):
                skip = offset % ALIGNED
                return Staged(region[offset - skip : offset + runs[0][1]], skip=skip, alive=alive)
    host = slot.pinned(sum(size for _, size in runs))
    at, copies = host.data_ptr(), _Copies((host, alive))
    for address, size in runs:
        for first in range(0, size, COPY_BYTES):
            take = min(COPY_BYTES, size - first)
            copies.add(at, address + first, take)
            at += take
    return Staged(host, copies.submitted())  # until the last copy is done, the copies keep what they read


class _Copies:
    """Memory copies, which are handed to threads some megabytes at a time."""

    def __init__(self, alive: object) -> None:
        """Keep ``alive``, which holds the source and target memory, until the last copy is done."""
        self._alive = alive
        self._futures: list[Future[None]] = []
        self._waiting: list[tuple[int, int, int]] = []
        self._bytes = 0

    def add(self, target: int, source: int, size: int) -> None:
        self._waiting.append((target, source, size))
        self._bytes += size
        if self._bytes >= COPY_BYTES:
            self.submitted()

    def submitted(self) -> list[Future[None]]:
        if self._waiting:
            self._futures.append(_pool().submit(_copy, self._waiting, self._alive))
            self._waiting, self._bytes = [], 0
        return self._futures


def _copy(pieces: list[tuple[int, int, int]], _alive: object) -> None:
    for target, source, size in pieces:
        ctypes.memmove(target, source, size)


def _merged(pieces: Iterable[NDArray[Any]]) -> list[tuple[int, int]]:
    """Return addresses and sizes of the pieces, with pieces that are adjacent in memory merged."""
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        address, size = piece.__array_interface__["data"][0], piece.nbytes
        if runs and sum(runs[-1]) == address:
            runs[-1] = (runs[-1][0], runs[-1][1] + size)
        elif size:
            runs.append((address, size))
    return runs


def stage_windows(
    slot: Slot, blocks: Sequence[Window], orders: Sequence[Sequence[int]], pinned: Sequence[torch.Tensor] = ()
) -> Staged:
    """Copy the arrays of blocks, each block's in its order, as :func:`stage` does.

    Arrays that must be read first are read to pinned memory by several threads. Each block's order has all its parts.
    """
    every = list(zip(blocks, orders, strict=True))
    if not any(block.unread for block in blocks):
        return stage(slot, pieces_of(block.arrays[i] for block, order in every for i in order), pinned)
    sizes = [sum(block.spec.parts[i].nbytes for i in order) for block, order in every]
    host = slot.pinned(sum(sizes))
    places = np.split(host.numpy()[: sum(sizes)], np.cumsum(sizes)[:-1])
    copies = [_readers().submit(_load, block, order, at) for (block, order), at in zip(every, places, strict=True)]
    return Staged(host, copies)


def _load(block: Window, order: Sequence[int], place: NDArray[np.uint8]) -> None:
    """Read the arrays of a block to ``place``, one after another in their order."""
    into: list[Bits] = [np.empty(0, np.uint16)] * len(block.spec.parts)
    at = 0
    for i in order:
        part = block.spec.parts[i]
        own = place[at : at + part.nbytes]
        into[i] = own.view(f"<u{part.tensor.itemsize}").reshape(part.shape)
        at += part.nbytes
    block.load(into)


def read_ahead(tasks: Iterable[Task]) -> Iterator[Task]:
    """Yield tasks in their order, with the parts of those to decode read by several threads.

    Blocks that lie in a row in a file are read together, because thousands of small reads would wait for Python.
    """
    reading: deque[tuple[list[DecodeTask], Future[None]]] = deque()
    run: list[DecodeTask] = []
    held = 0
    for task in tasks:
        if not isinstance(task, DecodeTask):
            yield task
            continue
        if run and not _joins(run, task):
            reading.append((run, _pool().submit(_read, run)))
            run = []
        run.append(task)
        held += task.nbytes
        while held > READ_BYTES and reading:
            some, read = reading.popleft()
            read.result()
            held -= sum(one.nbytes for one in some)
            yield from some
    if run:
        reading.append((run, _pool().submit(_read, run)))
    for some, read in reading:
        read.result()
        yield from some


def _joins(run: list[DecodeTask], task: DecodeTask) -> bool:
    """Return whether a task's parts are read together with those of a run."""
    first, last, own = run[0].read, run[-1].read, task.read
    if not (isinstance(first, Stored) and isinstance(last, Stored) and isinstance(own, Stored)):
        return False
    return own.source is last.source and own.start == last.stop and own.stop - first.start <= RUN_BYTES


def _read(run: list[DecodeTask]) -> None:
    first, last = run[0].read, run[-1].read
    if len(run) > 1 and isinstance(first, Stored) and isinstance(last, Stored):
        data = first.source.read(first.start, last.stop)
        for task in run:
            assert isinstance(task.read, Stored)
            vars(task)["parts"] = task.read.within(data, first.start)
    else:
        run[0].parts  # noqa: B018 - this reads them


def pieces_of(arrays: Iterable[Bits]) -> Iterator[Bits]:
    """Yield the contiguous pieces of arrays ``[H, T, D]`` whose heads are contiguous."""
    for bits in arrays:
        if bits.flags.c_contiguous:
            yield bits
        else:
            yield from bits


def streams_of(parts: Iterable[FramePart]) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of the parts' streams, one part after another."""
    for part in parts:
        if part.joined is not None:
            yield np.frombuffer(part.joined, np.uint8)
        else:
            yield from (np.frombuffer(stream.data, np.uint8) for stream in part.streams)


def signed(values: Iterable[int]) -> list[int]:
    """Return 64-bit unsigned values as the signed values that torch's int64 holds."""
    return [value - (1 << 64) if value >> 63 else value for value in values]


def unsigned(values: torch.Tensor) -> list[int]:
    """Return the unsigned values whose bits are in an int64 tensor in main memory."""
    found: list[int] = values.contiguous().numpy().view(np.uint64).tolist()
    return found

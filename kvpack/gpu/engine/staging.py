"""Bytes on their way to a GPU: from files' mappings into pinned memory by several threads, or pinned already."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvpack.engine.threads import available_threads
from kvpack.gpu.runtime.host import Slot
from kvpack.kvp.layout import PartPlan

if TYPE_CHECKING:
    import torch

SLOTS = 5
"""Batches at a time: one that is staged, two under way, one collected, one that is used."""

ALIGNED = 256
"""What addresses that are sent from are a multiple of."""

COPY_BYTES = 4 << 20
"""Bytes that a thread copies at a time."""

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")
Out = TypeVar("Out")
Piece = tuple[int, int]
"""Offset and size in bytes."""


@dataclass(frozen=True)
class Staged:
    """Pinned bytes, once :meth:`ready` has returned; those that were asked for begin at ``skip``."""

    host: torch.Tensor
    copies: Sequence[Future[None]] = ()
    skip: int = 0

    def ready(self) -> torch.Tensor:
        """Wait for the copies."""
        for copy in self.copies:
            copy.result()
        return self.host


class Source:
    """A file's bytes."""

    def __init__(self, data: memoryview | torch.Tensor) -> None:
        """Over a view, from which pieces are copied; or over pinned memory, from which pieces in a row are sent."""
        self.pinned = None if isinstance(data, memoryview) else data
        self._view = np.frombuffer(data, np.uint8) if isinstance(data, memoryview) else data.numpy()

    def stage(self, slot: Slot, pieces: Iterable[Piece]) -> Staged:
        """:func:`stage` for pieces of this file alone."""
        return stage(slot, ((self, *piece) for piece in pieces))

    def copy(self, target: NDArray[np.uint8], offset: int) -> None:
        """Fill ``target`` with the bytes from ``offset`` on."""
        target[:] = self._view[offset : offset + len(target)]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(available_threads())


def stage(slot: Slot, pieces: Iterable[tuple[Source, int, int]]) -> Staged:
    """Pieces (file, offset, size), one behind another, in ``slot``'s pinned memory: its last use must be over."""
    runs = _merged(pieces)
    pinned = runs[0][0].pinned if len(runs) == 1 else None
    if pinned is not None:
        _, offset, size = runs[0]
        skip = offset % ALIGNED
        return Staged(pinned[offset - skip : offset + size], skip=skip)
    host = slot.pinned(sum(size for _, _, size in runs))
    target, at, copies = host.numpy(), 0, []
    for source, offset, size in runs:
        for first in range(0, size, COPY_BYTES):
            take = min(COPY_BYTES, size - first)
            copies.append(_pool().submit(source.copy, target[at : at + take], offset + first))
            at += take
    return Staged(host, copies)


def _merged(pieces: Iterable[tuple[Source, int, int]]) -> list[tuple[Source, int, int]]:
    """Pieces with those that follow each other in a file as one."""
    runs: list[tuple[Source, int, int]] = []
    for source, offset, size in pieces:
        if runs and runs[-1][0] is source and sum(runs[-1][1:]) == offset:
            runs[-1] = (source, runs[-1][1], runs[-1][2] + size)
        else:
            runs.append((source, offset, size))
    return runs


def pieces_of(plan: PartPlan, data_start: int) -> list[Piece]:
    """Where a part's ``[H, T, D]`` lie in its safetensors file."""
    spec, start = plan.tensor, data_start + plan.tensor.start
    heads, tokens, dims = plan.shape
    row, total = dims * spec.itemsize, spec.shape[1] if plan.layer is not None else tokens
    if total == tokens:
        return [(start, heads * tokens * row)]
    return [(start + (head * total + plan.first) * row, tokens * row) for head in range(heads)]


def in_batches(items: Iterable[T], joins: Callable[[list[T], T], bool]) -> Iterator[list[T]]:
    """Items in a row, for as long as the next one ``joins`` the batch."""
    batch: list[T] = []
    for item in items:
        if batch and not joins(batch, item):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def pipelined(
    items: Iterable[T],
    stage: Callable[[T, Slot], S],
    start: Callable[[S], R],
    collect: Callable[[R], R],
    finish: Callable[[R], Iterable[Out]],
    slots: Sequence[Slot],
) -> Iterator[Out]:
    """What ``finish`` gives for every item in order, while later ones are staged, under way or collected elsewhere.

    ``collect`` may wait for results whose size must be known before they are fetched: two more are under way meanwhile.
    """
    staged: deque[S] = deque()
    under_way: deque[R] = deque()
    collected: deque[R] = deque()
    for number, item in enumerate(items):
        staged.append(stage(item, slots[number % SLOTS]))
        if len(staged) > 1:
            under_way.append(start(staged.popleft()))
        if len(under_way) > 2:
            collected.append(collect(under_way.popleft()))
        if len(collected) > 1:
            yield from finish(collected.popleft())
    under_way.extend(map(start, staged))
    while under_way:
        collected.append(collect(under_way.popleft()))
        if len(collected) > 1:
            yield from finish(collected.popleft())
    while collected:
        yield from finish(collected.popleft())


def signed(values: Iterable[int]) -> list[int]:
    """64-bit unsigned values as torch's int64 holds them."""
    return [value - (1 << 64) if value >> 63 else value for value in values]


def unsigned(values: Iterable[Any]) -> list[int]:
    """And back."""
    return [int(value) % (1 << 64) for value in values]

"""Bytes on their way to a GPU: from where they lie into pinned memory, by several threads, or sent from there."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.engine import available_threads
from kvpack.gpu.runtime.host import Slot
from kvpack.kvp.frame import FramePart
from kvpack.numerics.floats import Bits

ALIGNED = 256
"""Addresses that are sent from are multiples of this."""

COPY_BYTES = 4 << 20
"""Bytes that a thread copies at a time."""


@dataclass(frozen=True)
class Staged:
    """Pinned bytes, once :meth:`ready` has returned; those that were asked for begin at ``skip``."""

    host: torch.Tensor
    copies: Sequence[Future[None]] = ()
    skip: int = 0
    alive: Any = None

    def ready(self) -> torch.Tensor:
        """Wait for the copies."""
        for copy in self.copies:
            copy.result()
        return self.host


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(available_threads())


def stage(slot: Slot, pieces: Iterable[NDArray[Any]], pinned: Sequence[torch.Tensor] = ()) -> Staged:
    """Contiguous pieces one behind another in ``slot``'s pinned memory, whose last use must be over.

    Pieces in a row that lie in one of the regions ``pinned`` already are not copied.
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
    return Staged(host, copies.submitted(), alive=alive)


class _Copies:
    """Copies in memory, handed to threads some megabytes at a time."""

    def __init__(self, alive: object) -> None:
        """``alive`` holds the memory that is copied from and to, until the last copy is done."""
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
    """Addresses and sizes, of pieces that follow each other in memory as one."""
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        address, size = piece.__array_interface__["data"][0], piece.nbytes
        if runs and sum(runs[-1]) == address:
            runs[-1] = (runs[-1][0], runs[-1][1] + size)
        elif size:
            runs.append((address, size))
    return runs


def pieces_of(arrays: Iterable[Bits]) -> Iterator[Bits]:
    """The contiguous pieces of arrays ``[H, T, D]`` whose heads are contiguous."""
    for bits in arrays:
        if bits.flags.c_contiguous:
            yield bits
        else:
            yield from bits


def streams_of(parts: Iterable[FramePart]) -> Iterator[NDArray[np.uint8]]:
    """The bytes of the streams of parts, one part behind another."""
    for part in parts:
        if part.joined is not None:
            yield np.frombuffer(part.joined, np.uint8)
        else:
            yield from (np.frombuffer(stream.data, np.uint8) for stream in part.streams)


def signed(values: Iterable[int]) -> list[int]:
    """64-bit unsigned values as torch's int64 holds them."""
    return [value - (1 << 64) if value >> 63 else value for value in values]


def unsigned(values: torch.Tensor) -> list[int]:
    """The unsigned values whose bits an int64 tensor in main memory holds."""
    found: list[int] = values.contiguous().numpy().view(np.uint64).tolist()
    return found

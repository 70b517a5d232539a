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
from kvpack.numerics.floats import Bits

ALIGNED = 256
"""Addresses that are sent from are multiples of this."""

COPY_BYTES = 4 << 20
"""Bytes that a thread copies at a time."""

Octets = NDArray[np.uint8]


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
    target, at, copies = host.numpy(), 0, []
    for address, size in runs:
        source = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        for first in range(0, size, COPY_BYTES):
            take = min(COPY_BYTES, size - first)
            copies.append(_pool().submit(_copy, target[at : at + take], source[first : first + take]))
            at += take
    return Staged(host, copies, alive=alive)


def _copy(target: Octets, source: Octets) -> None:
    target[:] = source


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


def signed(values: Iterable[int]) -> list[int]:
    """64-bit unsigned values as torch's int64 holds them."""
    return [value - (1 << 64) if value >> 63 else value for value in values]


def unsigned(values: torch.Tensor) -> list[int]:
    """The unsigned values whose bits an int64 tensor in main memory holds."""
    found: list[int] = values.contiguous().numpy().view(np.uint64).tolist()
    return found

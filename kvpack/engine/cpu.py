"""The CPU engine: each task is one call of its codec, on a pool of threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress

import numpy as np

from kvpack.codecs.chain.base import UnrepresentableError
from kvpack.codecs.protocol import PartStreams
from kvpack.engine.tasks import DecodeTask, Done, EncodeTask, Task
from kvpack.engine.threads import Workers, available_threads, keep_freed_memory
from kvpack.errors import CorruptError
from kvpack.kvp.frame import FramePart, Stream
from kvpack.numerics.checksum import checksum
from kvpack.numerics.floats import Bits

BUDGET = 96 << 20
"""The most bytes of blocks that may be in work or wait for their turn, beyond one block for each thread."""

WORKERS = "kvpack-worker"
"""What the names of the threads begin with."""

BLOCK = 4 << 20
"""A block for each thread counts for this many bytes. Of larger ones no more than two are in work beyond the budget."""

MAX_AHEAD = 4
"""The most tasks for each thread that may be in work or wait for their turn."""


class CpuEngine:
    """Runs tasks on ``threads`` threads (default: all processors), and yields results in the order of the tasks."""

    def __init__(self, threads: int | None = None, budget: int = BUDGET) -> None:
        """Limit the blocks in work or waiting to ``budget`` bytes. See :data:`BUDGET`."""
        self.threads, self.budget = threads or available_threads(), budget

    def run(self, tasks: Iterable[Task]) -> Iterator[Done]:
        """Yield the results of tasks. See :class:`kvpack.engine.tasks.Engine`."""
        keep_freed_memory()
        pending: deque[tuple[Future[Done], int]] = deque()
        held = 0
        with Workers(self.threads, WORKERS) as pool:
            for task in tasks:
                while self._full(len(pending), held + task.nbytes):
                    future, size = pending.popleft()
                    yield future.result()
                    del future
                    held -= size
                pending.append((pool.submit(run_task, task), task.nbytes))
                held += task.nbytes
            while pending:
                yield pending.popleft()[0].result()

    def _full(self, count: int, held: int) -> bool:
        """Return whether to wait for a result, with ``count`` tasks under way and ``held`` bytes if one is added."""
        if count >= self.threads:
            return held > self.budget or count >= MAX_AHEAD * self.threads
        return count >= 2 and held > self.budget + self.threads * BLOCK


def run_task(task: Task) -> Done:
    """Run a task and return its result. An error becomes part of the result, and numpy warns of no number in a file."""
    try:
        with np.errstate(all="ignore"):
            return encode_block(task) if isinstance(task, EncodeTask) else decode_block(task)
    except Exception as error:
        return Done(task.ticket, error=error)


def encode_block(task: EncodeTask) -> Done:
    """Encode a block with the first of its codecs that can represent it."""
    number, streams = _encoded(task)
    every = zip(task.block.arrays, streams, strict=True)
    parts = (FramePart(number, checksum(np.ascontiguousarray(array)), _summed(own)) for array, own in every)
    return Done(task.ticket, tuple(parts))


def _encoded(task: EncodeTask) -> tuple[int, list[PartStreams]]:
    *others, (last, carrier) = task.codecs
    for number, codec in others:
        with suppress(UnrepresentableError):
            return number, codec.encode(task.block, task.context, task.hints)
    return last, carrier.encode(task.block, task.context, task.hints)


def _summed(streams: PartStreams) -> tuple[Stream, ...]:
    return tuple(Stream(name, data, checksum(data)) for name, data in streams)


def decode_block(task: DecodeTask) -> Done:
    """Decode a block, and verify its checksums and the digests of exact parts.

    Raises:
        CorruptError: A checksum or a digest does not match, or the coding is invalid.
        MismatchError: A model that ran again did not compute what it computed when the file was written.

    """
    parts = task.load()
    streams = [_verified(spec.label, part) for spec, part in zip(task.block.parts, parts, strict=True)]
    try:
        arrays = task.codec.decode(task.block, streams, task.context)
    except CorruptError as error:
        raise CorruptError(f"{task.block.parts[0].label}: {error}") from None
    for spec, part, bits in zip(task.block.parts, parts, arrays, strict=True):
        if task.codec.exact(spec) and checksum(bits) != part.digest:
            if task.context.replay is None:
                raise CorruptError(f"corrupt: {spec.label} does not match the digest of the original")
            task.context.replay.differs(spec.label)
    return placed(task, arrays)


def _verified(label: str, part: FramePart) -> PartStreams:
    for name, data, expected in part.streams:
        if checksum(data) != expected:
            raise CorruptError(f"corrupt: the checksum of {label}, stream {name!r}, does not match")
    return [(name, data) for name, data, _ in part.streams]


def placed(task: DecodeTask, arrays: list[Bits]) -> Done:
    """Return the result of a task whose parts decode to ``arrays``. If the task has a room, copy them into it."""
    if task.room is None:
        return Done(task.ticket, arrays=tuple(arrays))
    for target, bits in zip(task.room.arrays, arrays, strict=True):
        target[...] = bits
    return Done(task.ticket)

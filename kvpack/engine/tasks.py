"""Tasks: each is one block to encode or decode, with everything needed for it.

An engine takes tasks in some order and yields results in any order. A **ticket** says which task a result belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from kvpack.cache import Window, WindowSpec
from kvpack.codecs.context import DecodeContext, Hints
from kvpack.codecs.protocol import Codec
from kvpack.kvp.frame import FramePart
from kvpack.numerics.floats import Bits


class Ticket(NamedTuple):
    """The task that a result belongs to: its job (a file), window and block, each counted from 0."""

    job: int
    window: int
    block: int


class Room(NamedTuple):
    """The memory to decode a block to: for each part a strided numpy or torch array ``[H, T, D]``, on any device."""

    arrays: tuple[Any, ...]


@dataclass(eq=False)
class EncodeTask:
    """A block to encode.

    ``codecs`` are tried in order until one can represent the block. Each comes with its number in the file.
    """

    ticket: Ticket
    block: Window
    codecs: tuple[tuple[int, Codec], ...]
    context: DecodeContext
    hints: Hints

    @cached_property
    def nbytes(self) -> int:
        """Return the size of the block's elements in bytes."""
        return self.block.spec.nbytes


@dataclass(eq=False)
class DecodeTask:
    """A block to decode into ``room``. If that is None, the result has arrays of its own.

    ``read`` gives the block's parts as they are stored. It is called where the task is worked on, because it may read
    a file.
    """

    ticket: Ticket
    block: WindowSpec
    read: Callable[[], tuple[FramePart, ...]]
    codec: Codec
    context: DecodeContext
    room: Room | None = None

    @cached_property
    def parts(self) -> tuple[FramePart, ...]:
        """Return the block's parts, which are read once."""
        return self.read()

    def load(self) -> tuple[FramePart, ...]:
        """Return the block's parts, and keep none that had to be read."""
        return self.parts if "parts" in vars(self) else self.read()

    @cached_property
    def nbytes(self) -> int:
        """Return the size of the block's elements in bytes."""
        return self.block.nbytes


Task = EncodeTask | DecodeTask


class Done(NamedTuple):
    """A result: the encoded parts of a block, or the bit patterns of a block decoded without a room.

    An ``error`` is raised when the result is taken by its ticket.
    """

    ticket: Ticket
    parts: tuple[FramePart, ...] = ()
    arrays: tuple[Bits, ...] = ()
    error: Exception | None = None


class Engine(Protocol):
    """Runs tasks."""

    def run(self, tasks: Iterable[Task]) -> Iterator[Done]:
        """Yield a result for every task, in any order.

        Tasks are requested ahead of the results, within a budget of bytes.
        """

"""Tasks: one block to encode or decode, with everything that it takes.

An engine takes tasks in an order and gives results in any order. A **ticket** says where a result belongs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from kvpack.cache import Window, WindowSpec
from kvpack.codecs.context import DecodeContext, Hints
from kvpack.codecs.protocol import Codec
from kvpack.kvp.frame import FramePart
from kvpack.numerics.floats import Bits


class Ticket(NamedTuple):
    """Whose result it is: of which job (a file), window and block, each counted from 0."""

    job: int
    window: int
    block: int


class Room(NamedTuple):
    """Where a block is decoded to: for each part a numpy or torch array ``[H, T, D]``, strided, on any device."""

    arrays: tuple[Any, ...]


@dataclass(eq=False)
class EncodeTask:
    """A block to encode.

    ``codecs`` are tried in order until one can represent the block; each comes with its number in the file.
    """

    ticket: Ticket
    block: Window
    codecs: tuple[tuple[int, Codec], ...]
    context: DecodeContext
    hints: Hints

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the block's elements."""
        return self.block.spec.nbytes


@dataclass(eq=False)
class DecodeTask:
    """A block to decode: into ``room``, or with None into arrays that come with the result."""

    ticket: Ticket
    block: WindowSpec
    parts: tuple[FramePart, ...]
    codec: Codec
    context: DecodeContext
    room: Room | None = None

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the block's elements."""
        return self.block.nbytes


Task = EncodeTask | DecodeTask


class Done(NamedTuple):
    """A result: the parts of a block that was encoded, or the bit patterns of one that was decoded without a room.

    An ``error`` is raised by whoever waits for the ticket.
    """

    ticket: Ticket
    parts: tuple[FramePart, ...] = ()
    arrays: tuple[Bits, ...] = ()
    error: Exception | None = None


class Engine(Protocol):
    """Runs tasks."""

    def run(self, tasks: Iterable[Task]) -> Iterator[Done]:
        """A result for every task, in any order.

        Tasks are asked for ahead of the results, by no more than a budget of bytes.
        """

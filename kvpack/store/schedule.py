"""How the tokens of objects were made: prefilled in chunks, or by decode steps of one token each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from kvpack.cache.metadata import Schedule

PREFILL, DECODE, UNKNOWN = "prefill", "decode", "unknown"
MADE = (PREFILL, DECODE, UNKNOWN)
"""The ways in which an object's tokens may have been made: all prefilled, some by decode steps, or nobody says."""


@dataclass(frozen=True)
class Piece:
    """The part of a schedule that made one object's tokens.

    ``prefill`` are the tokens of each prefill chunk in it. The first of them is the rest of a chunk that began before
    if ``continues`` is set. ``decode`` is the number of decode steps.
    """

    prefill: tuple[int, ...]
    decode: int
    continues: bool

    @classmethod
    def of(cls, schedule: Schedule, start: int, stop: int) -> Self:
        """Return the piece of a whole schedule that made tokens ``[start, stop)``."""
        sizes, continues, at = [], False, 0
        for size in schedule.prefill:
            own = min(at + size, stop) - max(at, start)
            if own > 0:
                continues |= at < start
                sizes.append(own)
            at += size
        return cls(tuple(sizes), stop - start - sum(sizes), continues)

    @property
    def made(self) -> str:
        """How the tokens were made: by decode steps if any of them was."""
        return DECODE if self.decode else PREFILL

    def first(self, tokens: int) -> Piece:
        """Return the piece for the first tokens alone."""
        cut = Piece.of(Schedule(self.prefill, self.decode), 0, tokens)
        return Piece(cut.prefill, cut.decode, self.continues)

    def to_json(self) -> dict[str, Any]:
        """Return the piece as an object's metadata carry it."""
        return {"prefill": list(self.prefill), "decode": self.decode, "continues": self.continues}

    @classmethod
    def from_json(cls, document: Any, tokens: int) -> Self | None:
        """Return the piece of a document for so many tokens, or None if it is none."""
        if not isinstance(document, dict) or set(document) != {"prefill", "decode", "continues"}:
            return None
        sizes, decode, continues = document["prefill"], document["decode"], document["continues"]
        if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
            return None
        if type(decode) is not int or decode < 0 or sum(sizes) + decode != tokens or not isinstance(continues, bool):
            return None
        return cls(tuple(sizes), decode, continues)


def made_of(schedule: Schedule | None, stop: int) -> str:
    """Return how a window of a text that ends before position ``stop`` was made."""
    if schedule is None:
        return UNKNOWN
    return DECODE if stop > schedule.prefilled else PREFILL


def joined(pieces: Sequence[Piece | None]) -> dict[str, Any] | None:
    """Return the schedule of pieces one after another as a capture's metadata have it, or None if one is unknown.

    Prefilled tokens that follow decode steps cannot be written as a schedule, and give None too.
    """
    prefill: list[int] = []
    decode = 0
    for piece in pieces:
        if piece is None or (decode and piece.prefill):
            return None
        sizes = list(piece.prefill)
        if piece.continues and prefill and sizes:
            prefill[-1] += sizes.pop(0)
        prefill += sizes
        decode += piece.decode
    return {"prefill": prefill, "decode": decode}

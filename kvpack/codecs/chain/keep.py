"""``keep``: the first tokens (attention sinks) and the last tokens, which a lossy codec stores uncoded and exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvpack.codecs.chain.base import Part, Stage


@dataclass(frozen=True)
class Keep(Stage):
    """Keeps the first ``first`` tokens and at least the last ``last`` tokens exactly.

    The number of tokens between them, which are coded, is a multiple of ``group``.
    """

    name: ClassVar[str] = "keep"
    version: ClassVar[int] = 1

    first: int
    last: int
    group: int

    def __post_init__(self) -> None:
        """Check the configuration."""
        if min(self.first, self.last) < 0 or max(self.first, self.last) > 1 << 31 or not 1 <= self.group <= 65536:
            raise ValueError("first and last are 0 to 2**31, group is 1 to 65536")

    @property
    def prefix_stable(self) -> bool:
        """Whether no last tokens are kept, so that more tokens after a row change nothing."""
        return self.last == 0 and self.group == 1

    def coded(self, part: Part) -> tuple[int, int]:
        """Return the range ``[start, stop)`` of the part's tokens that are coded; the others are kept exactly.

        While more tokens may follow none are the last ones, and groups count from the part's first coded token.
        """
        start = min(max(self.first - part.position, 0), part.shape[1])
        if part.length is None:
            return start, start + (part.shape[1] - start) // self.group * self.group
        end = self.first + max(0, part.length - self.first - self.last) // self.group * self.group
        return start, max(start, min(end - part.first, part.shape[1]))

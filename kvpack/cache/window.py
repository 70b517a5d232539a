"""A window of a cache together with its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpack.cache.spec import WindowSpec

if TYPE_CHECKING:
    from kvpack.numerics.floats import Bits


@dataclass(frozen=True, eq=False)
class Window:
    """A window, or a block of it, with its bit patterns: strided views ``[H, T, D]`` of unsigned integers."""

    spec: WindowSpec
    arrays: tuple[Bits, ...]

    def take(self, which: slice) -> Window:
        """Return a window of a run of neighbouring parts."""
        return Window(self.spec.take(which), self.arrays[which])

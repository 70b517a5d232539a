"""A window of a cache together with its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from kvpack.cache.spec import WindowSpec

if TYPE_CHECKING:
    from kvpack.numerics.floats import Bits

    Read = Callable[[Sequence[Bits] | None], tuple[Bits, ...]]
    """A function that reads the arrays of a window, to the given ones or to new ones, and returns them."""


class Window:
    """A window, or a block of it, with its bit patterns, which may be read only when they are needed."""

    def __init__(self, spec: WindowSpec, data: tuple[Bits, ...] | Read) -> None:
        """Take an array ``[H, T, D]`` of unsigned integers for each part, or a function that reads them."""
        self.spec, self._data = spec, data

    @property
    def unread(self) -> bool:
        """Return whether :meth:`load` reads the arrays."""
        return callable(self._data) and "arrays" not in vars(self)

    def load(self, into: Sequence[Bits] | None = None) -> tuple[Bits, ...]:
        """Return the arrays, and keep none that had to be read. What must be read is read to ``into``, if given."""
        return self._data(into) if callable(self._data) else self._data

    @cached_property
    def arrays(self) -> tuple[Bits, ...]:
        """Return the arrays, which are read once."""
        return self.load()

    def take(self, which: slice) -> Window:
        """Return a window of a run of neighbouring parts."""
        return Window(self.spec.take(which), self.arrays[which])

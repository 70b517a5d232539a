"""The specification of a cache: its tensors with their roles, and the parts of them in each window of tokens.

A **window** is all keys and values of a cache over one range of tokens. The tensors that are neither keys nor values
form the last window of a cache. A **part** is what a window holds of one tensor. This module uses only the standard
library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


class Role(StrEnum):
    """The role of a tensor in a model's attention."""

    KEYS = "keys"
    VALUES = "values"
    OTHER = "other"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a cache.

    ``shape`` is ``(H, T, D)``: for keys and values these are heads, rows (one per token) and dimensions. The shape of
    any other tensor is folded to three axes. ``dtype`` has the spelling of safetensors, and an element has ``itemsize``
    bytes. ``origin`` is the position of the first row in the text: in every tensor rows are counted from 0, but
    positions may start later.
    """

    name: str
    role: Role
    layer: int | None
    dtype: str
    shape: tuple[int, int, int]
    itemsize: int
    origin: int = 0

    @property
    def rows(self) -> int:
        """Return the number of rows, T."""
        return self.shape[1]


@dataclass(frozen=True)
class PartSpec:
    """Rows ``[first, first + tokens)`` of a tensor.

    ``length`` is the number of rows of the whole tensor. It is None while more rows may follow, as in a store of
    prefixes.
    """

    tensor: TensorInfo
    first: int
    tokens: int
    length: int | None

    @property
    def label(self) -> str:
        """Return the part's name in messages: the tensor's name, and for keys and values the range of rows."""
        if self.tensor.layer is None:
            return self.tensor.name
        return f"{self.tensor.name}[{self.first}:{self.first + self.tokens}]"

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Return the part's shape ``(H, T, D)``."""
        heads, _, dims = self.tensor.shape
        return heads, self.tokens, dims

    @cached_property
    def nbytes(self) -> int:
        """Return the size of the part's elements in bytes."""
        heads, tokens, dims = self.shape
        return heads * tokens * dims * self.tensor.itemsize

    @property
    def position(self) -> int:
        """Return the position of the part's first row in the text."""
        return self.tensor.origin + self.first


@dataclass(frozen=True)
class WindowSpec:
    """The parts of one window, or of a block of it, in canonical order."""

    parts: tuple[PartSpec, ...]

    @property
    def nbytes(self) -> int:
        """Return the size of all parts' elements in bytes."""
        return sum(part.nbytes for part in self.parts)

    @property
    def layered(self) -> bool:
        """Return whether the parts are keys and values, rather than other tensors of a cache."""
        return bool(self.parts) and self.parts[0].tensor.layer is not None

    def take(self, which: slice | Sequence[int]) -> WindowSpec:
        """Return the parts that a slice or a sequence of positions selects."""
        return WindowSpec(self.parts[which] if isinstance(which, slice) else tuple(self.parts[i] for i in which))


@dataclass(frozen=True)
class CacheSpec:
    """The tensors of a cache. ``layers`` are its keys and values, and ``others`` are the rest.

    Both are tuples in the order of the source's data, and neither has tensors without elements. ``metadata`` is the
    source's own metadata, as strings. ``origin`` is the position of the first row of all layers if more rows may
    follow, as in a store of prefixes, and None for a whole cache.
    """

    layers: tuple[TensorInfo, ...]
    others: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    origin: int | None = None

    @property
    def rows(self) -> int:
        """Return the number of rows of the longest keys or values."""
        return max((tensor.rows for tensor in self.layers), default=0)


def count_parts(spec: CacheSpec, tokens: int) -> int:
    """Return the number of parts in all windows of ``tokens`` rows, without making any."""
    return sum(-(-tensor.rows // tokens) for tensor in spec.layers) + len(spec.others)


def windows(spec: CacheSpec, tokens: int, *, open_ended: bool = False) -> Iterator[WindowSpec]:
    """Yield windows of ``tokens`` rows each, in order of rows, then a window of the other tensors if there are any.

    The parts' lengths are unknown with ``open_ended`` or if the cache has an origin, because more tokens may follow.
    """
    open_ended = open_ended or spec.origin is not None
    longer = spec.layers
    for first in range(0, spec.rows, tokens):
        longer = tuple(tensor for tensor in longer if first < tensor.rows)  # so that the work is that of the parts
        yield WindowSpec(
            tuple(
                PartSpec(tensor, first, min(tokens, tensor.rows - first), None if open_ended else tensor.rows)
                for tensor in longer
            )
        )
    if spec.others:
        yield WindowSpec(tuple(PartSpec(tensor, 0, tensor.rows, tensor.rows) for tensor in spec.others))

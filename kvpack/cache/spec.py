"""The specification of a cache: tensors with their roles, and the parts of them that a window of tokens holds.

A **window** is all keys and values of a cache over one range of tokens. The tensors that are neither keys nor values
are the last window of a cache. A **part** is what a window holds of one tensor. Standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


class Role(StrEnum):
    """What a tensor is to a model's attention."""

    KEYS = "keys"
    VALUES = "values"
    OTHER = "other"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a cache.

    ``shape`` is ``(H, T, D)``: heads, rows (one a token) and dimensions of keys and values, and of another tensor its
    shape folded to three axes. ``dtype`` is spelt as in safetensors and has ``itemsize`` bytes an element. ``origin``
    is the position of the first row in the text: rows are counted from 0 in every tensor, positions are not.
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
        """Number of rows, T."""
        return self.shape[1]


@dataclass(frozen=True)
class PartSpec:
    """Rows ``[first, first + tokens)`` of a tensor.

    ``length`` is the number of rows of the whole tensor, or None while more may follow, as in a store of prefixes.
    """

    tensor: TensorInfo
    first: int
    tokens: int
    length: int | None

    @property
    def label(self) -> str:
        """The part's name in messages: the tensor, with the range of rows of keys and values."""
        if self.tensor.layer is None:
            return self.tensor.name
        return f"{self.tensor.name}[{self.first}:{self.first + self.tokens}]"

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """``(H, T, D)`` of the part."""
        heads, _, dims = self.tensor.shape
        return heads, self.tokens, dims

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the part's elements."""
        heads, tokens, dims = self.shape
        return heads * tokens * dims * self.tensor.itemsize

    @property
    def position(self) -> int:
        """The position of the part's first row in the text."""
        return self.tensor.origin + self.first


@dataclass(frozen=True)
class WindowSpec:
    """The parts of one window, or of a block of it, in canonical order."""

    parts: tuple[PartSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the elements of all parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def layered(self) -> bool:
        """Whether these are keys and values, not the other tensors of a cache."""
        return bool(self.parts) and self.parts[0].tensor.layer is not None

    def take(self, which: slice | Sequence[int]) -> WindowSpec:
        """Some of the parts, by a slice or by their positions."""
        return WindowSpec(self.parts[which] if isinstance(which, slice) else tuple(self.parts[i] for i in which))


@dataclass(frozen=True)
class CacheSpec:
    """The tensors of a cache: ``layers`` are keys and values, both tuples in the order of the source's data.

    Tensors without elements are in neither tuple. ``metadata`` is what the source says of itself, as strings.
    """

    layers: tuple[TensorInfo, ...]
    others: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]

    @property
    def rows(self) -> int:
        """Rows of the longest keys or values."""
        return max((tensor.rows for tensor in self.layers), default=0)


def windows(spec: CacheSpec, tokens: int, *, open_ended: bool = False) -> Iterator[WindowSpec]:
    """Windows of ``tokens`` rows each, cut by row, then one of the other tensors if there are any.

    With ``open_ended`` the parts' lengths are unknown, because more tokens may follow.
    """
    for first in range(0, spec.rows, tokens):
        yield WindowSpec(
            tuple(
                PartSpec(tensor, first, min(tokens, tensor.rows - first), None if open_ended else tensor.rows)
                for tensor in spec.layers
                if first < tensor.rows
            )
        )
    if spec.others:
        yield WindowSpec(tuple(PartSpec(tensor, 0, tensor.rows, tensor.rows) for tensor in spec.others))

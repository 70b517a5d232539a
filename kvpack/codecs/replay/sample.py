"""Some elements of a cache as one machine computes it, which tell whether another machine computes the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from kvpack.cache import TensorInfo
from kvpack.errors import FormatError
from kvpack.numerics.floats import Bits

SIZE = 64
"""The number of elements in a sample."""

LOW = 0xFFFF
"""Of wider elements the sample has the lowest 16 bits."""


@dataclass(frozen=True)
class Sample:
    """The lowest 16 bits of elements of the first forward pass, in the order of the file's tensors.

    Elements ``[H, n, D]`` of all keys and values, n being the tokens of the first pass, are numbered in row-major
    order, tensor after tensor. Of N elements, element i of the sample is number ``i * N // 64`` plus a pseudorandom
    number below ``N // 64``. If N is at most 64, the sample is every element.
    """

    elements: tuple[int, ...]

    @classmethod
    def of(cls, cache: Mapping[str, Bits], tensors: Sequence[TensorInfo], tokens: int) -> Self:
        """Take the sample of a cache whose first forward pass had ``tokens`` tokens."""
        sizes = [tensor.shape[0] * tokens * tensor.shape[2] for tensor in tensors]
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        found = []
        for number in positions(int(starts[-1])):
            which = int(np.searchsorted(starts, number, side="right")) - 1
            heads, _, dims = tensors[which].shape
            at = np.unravel_index(number - int(starts[which]), (heads, tokens, dims))
            found.append(int(cache[tensors[which].name][at]) & LOW)
        return cls(tuple(found))

    def differing(self, other: Sample) -> float:
        """Return the share of elements that differ, from 0 to 1."""
        if len(self.elements) != len(other.elements):
            return 1.0
        return sum(a != b for a, b in zip(self.elements, other.elements, strict=True)) / max(len(self.elements), 1)

    def to_hex(self) -> str:
        """Return the elements as little-endian integers of 16 bits, in hexadecimal digits."""
        return np.array(self.elements, "<u2").tobytes().hex()

    @classmethod
    def from_hex(cls, text: Any) -> Self:
        """Undo :meth:`to_hex`.

        Raises:
            FormatError: The text is not a sample.

        """
        if not isinstance(text, str) or re.fullmatch(f"([0-9a-f]{{4}}){{0,{SIZE}}}", text) is None:
            raise FormatError("replay: the sample is not a list of 16-bit numbers in hexadecimal digits")
        return cls(tuple(np.frombuffer(bytes.fromhex(text), "<u2").tolist()))


def positions(count: int) -> list[int]:
    """Return the numbers of the elements that a sample of ``count`` elements has, ascending."""
    if count <= SIZE:
        return list(range(count))
    return [i * count // SIZE + _mix(i + 1) % (count // SIZE) for i in range(SIZE)]


def _mix(number: int) -> int:
    """Return output ``number`` of SplitMix64 from the seed 0 (Steele, Lea, Flood 2014), counted from 1."""
    mask = (1 << 64) - 1
    z = number * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31

"""Writes captures: windows are written where they belong in the file, in whatever order they come."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from kvpack.cache import PartSpec
from kvpack.formats.captures import layer_of
from kvpack.formats.safetensors import Header
from kvpack.numerics.floats import Bits


class SafetensorsSink:
    """A safetensors file that is written by position.

    ``start`` is the first row of every layer's tensor that the file has, where it holds a range of tokens alone.
    """

    def __init__(self, output: BinaryIO, header: Header, start: int = 0) -> None:
        """Write the header; ``output`` can seek, and the file begins at its present position."""
        self._output, self._header, self._start = output, header, start
        self._base = output.tell()
        self._entries = {entry.name: entry for entry in header.tensors}
        output.write(len(header.raw).to_bytes(8, "little") + header.raw)

    def write(self, part: PartSpec, bits: Bits) -> int:
        """Write the rows of a part ``[H, T, D]`` that the file has; returns their size in bytes."""
        entry = self._entries[part.tensor.name]
        if layer_of(entry) is None:
            self._write_at(entry.start, bits)
            return bits.nbytes
        rows = entry.shape[1]
        first = max(part.first, self._start)
        bits = bits[:, first - part.first : self._start + rows - part.first]
        if bits.shape[1] == rows:
            self._write_at(entry.start, bits)
        else:
            row = bits.shape[2] * bits.itemsize
            for head, array in enumerate(bits):
                self._write_at(entry.start + (head * rows + first - self._start) * row, array)
        return bits.nbytes

    def _write_at(self, offset: int, bits: Bits) -> None:
        self._output.seek(self._base + self._header.data_start + offset)
        self._output.write(as_bytes(bits))

    def finish(self) -> None:
        """Leave the output positioned behind the file."""
        self._output.seek(self._base + self._header.file_size)


def as_bytes(bits: Bits) -> memoryview[int]:
    """An array's bytes, row-major."""
    return np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data

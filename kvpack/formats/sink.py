"""Writes captures: windows are written where they belong in the file, in whatever order they come."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

from kvpack.cache import PartSpec
from kvpack.formats.captures import layer_of
from kvpack.formats.safetensors import Header
from kvpack.numerics.floats import Bits

WRITERS = 4
"""Threads that write to a file at once."""

PENDING_BYTES = 64 << 20
"""Bytes that may wait to be written."""


class SafetensorsSink:
    """A safetensors file that is written by position, by several threads where the output is a real file.

    ``start`` is the first row of every layer's tensor that the file has, where it holds a range of tokens alone.
    """

    def __init__(self, output: BinaryIO, header: Header, start: int = 0) -> None:
        """Write the header; ``output`` can seek, and the file begins at its present position."""
        self._output, self._header, self._start = output, header, start
        self._base = output.tell()
        self._pool = ThreadPoolExecutor(WRITERS)
        self._writes: deque[tuple[Future[None], int]] = deque()
        self._pending = 0
        self._entries = {entry.name: entry for entry in header.tensors}
        output.write(len(header.raw).to_bytes(8, "little") + header.raw)
        output.flush()
        self._descriptor = _descriptor_of(output)

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
        position = self._base + self._header.data_start + offset
        if self._descriptor is None:
            self._output.seek(position)
            self._output.write(as_bytes(bits))
            return
        while self._writes and self._pending > PENDING_BYTES:
            self._wait()
        self._writes.append((self._pool.submit(_write_all, self._descriptor, position, bits), bits.nbytes))
        self._pending += bits.nbytes

    def _wait(self) -> None:
        write, size = self._writes.popleft()
        self._pending -= size
        write.result()

    def finish(self) -> None:
        """Wait until everything is written, and leave the output positioned behind the file."""
        while self._writes:
            self._wait()
        self._output.seek(self._base + self._header.file_size)

    def close(self) -> None:
        """Let go of the threads, also where something went wrong."""
        self._pool.shutdown(cancel_futures=True)


def _write_all(descriptor: int, position: int, bits: Bits) -> None:
    data = as_bytes(bits)
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written


def _descriptor_of(output: BinaryIO) -> int | None:
    """The descriptor of a file that can be written at several places at once, or None."""
    try:
        return output.fileno() if hasattr(os, "pwrite") else None
    except (OSError, AttributeError):
        return None


def as_bytes(bits: Bits) -> memoryview[int]:
    """An array's bytes, row-major."""
    return np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data

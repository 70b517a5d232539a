"""Write captures: each window is written to its place in the file, in whatever order the windows come."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

from kvpack.cache import PartSpec
from kvpack.errors import FormatError
from kvpack.formats.captures import layer_of
from kvpack.formats.output import no_space
from kvpack.formats.safetensors import Header
from kvpack.numerics.checksum import PIECE
from kvpack.numerics.floats import Bits

WRITERS = 4
"""The number of threads that write to a file at once."""

PENDING_BYTES = 64 << 20
"""The most bytes that may wait to be written."""


class SafetensorsSink:
    """A safetensors file that is written by position, with several threads if the output is a regular file.

    ``start`` is the first row in the file of every layer's tensor, for a file that holds only a range of tokens.
    """

    def __init__(self, output: BinaryIO, header: Header, start: int = 0) -> None:
        """Write the header. ``output`` must be seekable, and the file begins at its current position."""
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
        """Write the rows of a part ``[H, T, D]`` that belong to the file, and return their size in bytes.

        Raises:
            FormatError: The array is not of the part's size, so that the file would be left with holes.

        """
        entry = self._entries[part.tensor.name]
        if layer_of(entry) is None:
            if bits.nbytes != entry.nbytes:
                raise FormatError(f"{entry.name}: decodes to {bits.nbytes} bytes, not {entry.nbytes}")
            self._write_at(entry.start, bits)
            return bits.nbytes
        if bits.shape != part.shape or bits.itemsize != entry.itemsize:
            raise FormatError(f"{part.label}: decodes to {bits.itemsize} bytes times {list(bits.shape)}")
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
        try:
            write.result()
        except OSError as error:
            assert self._descriptor is not None
            raise no_space(error, self._descriptor, str(self._header.file_size)) from None

    def finish(self) -> None:
        """Wait until everything is written, and move the output's position to the end of the file."""
        while self._writes:
            self._wait()
        self._output.seek(self._base + self._header.file_size)

    def close(self) -> None:
        """Release the threads, even after an error."""
        self._pool.shutdown(cancel_futures=True)


def _write_all(descriptor: int, position: int, bits: Bits) -> None:
    flat = bits.reshape(-1)
    step = PIECE // bits.itemsize if flat.size and flat.strides[0] == 0 else max(flat.size, 1)
    for at in range(0, flat.size, step):  # an element that is repeated has no memory of the array's size
        data = as_bytes(flat[at : at + step])
        while data:
            written = os.pwrite(descriptor, data, position)
            data, position = data[written:], position + written


def _descriptor_of(output: BinaryIO) -> int | None:
    """Return the file's descriptor if the file can be written at several places at once, else None."""
    try:
        return output.fileno() if hasattr(os, "pwrite") else None
    except (OSError, AttributeError):
        return None


def as_bytes(bits: Bits) -> memoryview[int]:
    """Return an array's bytes in row-major order."""
    return np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data

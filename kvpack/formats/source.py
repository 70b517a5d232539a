"""Read captures as windows of bit patterns, no more of the file at a time than a window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from kvpack.cache import PartSpec, Window, WindowSpec, windows
from kvpack.errors import UnsupportedError
from kvpack.formats.captures import cache_spec, layer_of
from kvpack.formats.input import Memory
from kvpack.formats.safetensors import TensorFile, TensorSpec, build_header
from kvpack.numerics.floats import Bits

WINDOW_TOKENS = 2048


def in_shape(bits: Bits, entry: TensorSpec) -> Bits:
    """Return a tensor's bit patterns ``[N]`` or ``[H, T, D]`` in the shape that its header declares.

    Raises:
        UnsupportedError: The shape has more axes than a numpy array can have.

    """
    try:
        return bits.reshape(entry.shape)
    except ValueError:
        axes = len(entry.shape)
        raise UnsupportedError(f"{entry.name}: has {axes} axes, more than an array can have here") from None


class Capture:
    """A capture: a safetensors file with keys and values named ``layers.{i}.keys`` and ``layers.{i}.values``."""

    def __init__(self, file: TensorFile) -> None:
        """Wrap an open file."""
        self.file = file
        self.spec = cache_spec(file.header)
        self.tensors: Mapping[str, TensorSpec] = file.tensors
        self.metadata: Mapping[str, str] = file.metadata

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> Capture:
        """Open and check ``path``, as :meth:`kvpack.formats.safetensors.TensorFile.open` does."""
        return cls(TensorFile.open(path, name))

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, tuple[str, Bits]], metadata: Mapping[str, str]) -> Capture:
        """Make a capture in memory, whose messages call it ``name``, from each tensor's dtype and bit patterns."""
        header = build_header([(key, dtype, bits.shape) for key, (dtype, bits) in tensors.items()], metadata)
        data = bytearray(header.file_size)
        data[: header.data_start] = len(header.raw).to_bytes(8, "little") + header.raw
        file = TensorFile(name, header, memoryview(data))
        for spec, (_, bits) in zip(header.tensors, tensors.values(), strict=True):
            view: Bits = np.frombuffer(file.data(spec), bits.dtype).reshape(bits.shape)
            view[...] = bits
        return cls(file)

    def read(self, name: str, rows: slice | None = None) -> Bits:
        """Read a tensor's bit patterns in its shape, or a range of rows of keys or values.

        Arrays cannot be written, unless the capture is in memory. The errors are those of
        :meth:`kvpack.formats.input.Source.read`, and:

        Raises:
            KeyError: The capture has no such tensor.

        """
        entry = self.tensors[name]
        if rows is not None and layer_of(entry) is not None:
            start, stop, step = rows.indices(entry.shape[1])
            if step == 1:
                return self._rows(entry, (entry.shape[0], entry.shape[1], entry.shape[2]), start, max(start, stop))
        bits = in_shape(np.frombuffer(self.file.data(entry), f"<u{entry.itemsize}"), entry)
        return bits if rows is None else bits[..., rows]

    def part(self, part: PartSpec, into: Bits | None = None) -> Bits:
        """Read a part's bit patterns ``[H, T, D]``, to the contiguous array ``into`` if it is given.

        The errors are those of :meth:`kvpack.formats.input.Source.read`. A capture in memory gives views of it.
        """
        entry, stop = self.tensors[part.tensor.name], part.first + part.tokens
        return self._rows(entry, part.tensor.shape, part.first, stop, into)

    def _rows(
        self, entry: TensorSpec, shape: tuple[int, int, int], start: int, stop: int, into: Bits | None = None
    ) -> Bits:
        """Read rows ``[start, stop)`` of each head of a tensor that has a shape of three axes."""
        heads, rows, dims = shape
        if isinstance(self.file.source, Memory) or (into is None and (start, stop) == (0, rows)):
            whole: Bits = np.frombuffer(self.file.data(entry), f"<u{entry.itemsize}").reshape(shape)
            return whole[:, start:stop]
        found: Bits = np.empty((heads, stop - start, dims), f"<u{entry.itemsize}") if into is None else into
        row = dims * entry.itemsize
        at = self.file.header.data_start + entry.start
        if found.size:
            for head, own in enumerate(found):
                self.file.source.read_into(at + (head * rows + start) * row, own.reshape(-1).view(np.uint8))
        if into is None:
            found.flags.writeable = False
        return found

    def window(self, spec: WindowSpec) -> Window:
        """Return a window, or some parts of one, whose data are read when they are first asked for."""

        def read(into: Sequence[Bits] | None) -> tuple[Bits, ...]:
            return tuple(map(self.part, spec.parts, into)) if into else tuple(map(self.part, spec.parts))

        return Window(spec, read)

    def windows(self, tokens: int = WINDOW_TOKENS) -> Iterator[tuple[int, Mapping[str, Bits]]]:
        """Yield keys and values ``tokens`` rows at a time: the first row, and arrays ``[H, t, D]`` by tensor name."""
        for spec in windows(self.spec, tokens):
            if spec.layered:
                yield spec.parts[0].first, {part.tensor.name: self.part(part) for part in spec.parts}

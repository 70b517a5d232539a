"""Read captures as windows of bit patterns, which are views of the mapped file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from kvpack.cache import PartSpec, Window, WindowSpec, windows
from kvpack.errors import UnsupportedError
from kvpack.formats.captures import cache_spec, layer_of
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
        """Map and check ``path``, as :meth:`kvpack.formats.safetensors.TensorFile.open` does."""
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
        """Return a tensor's bit patterns in its shape, or a range of rows of keys or values, without copying.

        Raises:
            KeyError: The capture has no such tensor.

        """
        entry = self.tensors[name]
        bits = in_shape(np.frombuffer(self.file.data(entry), f"<u{entry.itemsize}"), entry)
        if rows is None:
            return bits
        return bits[:, rows] if layer_of(entry) is not None else bits[..., rows]

    def part(self, part: PartSpec) -> Bits:
        """Return a part's bit patterns as a view ``[H, T, D]``."""
        entry = self.tensors[part.tensor.name]
        bits: Bits = np.frombuffer(self.file.data(entry), f"<u{entry.itemsize}").reshape(part.tensor.shape)
        return bits[:, part.first : part.first + part.tokens]

    def window(self, spec: WindowSpec) -> Window:
        """Return the data of a window, or of some parts of one."""
        return Window(spec, tuple(map(self.part, spec.parts)))

    def windows(self, tokens: int = WINDOW_TOKENS) -> Iterator[tuple[int, Mapping[str, Bits]]]:
        """Yield keys and values ``tokens`` rows at a time: the first row, and views ``[H, t, D]`` by tensor name."""
        for spec in windows(self.spec, tokens):
            if spec.layered:
                yield spec.parts[0].first, {part.tensor.name: self.part(part) for part in spec.parts}

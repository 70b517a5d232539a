"""Read and write safetensors files as bit patterns, without numpy and without torch.

The package ``safetensors`` gives tensors to numpy or torch and so converts their dtypes, and it does not expose the
header's own bytes. A compressor needs both: the file's bytes as they are, and the header
verbatim, so that the file can be restored byte for byte. The tests compare this module with the package.

The format is described at https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from kvpack.cache.untrusted import MAX_VALUES, parse_json
from kvpack.errors import FormatError, TruncatedError, UnsupportedError
from kvpack.formats.input import InputFile, Source, source_of
from kvpack.formats.kinds import begins, instead

MAX_HEADER = 100_000_000
"""The longest header in bytes that the safetensors library itself accepts."""

MAX_SIZE = 1 << 63
"""The product of a tensor's axes other than those of length 0, in bytes, is below this, as numpy and torch demand."""

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64,
}  # fmt: skip
"""The number of bits that one element of each safetensors dtype takes.

These are all dtypes of version 0.8 of the package. Elements of 4 and of 6 bits are packed without padding. The format
requires that a tensor of such elements fills whole bytes.
"""


def item_bytes(dtype: str) -> int:
    """Return the size in bytes of the unsigned integers that hold a tensor's bit patterns.

    This is the size of an element. The exception is a dtype with elements smaller than a byte, whose tensors are
    handled as bytes.
    """
    return max(1, ITEM_BITS[dtype] // 8)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's entry in a safetensors header.

    ``dtype`` has the spelling of safetensors, for example ``BF16``. ``declared_shape`` is the shape in elements, as the
    header states it. ``start`` and ``stop`` are the tensor's range of bytes in the file's data section.
    """

    name: str
    dtype: str
    declared_shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array of unsigned integers that holds the tensor's bit patterns.

        This is the declared shape. The exception is a dtype with elements smaller than a byte, whose tensors are
        handled as one row of bytes.
        """
        return self.declared_shape if ITEM_BITS[self.dtype] % 8 == 0 else (self.nbytes,)

    @property
    def itemsize(self) -> int:
        """Return the size in bytes of one unsigned integer of that array."""
        return item_bytes(self.dtype)

    @property
    def elements(self) -> int:
        """Return the number of unsigned integers in that array."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the size in bytes of the whole tensor."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A parsed safetensors header.

    ``raw`` is its JSON, verbatim. ``metadata`` is its map of strings, which may be empty. ``tensors`` are in the order
    of their data.
    """

    raw: bytes
    metadata: dict[str, str]
    tensors: tuple[TensorSpec, ...]

    @property
    def data_start(self) -> int:
        """Return the offset in the file at which the data section begins."""
        return 8 + len(self.raw)

    @property
    def file_size(self) -> int:
        """Return the size in bytes of the whole safetensors file."""
        return self.data_start + (self.tensors[-1].stop if self.tensors else 0)


def parse_header(raw: bytes, source: str = "safetensors header", most: int = MAX_VALUES) -> Header:
    """Parse a header's JSON and check it.

    Every dtype must be known, every size must match its shape, and the tensors' data must have no gap and no overlap.
    ``source`` names the file in messages. ``most`` is the number of JSON values that the header may have.

    Raises:
        FormatError: The header breaks one of these rules, or :func:`kvpack.cache.untrusted.parse_json` refuses it.
        UnsupportedError: kvpack does not know a dtype. A later version of safetensors may have it.

    """
    entries = parse_json(raw, source, most)
    if not isinstance(entries, dict):
        raise FormatError(f"{source}: not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{source}: __metadata__ is not a map of strings")
    specs = sorted((_parse_entry(n, e, source) for n, e in entries.items()), key=lambda s: (s.start, s.stop))
    end = 0
    for spec in specs:
        if spec.start != end:
            raise FormatError(f"{source}: gap or overlap before tensor {spec.name!r}")
        end = spec.stop
    return Header(raw, metadata, tuple(specs))


def _parse_entry(name: str, entry: Any, source: str) -> TensorSpec:
    where = f"{source}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise FormatError(f"{where}: not a JSON object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise FormatError(f"{where}: dtype is not a string")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise FormatError(f"{where}: shape or data_offsets are not lists of whole numbers")
    if dtype not in ITEM_BITS:
        raise UnsupportedError(f"{where}: this kvpack does not know the dtype {dtype!r}: upgrade kvpack")
    if _elements(shape, ITEM_BITS[dtype], where) * ITEM_BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise FormatError(f"{where}: data_offsets do not match shape and dtype")
    return TensorSpec(name, dtype, tuple(shape), offsets[0], offsets[1])


def _elements(shape: Sequence[int], bits: int, where: str) -> int:
    """Return the number of a tensor's elements, computed no further than a tensor can be restored.

    Raises:
        FormatError: The axes that are not of length 0 multiply to more bytes than an array can have.

    """
    count, empty = 1, False
    for axis in shape:
        empty |= axis == 0
        count *= axis or 1
        if count * bits >= 8 * MAX_SIZE:
            raise FormatError(f"{where}: its shape is larger than any array can be")
    return 0 if empty else count


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def build_header(tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> Header:
    """Make the header of a file that holds the given tensors in the given order.

    Each tensor is given as its name, dtype and declared shape. The metadata's keys are sorted, and the JSON is padded
    with spaces to a multiple of 8 bytes, so that the same tensors always give the same bytes.

    Raises:
        FormatError: A tensor's elements do not fill whole bytes.

    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        size = prod(shape) * ITEM_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return parse_header(raw + b" " * (-len(raw) % 8))


class TensorFile:
    """A safetensors file that is open for reading.

    ``source`` gives its bytes by position. ``data(spec)`` returns the bytes of a tensor, which are little-endian and
    row-major.
    """

    def __init__(self, name: str, header: Header, source: Source | memoryview) -> None:
        """Wrap an open file, for :meth:`open`, or the bytes of one. Messages call the file ``name``."""
        self.name, self.header, self.source = name, header, source_of(source)

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> TensorFile:
        """Open and validate ``path``. Messages call it ``name`` if that is given.

        Raises:
            OSError: The file cannot be read.
            KvpackError: It is not a regular file.
            TruncatedError: The file ends before its tensors do.
            FormatError: The file is not a safetensors file, or it breaks the format.
            UnsupportedError: A tensor has a dtype that kvpack does not know.

        """
        file = InputFile(path, name)
        return cls.of(file.name, file)

    @classmethod
    def of(cls, name: str, data: Source | memoryview) -> TensorFile:
        """Validate a file's bytes ``data``; messages call it ``name``. The errors are those of :meth:`open`."""
        source = source_of(data)
        size = source.size
        start = begins(source)
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER or start[8:] != b"{":
            raise FormatError(f"{name}: not a safetensors file{instead(start)}")
        if 8 + length > size:
            raise TruncatedError(f"{name}: truncated: its header says {length} bytes, the file has {size - 8}")
        header = parse_header(bytes(source.read(8, 8 + length)), name)
        if header.file_size > size:
            raise TruncatedError(f"{name}: truncated: {header.file_size} bytes expected, {size} found")
        if header.file_size < size:
            raise FormatError(f"{name}: {size - header.file_size} bytes of unknown data after the last tensor")
        return cls(name, header, source)

    @property
    def metadata(self) -> dict[str, str]:
        """Return the header's ``__metadata__``, a map of strings."""
        return self.header.metadata

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """Return the tensors by name, in the order of their data."""
        return {spec.name: spec for spec in self.header.tensors}

    def data(self, spec: TensorSpec) -> memoryview:
        """Read the tensor's bytes. Those of a file in memory are a view."""
        base = self.header.data_start
        return self.source.read(base + spec.start, base + spec.stop)

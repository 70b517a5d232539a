"""Raw access to safetensors files: bit patterns in, bit patterns out, no torch.

The ``safetensors`` package's numpy and torch front ends convert dtypes (or refuse bf16 and fp8); a compressor
needs the bytes as they lie, by memory map, and the header verbatim so that a file can be restored byte for
byte.

Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from kvpack.errors import FormatError, TruncatedError

MAX_HEADER = 100_000_000
"""The longest header in bytes that the safetensors library itself accepts."""

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
"""Bits an element of each safetensors dtype that kvpack reads."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (safetensors spelling, e.g. ``BF16``), shape and byte range (in the data section)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return ITEM_BITS[self.dtype] // 8

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A parsed safetensors header: its JSON bytes verbatim, string metadata, tensors by data offset."""

    raw: bytes
    metadata: dict[str, str]
    tensors: tuple[TensorSpec, ...]

    @property
    def data_start(self) -> int:
        """File offset of the data section."""
        return 8 + len(self.raw)

    @property
    def file_size(self) -> int:
        """Size in bytes of the whole safetensors file."""
        return self.data_start + (self.tensors[-1].stop if self.tensors else 0)


def parse_header(raw: bytes, source: str = "safetensors header") -> Header:
    """Parse and check a header's JSON: known dtypes, sizes that match shapes, data without gaps or overlap.

    Raises:
        FormatError: where the header breaks any of these rules.

    """
    try:
        entries = json.loads(raw.decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{source}: not valid JSON ({error})") from None
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
    if dtype not in ITEM_BITS:
        raise FormatError(f"{where}: dtype {dtype!r} is not one kvpack reads ({', '.join(ITEM_BITS)})")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise FormatError(f"{where}: shape or data_offsets are not lists of whole numbers")
    if prod(shape) * ITEM_BITS[dtype] // 8 != offsets[1] - offsets[0]:
        raise FormatError(f"{where}: data_offsets do not match shape and dtype")
    return TensorSpec(name, dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def build_header(tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> Header:
    """Lay tensors ``(name, dtype, shape)`` out in the given order; JSON keys sorted, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        size = prod(shape) * ITEM_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return parse_header(raw + b" " * (-len(raw) % 8))


class TensorFile:
    """A safetensors file, memory-mapped read-only.

    ``data(spec)`` is a ``memoryview`` of a tensor's little-endian bytes, row-major; ``view`` of the whole file's.
    """

    def __init__(self, name: str, header: Header, view: memoryview) -> None:
        """Use :meth:`open`; ``name`` stands for the file in messages."""
        self.name, self.header, self.view = name, header, view

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> TensorFile:
        """Map and validate ``path``, which messages call ``name`` if that is given.

        Raises:
            OSError: the file cannot be read.
            TruncatedError: the file ends before its tensors do.
            FormatError: not a safetensors file, or one that breaks the format.

        """
        name = name or str(path)
        with path.open("rb") as file:
            file.seek(0, 2)
            size = file.tell()
            if size < 8:
                raise FormatError(f"{name}: not a safetensors file (only {size} bytes)")
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        length = int.from_bytes(view[:8], "little")
        if length > MAX_HEADER or not bytes(view[8:9]) == b"{":
            raise FormatError(f"{name}: not a safetensors file")
        if 8 + length > size:
            raise TruncatedError(f"{name}: truncated: its header says {length} bytes, the file has {size - 8}")
        header = parse_header(bytes(view[8 : 8 + length]), name)
        if header.file_size > size:
            raise TruncatedError(f"{name}: truncated: {header.file_size} bytes expected, {size} found")
        if header.file_size < size:
            raise FormatError(f"{name}: {size - header.file_size} bytes of unknown data after the last tensor")
        return cls(name, header, view)

    @property
    def metadata(self) -> dict[str, str]:
        """The header's ``__metadata__``."""
        return self.header.metadata

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Tensors by name, in the order of their data."""
        return {spec.name: spec for spec in self.header.tensors}

    def data(self, spec: TensorSpec) -> memoryview:
        """The tensor's bytes, not copied."""
        base = self.header.data_start
        return self.view[base + spec.start : base + spec.stop]

"""Captures and ``.kvp`` files behind one face: tensors by name, read as bit patterns."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.codecs.chain.base import Side
from kvpack.codecs.chain.pipeline import Bits, chain_of
from kvpack.codecs.chain.units import Unit
from kvpack.codecs.recipes import Codec
from kvpack.errors import CorruptError, FormatError, MismatchError, UnsupportedError
from kvpack.formats.safetensors import TensorFile, TensorSpec
from kvpack.kvp import Container, PartEntry, layer_of
from kvpack.kvp.layout import FLOAT_DTYPES, MAGIC, PartPlan
from kvpack.numerics.checksum import checksum
from kvpack.numerics.floats import to_float32
from kvpack.profiles import Profile

KEPT_BYTES = 2 << 30
"""Decoded chunks of stacked codecs that are kept in main memory."""


class Capture:
    """A safetensors capture."""

    def __init__(self, file: TensorFile) -> None:
        """Over an open file."""
        self.file = file
        self.tensors: Mapping[str, TensorSpec] = file.tensors
        self.metadata: Mapping[str, str] = file.metadata

    def read(self, name: str) -> Bits:
        """The tensor's bit patterns in its shape, as unsigned integers; not copied."""
        spec = self.tensors[name]
        bits: Bits = np.frombuffer(self.file.data(spec), f"<u{spec.itemsize}").reshape(spec.shape)
        return bits

    def read_part(self, plan: PartPlan) -> Bits:
        """A planned part's bit patterns, contiguous ``[H, T, D]``."""
        bits = self.read(plan.tensor.name)
        if plan.layer is not None:
            bits = bits[:, plan.first : plan.first + plan.tokens]
        return np.ascontiguousarray(bits).reshape(plan.shape)


def side_of(source: Capture | Archive, names: Collection[str]) -> Side:
    """Token ids and attention mass, of those tensors of ``source`` that are in ``names`` and as captures have them."""
    tokens = mass = None
    spec = source.tensors.get("tokens")
    if "tokens" in names and spec is not None and spec.dtype == "I32" and len(spec.shape) == 1:
        tokens = source.read("tokens").view(np.int32)
    spec = source.tensors.get("attention_mass")
    if "attention_mass" in names and spec is not None and spec.dtype in FLOAT_DTYPES and len(spec.shape) == 3:
        mass = to_float32(source.read("attention_mass"), spec.dtype).mean((0, 1))
    return Side(tokens, mass)


class Archive:
    """A ``.kvp`` file."""

    def __init__(self, container: Container, profile: Profile | None = None) -> None:
        """Over an open container; its codecs are rebuilt from the header.

        Raises:
            FormatError, UnsupportedError: codecs that this kvpack cannot rebuild.
            MismatchError: ``profile`` is not the one the file was made with.

        """
        self.container, self.profile = container, profile
        self.codecs = [Codec.from_json(document) for document in container.header.codecs]
        if container.header.lossless and not all(map(self.is_exact, container.parts)):
            raise FormatError("labelled lossless, but its codecs are not")
        needed = container.header.profile
        if needed and profile and profile.sha256 != needed["sha256"]:
            raise MismatchError(
                f"was made with the profile {_describe(needed)}, not with {_describe(profile.identity())}"
            )
        self.tensors: Mapping[str, TensorSpec] = {spec.name: spec for spec in container.source.tensors}
        self.metadata: Mapping[str, str] = container.source.metadata
        self._parts: dict[str, list[PartEntry]] = {}
        for part in container.parts:
            self._parts.setdefault(part.plan.tensor.name, []).append(part)
        self._chunks: dict[int, dict[str, Bits]] = {}
        self._kept = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, profile: Profile | None = None) -> Archive:
        """Open ``path``; errors carry the path."""
        container = Container.open(path)
        try:
            return cls(container, profile)
        except (FormatError, UnsupportedError, MismatchError) as error:
            raise type(error)(f"{path}: {error}") from None

    @property
    def parts(self) -> list[PartEntry]:
        """Every part, in file order."""
        return self.container.parts

    def is_exact(self, part: PartEntry) -> bool:
        """Whether the part was coded losslessly."""
        return chain_of(self.codecs[part.codec], part.plan.tensor.name).quantizer.exact

    def read_part(self, part: PartEntry) -> Bits:
        """Decode a part; ``[H, T, D]``. Exact parts are checked against the original's digest.

        Raises:
            CorruptError: a checksum, the coding or the digest does not hold.
            MismatchError: the part needs a profile, and there is none.

        """
        codec = self.codecs[part.codec]
        if codec.profiled and self.profile is None:
            needed = self.container.header.profile
            raise MismatchError(f"needs the profile {_describe(needed)}: give it with -D" if needed else "no profile")
        stacked = codec.stacked and part.plan.layer is not None
        bits = self._read_stacked(part) if stacked else self._decode((part,))[0]
        if self.is_exact(part) and checksum(np.ascontiguousarray(bits)) != part.digest:
            raise CorruptError(f"corrupt: {part.plan.name} does not match the digest of the original")
        return bits

    def _decode(self, parts: tuple[PartEntry, ...]) -> list[Bits]:
        codec = self.codecs[parts[0].codec]
        side = side_of(self, ("tokens",)) if codec.joint and parts[0].plan.layer is not None else Side()
        unit = Unit(tuple(part.plan for part in parts), codec, self.profile, side)
        try:
            return unit.decode([self.container.read(part) for part in parts])
        except CorruptError as error:
            raise CorruptError(f"{parts[0].plan.name}: {error}") from None

    def _read_stacked(self, part: PartEntry) -> Bits:
        """A part of a chunk whose layers are coded as one: the whole chunk is decoded once, and kept."""
        with self._lock:
            start = part.plan.first
            if start not in self._chunks:
                chunk = tuple(p for p in self.parts if p.plan.layer is not None and p.plan.first == start)
                if any(other.codec != part.codec for other in chunk):
                    raise CorruptError(f"corrupt: {part.plan.name} is coded with other layers that have other codecs")
                names = [other.plan.tensor.name for other in chunk]
                self._chunks[start] = self._keep(dict(zip(names, self._decode(chunk), strict=True)))
            return self._chunks[start][part.plan.tensor.name]

    def _keep(self, decoded: dict[str, Bits]) -> dict[str, Bits]:
        """The arrays; those beyond :data:`KEPT_BYTES` in all lie in a temporary file, mapped."""
        size = sum(bits.nbytes for bits in decoded.values())
        self._kept += size
        if self._kept <= KEPT_BYTES:
            return decoded
        mapped, at = dict(decoded), 0
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            for name, bits in decoded.items():
                if bits.size:
                    mapped[name] = np.memmap(file, bits.dtype, "r+", at, bits.shape)
                    mapped[name][...] = bits
                at += bits.nbytes
        return mapped

    def read(self, name: str, tokens: slice | None = None) -> Bits:
        """Decode a tensor, or of keys and values the range ``tokens`` alone, touching no other chunk."""
        spec = self.tensors[name]
        if layer_of(spec) is None:
            bits = np.zeros(spec.shape, f"<u{spec.itemsize}")
            for part in self._parts.get(name, []):
                bits = self.read_part(part).reshape(spec.shape)
            return bits if tokens is None else bits[..., tokens]
        heads, total, dims = spec.shape
        start, stop, _ = (tokens or slice(None)).indices(total)
        pieces = list(self._overlapping(name, start, stop))
        if len(pieces) == 1:
            part, first, last = pieces[0]
            return self.read_part(part)[:, first - part.plan.first : last - part.plan.first]
        out = np.empty((heads, max(stop - start, 0), dims), f"<u{spec.itemsize}")
        for part, first, last in pieces:
            piece = self.read_part(part)[:, first - part.plan.first : last - part.plan.first]
            out[:, first - start : last - start] = piece
        return out

    def _overlapping(self, name: str, start: int, stop: int) -> Iterator[tuple[PartEntry, int, int]]:
        for part in self._parts.get(name, []):
            first, last = max(part.plan.first, start), min(part.plan.first + part.plan.tokens, stop)
            if first < last:
                yield part, first, last


def _describe(identity: Mapping[str, str]) -> str:
    return f"{identity['name']} (SHA-256 {identity['sha256'][:12]}...)"


def open_cache(path: Path, profile: Profile | None = None) -> Capture | Archive:
    """Open a capture or a ``.kvp`` file, told apart by their first bytes.

    Raises:
        FormatError: neither, or damaged.
        MismatchError: the ``.kvp`` file needs another profile.

    """
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start[:4] == MAGIC[:4]:
        return Archive.open(path, profile)
    return Capture(TensorFile.open(path))


def as_bytes(bits: Bits) -> memoryview[Any]:
    """A contiguous array's bytes."""
    return np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data

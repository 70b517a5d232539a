"""Decompress ``.kvp`` files, either whole or a range of layers and tokens, and check that they can be decompressed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np

from kvpack.cache import PartSpec
from kvpack.engine import CpuEngine, DecodeTask, Engine, InTurn, Progress, awaited
from kvpack.errors import UsageError, naming
from kvpack.formats.captures import layer_of
from kvpack.formats.safetensors import Header, TensorSpec, build_header
from kvpack.formats.sink import SafetensorsSink, as_bytes
from kvpack.formats.source import Capture
from kvpack.jobs.reader import KvpFile
from kvpack.numerics.checksum import checksum
from kvpack.numerics.floats import Bits


@dataclass(frozen=True)
class Selection:
    """The part of a cache to decompress: layers by index, and tokens ``[start, stop)``. None selects all."""

    layers: frozenset[int] | None = None
    tokens: tuple[int, int] | None = None

    @property
    def partial(self) -> bool:
        """Return whether the selection leaves anything out."""
        return self.layers is not None or self.tokens is not None

    def of(self, tensors: Mapping[str, TensorSpec]) -> dict[str, slice | None]:
        """Return the selected tensors by name, each with its range of rows (None for a whole tensor).

        Raises:
            UsageError: The selection reaches outside the cache.

        """
        if not self.partial:
            return dict.fromkeys(tensors)
        layers = {name: layer for name, spec in tensors.items() if (layer := layer_of(spec)) is not None}
        if not layers:
            raise UsageError("this file has no layers to select from")
        wanted = self.layers if self.layers is not None else frozenset(layers.values())
        missing = sorted(wanted - set(layers.values()))
        if missing:
            raise UsageError(f"no layer {missing[0]}: the file has layers 0 to {max(layers.values())}")
        cut = slice(*self.tokens) if self.tokens else None
        chosen: dict[str, slice | None] = {name: cut for name, layer in layers.items() if layer in wanted}
        longest = min(tensors[name].shape[1] for name in chosen)
        if self.tokens and not 0 <= self.tokens[0] < self.tokens[1] <= longest:
            raise UsageError(f"tokens {self.tokens[0]}:{self.tokens[1]} are not within 0:{longest}")
        if "tokens" in tensors and len(tensors["tokens"].shape) == 1:
            chosen["tokens"] = cut
        return chosen


def decompress(
    file: KvpFile,
    output: BinaryIO,
    selection: Selection | None = None,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write the capture that ``file`` holds to ``output``, and return the names of the tensors left out.

    Without a selection, a losslessly compressed file is restored byte for byte. With a selection, the keys and values
    of the selected layers and the tensor ``tokens`` are written, cut to the range.

    A seekable output is written window by window. A pipe is written tensor by tensor. If the codec codes all layers
    together, or a tensor would take more memory than the file's ``memlimit``, decoded data then waits in a temporary
    file of the capture's size (``kvpack-spool-*``).

    Raises:
        UsageError: The selection reaches outside the cache.
        CorruptError: The file is damaged.
        MismatchError: The file is of a store and begins at a later position of its text.

    """
    with naming(file.name):
        file.require_whole()
        chosen = (selection or Selection()).of(file.tensors)
        work = _Work(file, chosen, engine or CpuEngine(), progress)
        if output.seekable() and "a" not in str(getattr(output, "mode", "")):  # what is appended has no position
            work.by_position(output)
        elif file.by_tensor and 2 * max((entry.nbytes for entry in work.header.tensors), default=0) <= file.memlimit:
            work.by_tensor(output)
        else:
            with tempfile.TemporaryFile(prefix="kvpack-spool-") as spool:
                work.by_position(cast(BinaryIO, spool))
                spool.seek(0)
                shutil.copyfileobj(spool, output, 1 << 20)
    return [name for name in file.tensors if name not in chosen]


class _Work:
    """The decompression of one file."""

    def __init__(
        self, file: KvpFile, chosen: Mapping[str, slice | None], engine: Engine, progress: Progress | None
    ) -> None:
        self.file, self.chosen, self.engine, self.progress = file, chosen, engine, progress
        whole = len(chosen) == len(file.tensors) and not any(chosen.values())
        self.header = file.container.source if whole else _cut_header(file, chosen)
        self.total = sum(entry.nbytes for entry in self.header.tensors)
        self.done = 0

    def rows(self, part: PartSpec) -> tuple[int, int]:
        """Return the selected range of rows of the part's tensor."""
        start, stop, _ = (self.chosen[part.tensor.name] or slice(None)).indices(part.tensor.rows)
        return start, stop

    def wanted(self, part: PartSpec) -> bool:
        if part.tensor.name not in self.chosen:
            return False
        start, stop = self.rows(part)
        return part.tensor.layer is None or (part.first < stop and start < part.first + part.tokens)

    def step(self, size: int) -> None:
        self.done += size
        if self.progress:
            self.progress(self.done, self.total)

    def by_position(self, output: BinaryIO) -> None:
        """Write each block to its place as soon as it is decoded."""
        cut = next((cut for cut in self.chosen.values() if cut is not None), None)
        sink = SafetensorsSink(output, self.header, cut.start if cut else 0)
        with closing(sink):
            for task, arrays in decoded(self.engine, self.file.tasks(self.wanted)):
                for part, bits in zip(task.block.parts, arrays, strict=True):
                    if self.wanted(part):
                        self.step(sink.write(part, self._cut_other(part, bits)))
            sink.finish()

    def _cut_other(self, part: PartSpec, bits: Bits) -> Bits:
        """Cut the tensor ``tokens`` to the range of keys and values. The sink itself cuts keys and values."""
        cut = self.chosen[part.tensor.name]
        return bits if cut is None or part.tensor.layer is not None else bits.reshape(-1)[cut]

    def by_tensor(self, output: BinaryIO) -> None:
        """Write one tensor after another, with one tensor in memory at a time."""
        output.write(len(self.header.raw).to_bytes(8, "little") + self.header.raw)
        tasks: dict[str, list[DecodeTask]] = {entry.name: [] for entry in self.header.tensors}
        for task in self.file.tasks(self.wanted):
            tasks[task.block.parts[0].tensor.name].append(task)
        with awaited(self.engine.run(task for some in tasks.values() for task in some)) as run:
            results = InTurn(run)
            for name, some in tasks.items():
                pieces = [self._piece(task.block.parts[0], results.take(task.ticket).arrays[0]) for task in some]
                if pieces:
                    bits = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
                    output.write(as_bytes(bits))
                    self.step(self.file.tensors[name].nbytes)

    def _piece(self, part: PartSpec, bits: Bits) -> Bits:
        if part.tensor.layer is None:
            return self._cut_other(part, bits)
        start, stop = self.rows(part)
        return bits[:, max(start - part.first, 0) : stop - part.first]


def decoded(engine: Engine, tasks: Iterator[DecodeTask]) -> Iterator[tuple[DecodeTask, tuple[Bits, ...]]]:
    """Yield each task with its decoded parts, in any order, for callers that have a place for each block."""
    asked: dict[object, DecodeTask] = {}

    def noted() -> Iterator[DecodeTask]:
        for task in tasks:
            asked[task.ticket] = task
            yield task

    with awaited(engine.run(noted())) as results:
        for result in results:
            if result.error is not None:
                raise result.error
            yield asked.pop(result.ticket), result.arrays


def _cut_header(file: KvpFile, chosen: Mapping[str, slice | None]) -> Header:
    """Return the safetensors header for the result of :meth:`Selection.of`."""
    entries = []
    for name, cut in chosen.items():
        spec = file.tensors[name]
        shape = list(spec.declared_shape)
        if cut is not None:
            axis = 0 if name == "tokens" else 1
            start, stop, _ = cut.indices(shape[axis])
            shape[axis] = stop - start
        entries.append((name, spec.dtype, shape))
    return build_header(entries, file.metadata)


def check(file: KvpFile, *, engine: Engine | None = None, progress: Progress | None = None) -> None:
    """Decode everything without storing it, and verify checksums, coding, and the digests of lossless parts.

    Raises:
        CorruptError: The file is damaged.

    """
    done, total = 0, sum(spec.nbytes for spec in file.tensors.values())
    with naming(file.name), awaited((engine or CpuEngine()).run(file.tasks())) as results:
        for result in results:
            if result.error is not None:
                raise result.error
            done += sum(bits.nbytes for bits in result.arrays)
            if progress:
                progress(done, total)


def differing_parts(file: KvpFile, capture: Capture) -> Iterator[str]:
    """Yield the names of parts whose digests show that ``file`` was not made from ``capture``."""
    for entry in file.container.parts:
        ours, theirs = file.tensors[entry.spec.tensor.name], capture.tensors.get(entry.spec.tensor.name)
        same = theirs is not None and (ours.dtype, ours.declared_shape) == (theirs.dtype, theirs.declared_shape)
        if not same or checksum(np.ascontiguousarray(capture.part(entry.spec))) != entry.digest:
            yield entry.spec.label

"""Decompress ``.kvp`` files, either whole or a range of layers and tokens, and check that they can be decompressed."""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from kvpack.cache import PartSpec
from kvpack.engine import CpuEngine, DecodeTask, Done, Engine, InTurn, Progress, awaited
from kvpack.errors import UsageError, naming
from kvpack.formats.captures import layer_of
from kvpack.formats.safetensors import Header, TensorSpec, build_header
from kvpack.formats.sink import SafetensorsSink, as_bytes
from kvpack.formats.source import Capture
from kvpack.formats.temporary import scratch
from kvpack.jobs.reader import KvpFile
from kvpack.numerics.checksum import checksum
from kvpack.numerics.floats import NAN, Bits


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
    file of the capture's size, which has no name.

    Raises:
        UsageError: The selection reaches outside the cache.
        CorruptError: The file is damaged.
        MismatchError: The file is of a store and begins at a later position of its text.

    """
    with naming(file.name):
        file.require_whole()
        chosen = (selection or Selection()).of(file.tensors)
        Work(file, chosen, engine or CpuEngine(), progress).write(output)
    return [name for name in file.tensors if name not in chosen]


class Work:
    """The decompression of one file: of the tensors ``chosen``, each whole or a range of rows.

    Parts with a label in ``lost`` are not decoded, but written as NaN, or as zeros where the dtype has no NaN, and
    ``metadata`` is added to that of the result.
    """

    def __init__(
        self,
        file: KvpFile,
        chosen: Mapping[str, slice | None],
        engine: Engine,
        progress: Progress | None,
        *,
        lost: Container[str] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare the result's header."""
        self.file, self.chosen, self.engine, self.progress, self.lost = file, chosen, engine, progress, lost
        whole = len(chosen) == len(file.tensors) and not any(chosen.values()) and metadata is None
        self.header = file.container.source if whole else _cut_header(file, chosen, metadata or {})
        self.total = sum(entry.nbytes for entry in self.header.tensors)
        self.done = 0

    def write(self, output: BinaryIO) -> None:
        """Decode, and write the capture to ``output``."""
        if output.seekable() and "a" not in str(getattr(output, "mode", "")):  # what is appended has no position
            self._by_position(output)
        elif self._fits_by_tensor():
            self._by_tensor(output)
        else:
            with scratch() as (spool, _):
                self._by_position(spool)
                spool.seek(0)
                shutil.copyfileobj(spool, output, 1 << 20)

    def _fits_by_tensor(self) -> bool:
        largest = max((entry.nbytes for entry in self.header.tensors), default=0)
        return self.file.by_tensor and not self.lost and 2 * largest <= self.file.memlimit

    def _rows(self, part: PartSpec) -> tuple[int, int]:
        """Return the selected range of rows of the part's tensor."""
        start, stop, _ = (self.chosen[part.tensor.name] or slice(None)).indices(part.tensor.rows)
        return start, stop

    def selected(self, part: PartSpec) -> bool:
        """Return whether something of the part belongs into the result."""
        if part.tensor.name not in self.chosen:
            return False
        start, stop = self._rows(part)
        return part.tensor.layer is None or (part.first < stop and start < part.first + part.tokens)

    def _wanted(self, part: PartSpec) -> bool:
        return self.selected(part) and part.label not in self.lost

    def _step(self, size: int) -> None:
        self.done += size
        if self.progress:
            self.progress(self.done, self.total)

    def _by_position(self, output: BinaryIO) -> None:
        """Write each block to its place as soon as it is decoded."""
        cut = next((cut for cut in self.chosen.values() if cut is not None), None)
        sink = SafetensorsSink(output, self.header, cut.start if cut else 0)
        with closing(sink):
            for task, arrays in decoded(self.engine, self.file.tasks(self._wanted)):
                for part, bits in zip(task.block.parts, arrays, strict=True):
                    if self._wanted(part):
                        self._step(sink.write(part, self._cut_other(part, bits)))
            for entry in self.file.container.parts if self.lost else ():
                if self.selected(entry.spec) and entry.spec.label in self.lost:
                    self._step(sink.write(entry.spec, self._cut_other(entry.spec, _blank(entry.spec))))
            sink.finish()

    def _cut_other(self, part: PartSpec, bits: Bits) -> Bits:
        """Cut the tensor ``tokens`` to the range of keys and values. The sink itself cuts keys and values."""
        cut = self.chosen[part.tensor.name]
        return bits if cut is None or part.tensor.layer is not None else bits.reshape(-1)[cut]

    def _by_tensor(self, output: BinaryIO) -> None:
        """Write one tensor after another, with one tensor in memory at a time."""
        output.write(len(self.header.raw).to_bytes(8, "little") + self.header.raw)
        tasks: dict[str, list[DecodeTask]] = {entry.name: [] for entry in self.header.tensors}
        for task in self.file.tasks(self._wanted):
            tasks[task.block.parts[0].tensor.name].append(task)
        with awaited(self.engine.run(task for some in tasks.values() for task in some)) as run:
            results = InTurn(run)
            for name, some in tasks.items():
                pieces = [self._piece(task.block.parts[0], results.take(task.ticket).arrays[0]) for task in some]
                if pieces:
                    bits = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
                    output.write(as_bytes(bits))
                    self._step(self.file.tensors[name].nbytes)

    def _piece(self, part: PartSpec, bits: Bits) -> Bits:
        if part.tensor.layer is None:
            return self._cut_other(part, bits)
        start, stop = self._rows(part)
        return bits[:, max(start - part.first, 0) : stop - part.first]


def decoded(engine: Engine, tasks: Iterator[DecodeTask]) -> Iterator[tuple[DecodeTask, tuple[Bits, ...]]]:
    """Yield each task with its decoded parts, in any order, for callers that have a place for each block."""
    for task, result in results(engine, tasks):
        if result.error is not None:
            raise result.error
        yield task, result.arrays


def results(engine: Engine, tasks: Iterator[DecodeTask]) -> Iterator[tuple[DecodeTask, Done]]:
    """Yield each task with its result, in any order."""
    asked: dict[object, DecodeTask] = {}

    def noted() -> Iterator[DecodeTask]:
        for task in tasks:
            asked[task.ticket] = task
            yield task

    with awaited(engine.run(noted())) as run:
        for result in run:
            yield asked.pop(result.ticket), result


def _blank(part: PartSpec) -> Bits:
    """Return rows of NaN ``[H, T, D]`` in a part's dtype, or of zeros if that has no NaN. They take no memory."""
    pattern: Bits = np.array(NAN.get(part.tensor.dtype, 0), f"<u{part.tensor.itemsize}")
    return np.broadcast_to(pattern, part.shape)


def _cut_header(file: KvpFile, chosen: Mapping[str, slice | None], metadata: Mapping[str, str]) -> Header:
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
    return build_header(entries, {**file.metadata, **metadata})


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

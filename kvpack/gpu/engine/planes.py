"""KIVI and TurboQuant on a GPU: parts to planes of codes and their streams, and back.

The parts of each chain are adjacent in a batch. One launch of a quantizer therefore takes all parts of its chain, and
one launch of the entropy coder takes all planes of one geometry.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.cache import PartSpec
from kvpack.codecs.chain.codec import ChainCodec
from kvpack.codecs.chain.entropy.rans import CODED, PACKED
from kvpack.codecs.protocol import Codec
from kvpack.engine import DecodeTask, Done, EncodeTask, Task
from kvpack.errors import CorruptError
from kvpack.gpu.engine.arrays import Geometry, Layout, addresses_of, layout_of
from kvpack.gpu.engine.kernels import KnownParts, Outcome
from kvpack.gpu.engine.staging import Staged, signed, stage, stage_windows, streams_of, unsigned
from kvpack.gpu.kernels import rans
from kvpack.gpu.kernels.rans import MAX_PAYLOAD, Streams
from kvpack.gpu.runtime.host import Slot
from kvpack.gpu.runtime.launch import Launcher
from kvpack.kvp.frame import FramePart, Stream

BATCH_PARTS = 512
MAX_PARTS = 4096
"""The most parts of a batch that is decoded. Their streams are the blocks of one launch."""

FAULTS = ("corrupt: the checksum of a stream of {} does not match", "{}: rans stream: unsound")


def _layout(part: PartSpec, codec: Codec) -> Layout | None:
    return layout_of(part, codec) if isinstance(codec, ChainCodec) else None


def _in_runs(parts: Sequence[PartSpec], codec: ChainCodec) -> list[int]:
    """Return the positions of parts, ordered so that the parts of each chain are adjacent."""
    if codec.keys == codec.values:
        return list(range(len(parts)))
    return sorted(range(len(parts)), key=lambda i: not parts[i].tensor.name.endswith(".keys"))


def _runs(parts: Sequence[PartSpec], codec: ChainCodec) -> Iterator[slice]:
    """Yield each run of adjacent parts that have the same chain."""
    both = codec.keys == codec.values
    stop = 0
    for _, run in groupby(parts, key=lambda part: both or part.tensor.name.endswith(".keys")):
        start, stop = stop, stop + len(list(run))
        yield slice(start, stop)


@dataclass(frozen=True)
class _Batch:
    """A batch that is being staged. Its tasks are ordered by chain."""

    tasks: list[Any]
    slot: Slot
    staged: Staged

    @property
    def parts(self) -> list[PartSpec]:
        return [_part(task) for task in self.tasks]


def _part(task: Task) -> PartSpec:
    return (task.block.spec if isinstance(task, EncodeTask) else task.block).parts[0]


@dataclass
class _Encoding:
    """A running batch. ``streams`` of each part: its name, which item of ``coded``, and which stream of that item."""

    tasks: list[EncodeTask]
    slot: Slot
    alive: Any
    streams: list[list[tuple[str, int, int]]]
    coded: list[Streams]
    numbers: torch.Tensor
    ends: torch.Tensor
    parts: torch.Tensor
    known: Callable[[], None]
    arenas: list[torch.Tensor]


class PlaneEncoding:
    """Encodes parts of one codec and layout."""

    batch_bytes: ClassVar[int] = 128 << 20

    def __init__(self, gpu: Launcher, pinned: Sequence[torch.Tensor]) -> None:
        """Use ``gpu`` and the regions ``pinned``. See :class:`kvpack.gpu.engine.GpuEngine`."""
        self._gpu, self._pinned, self._layouts = gpu, pinned, KnownParts(_layout)

    def key(self, task: Task) -> Hashable | None:
        """Return a key of the codec and the coded range of the part."""
        if not isinstance(task, EncodeTask) or len(task.block.spec.parts) > 1:
            return None
        part, codec = task.block.spec.parts[0], task.codecs[0][1]
        layout = self._layouts(part, codec)
        return None if layout is None else (id(codec), part.shape, layout.start, layout.stop)

    def joins(self, batch: Sequence[Task], task: Task) -> bool:
        """Return whether a batch can take one more part."""
        return len(batch) < BATCH_PARTS

    def stage(self, tasks: list[EncodeTask], slot: Slot) -> _Batch:
        """Begin to copy the parts."""
        codec: Any = tasks[0].codecs[0][1]
        tasks = [tasks[i] for i in _in_runs(list(map(_part, tasks)), codec)]
        staged = stage_windows(slot, [task.block for task in tasks], [(0,)] * len(tasks), self._pinned)
        return _Batch(tasks, slot, staged)

    def start(self, batch: _Batch) -> _Encoding:
        """Quantize and encode the parts, and request sizes and checksums."""
        parts, codec = batch.parts, batch.tasks[0].codecs[0][1]
        gpu, shape, count = self._gpu, parts[0].shape, len(parts)
        host = batch.staged.ready()
        streams: list[list[tuple[str, int, int]]] = [[] for _ in parts]
        found: dict[Geometry, list[int]] = {}
        with batch.slot as slot:
            sent = slot.send(host)
            given = sent[batch.staged.skip :].view(torch.bfloat16).view(count, *shape)
            alive, lost = [host, sent, batch.staged], []
            for rows in _runs(parts, codec):
                layout = self._layouts(parts[rows.start], codec)
                assert layout is not None
                arrays, wrong = layout.gather(gpu, given[rows])
                alive += arrays
                lost.append(wrong)
                for name, array, geometry in layout.planes:
                    known = found.setdefault(geometry, [])
                    number = list(found).index(geometry)
                    for at, one in enumerate(streams[rows], len(known)):
                        one.append((name, number, at))
                    known += addresses_of(arrays[array])
            sizes = [len(addresses) for addresses in found.values()]
            table = slot.send(torch.tensor([*chain(*found.values()), *addresses_of(given)]))
            places = torch.split(table, [*sizes, count])
            coded = [
                (rans.encode if geometry.modelled else rans.pack)(gpu, geometry.parts(addresses))
                for geometry, addresses in zip(found, places[:-1], strict=True)
            ]
            digests = rans.checksums(gpu, places[-1], torch.full_like(places[-1], 2 * prod(shape)))
            numbers = torch.cat([torch.stack([c.places[:-1], c.sizes, c.checksums]) for c in coded], 1)
            ends = slot.fetch(torch.stack([c.places[-1] for c in coded]))
            told = slot.fetch(torch.stack([digests, torch.cat(lost).long()]))
            fetched = slot.fetch(numbers)
            event = slot.record_event()
        return _Encoding(batch.tasks, slot, alive, streams, coded, fetched, ends, told, event, [])

    def collect(self, batch: _Encoding) -> _Encoding:
        """Request the streams, since their sizes are known now."""
        batch.known()
        with batch.slot as slot:
            ends = batch.ends.tolist()
            batch.arenas = [slot.fetch(coded.arena[:end]) for coded, end in zip(batch.coded, ends, strict=True)]
        return batch

    def finish(self, batch: _Encoding) -> Iterator[Outcome]:
        """Yield the streams. If the codec cannot represent a part, yield its task instead."""
        batch.slot.wait()
        firsts = np.cumsum([0, *(len(coded.sizes) for coded in batch.coded)]).tolist()
        places, sizes = (column.tolist() for column in batch.numbers[:2])
        sums, digests = unsigned(batch.numbers[2]), unsigned(batch.parts[0])
        lost = batch.parts[1].tolist()
        arenas: list[Any] = [memoryview(arena.numpy().data) for arena in batch.arenas]
        for i, task in enumerate(batch.tasks):
            if lost[i]:
                yield task
                continue
            every = [(name, coded, firsts[coded] + row) for name, coded, row in batch.streams[i]]
            streams = tuple(
                Stream(name, arenas[a][places[at] : places[at] + sizes[at]], sums[at]) for name, a, at in every
            )
            yield Done(task.ticket, (FramePart(task.codecs[0][0], digests[i], streams),))


@dataclass
class _Decoding:
    tasks: list[DecodeTask]
    slot: Slot
    alive: Any
    fetched: torch.Tensor | None
    parts: NDArray[np.int64]
    faults: torch.Tensor


OFFSET, SIZE, SUM, TARGET, PLACE, PART, TABLES = range(7)
"""For each stream of a running batch: where it was received, its size and checksum, the address of its plane, its
aligned address, the number of its part in the batch, and for a coded stream the number of tables minus one."""


class PlaneDecoding:
    """Decodes parts of one codec and layout."""

    batch_bytes: ClassVar[int] = 128 << 20

    def __init__(self, gpu: Launcher, pinned: Sequence[torch.Tensor]) -> None:
        """Use ``gpu`` and the regions ``pinned``. See :class:`kvpack.gpu.engine.GpuEngine`."""
        self._gpu, self._pinned, self._layouts = gpu, pinned, KnownParts(_layout)

    def key(self, task: Task) -> Hashable | None:
        """Return a key of the codec, the coded range of the part, and whether the task has a room."""
        if not isinstance(task, DecodeTask) or len(task.parts) > 1:
            return None
        part, codec = task.block.parts[0], task.codec
        layout = self._layouts(part, codec)
        if layout is None or not _reads(task.parts[0], layout):
            return None
        return id(codec), part.shape, layout.start, layout.stop, task.room is None

    def joins(self, batch: Sequence[Task], task: Task) -> bool:
        """Return whether a batch can take one more part."""
        return len(batch) < MAX_PARTS

    def stage(self, tasks: list[DecodeTask], slot: Slot) -> _Batch:
        """Begin to copy the streams."""
        codec: Any = tasks[0].codec
        tasks = [tasks[i] for i in _in_runs(list(map(_part, tasks)), codec)]
        pieces = streams_of(task.parts[0] for task in tasks)
        return _Batch(tasks, slot, stage(slot, pieces, self._pinned))

    def start(self, batch: _Batch) -> _Decoding:
        """Decode the parts, and request those that have no room of their own and the errors."""
        tasks, gpu = batch.tasks, self._gpu
        shape, rooms = batch.parts[0].shape, [task.room for task in tasks]
        host = batch.staged.ready()
        with batch.slot as slot:
            tensors = torch.empty((len(tasks), *shape), dtype=torch.bfloat16, device=slot.device)
            received = torch.empty(-(-len(host) // 8) * 8 + 8, dtype=torch.uint8, device=slot.device)
            received[: len(host)].copy_(host, non_blocking=True)
            pieces, kinds, columns = self._targets(batch, tensors)
            columns[OFFSET] += received.data_ptr() + batch.staged.skip
            slack = max(rans.slack(geometry.parts(received)) for geometry in {geometry for geometry, _ in kinds})
            space = int(columns[[SIZE, PLACE], -1].sum()) + slack
            arena = torch.empty(space, dtype=torch.uint8, device=slot.device)
            columns[PLACE] += arena.data_ptr()
            order = sorted(range(len(kinds)), key=lambda i: (not kinds[i][0].modelled, kinds[i]))
            columns, kinds = np.take(columns, order, 1), [kinds[i] for i in order]
            table = slot.send(torch.from_numpy(columns))
            gpu.launch("common/align:align", {}, (8, len(kinds)), 256, 0, table[OFFSET], table[SIZE], table[PLACE])
            sums = rans.checksums(gpu, table[PLACE], table[SIZE])
            unsound = self._decode(kinds, table, columns[TABLES])
            for layout, arrays, goal in pieces:
                layout.scatter(gpu, arrays, goal)
            for room, tensor in zip(rooms, tensors, strict=True):
                if room is not None:
                    room.arrays[0].copy_(tensor.view(torch.int16))
            faults = slot.fetch(torch.stack([sums != table[SUM], unsound != 0]))
            fetched = slot.fetch(tensors) if rooms[0] is None else None
        alive = [host, received, arena, table, pieces, tensors, batch.staged]
        return _Decoding(tasks, slot, alive, fetched, columns[PART], faults)

    def _targets(
        self, batch: _Batch, tensors: torch.Tensor
    ) -> tuple[list[tuple[Layout, list[torch.Tensor], torch.Tensor]], list[tuple[Geometry, int]], NDArray[np.int64]]:
        """Return the arrays to decode with their targets, each stream's plane and whether it is coded, and columns."""
        pieces, kinds, rows, sums = [], [], [], []
        codec = batch.tasks[0].codec
        for some in _runs(batch.parts, codec):
            layout = self._layouts(batch.parts[some.start], codec)
            assert layout is not None
            arrays = layout.empty(self._gpu, some.stop - some.start)
            pieces.append((layout, arrays, tensors[some]))
            targets = zip(*(addresses_of(arrays[plane.array]) for plane in layout.planes), strict=True)
            for i, (task, goals) in enumerate(zip(batch.tasks[some], targets, strict=True), some.start):
                for stream, plane, goal in zip(task.parts[0].streams, layout.planes, goals, strict=True):
                    mode = stream.data[0]
                    kinds.append((plane.geometry, mode))
                    sums.append(stream.checksum)
                    rows.append((len(stream.data), goal, i, stream.data[1] if mode == CODED else 0))
        sizes, goals, parts, tables = np.array(rows, np.int64).T
        spaces = (sizes + 15) // 16 * 16
        columns = (np.cumsum(sizes) - sizes, sizes, signed(sums), goals, np.cumsum(spaces) - spaces, parts, tables)
        return pieces, kinds, np.stack(columns)

    def _decode(
        self, kinds: list[tuple[Geometry, int]], table: torch.Tensor, tables: NDArray[np.int64]
    ) -> torch.Tensor:
        """Decode streams ``[S]``, those of one kind adjacent, into their planes. Return the faults ``[S]``."""
        faults, at = [], 0
        for (geometry, mode), run in groupby(kinds):
            stop = at + len(list(run))
            for first in range(at, stop, BATCH_PARTS):
                rows = slice(first, min(first + BATCH_PARTS, stop))
                some = table[:, rows]
                goal = geometry.parts(some[TARGET])
                if mode == CODED:
                    shared = rans.shared_for(int(tables[rows].max()) + 1)
                    meta, _, _ = rans.decode(self._gpu, some[PLACE], some[SIZE], goal, shared=shared)
                    faults.append(meta[:, rans.FAULT])
                else:
                    faults.append(rans.unpack(self._gpu, some[PLACE], some[SIZE], goal, not geometry.modelled))
            at = stop
        return torch.cat(faults)

    def collect(self, batch: _Decoding) -> _Decoding:
        """Return the batch unchanged, since all its results were requested before."""
        return batch

    def finish(self, batch: _Decoding) -> Iterator[Outcome]:
        """Yield the parts or their errors."""
        batch.slot.wait()
        wrong: dict[int, int] = {}
        for kind, found in reversed(list(enumerate(batch.faults.numpy()))):
            wrong.update((int(part), kind) for part in batch.parts[found])
        every: Any = None
        if batch.fetched is not None:
            every = batch.fetched.view(torch.int16).numpy().view(np.uint16)
        for i, task in enumerate(batch.tasks):
            if i in wrong:
                yield Done(task.ticket, error=CorruptError(FAULTS[wrong[i]].format(task.block.parts[0].label)))
            else:
                yield Done(task.ticket, arrays=() if every is None else (every[i],))


def _reads(part: FramePart, layout: Layout) -> bool:
    """Return whether the kernels can read a part's streams as they are."""
    if len(layout.planes) != len(part.streams):
        return False
    for (name, _, geometry), (own, data, _) in zip(layout.planes, part.streams, strict=True):
        mode = data[0] if len(data) else None
        coded = mode == CODED and 16 <= len(data) <= MAX_PAYLOAD and geometry.modelled
        if name != own or not (coded or mode == PACKED):
            return False
    return True

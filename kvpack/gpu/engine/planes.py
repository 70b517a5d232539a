"""KIVI's and TurboQuant's files on a GPU: captures to planes of codes and their streams and back, batch by batch.

Batches are staged, sent and fetched as those of the lossless codec; in a batch the parts of each chain lie next to each
other, so that one launch of its quantizer takes them, and one of the entropy coder the planes of one geometry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.entropy.rans import CODED, PACKED
from kvpack.codecs.recipes import Codec
from kvpack.errors import CorruptError
from kvpack.gpu.engine.arrays import Geometry, Layout, addresses_of, by_chain, layout_of, runs_of, takes_planes
from kvpack.gpu.engine.lossless import EncodedPart
from kvpack.gpu.engine.staging import SLOTS, Source, Staged, in_batches, pieces_of, pipelined, signed, unsigned
from kvpack.gpu.runtime.host import Slot
from kvpack.jobs.reader import Archive, Capture
from kvpack.kvp import PartEntry
from kvpack.kvp.layout import PartPlan

if TYPE_CHECKING:
    import torch

    from kvpack.gpu.kernels.rans import Streams
    from kvpack.gpu.runtime.launch import Launcher

BATCH_BYTES = 128 << 20
BATCH_PARTS = 512
MOST_PARTS = 4096
"""Parts of a batch that is decoded, which may be of many chunks: their streams are one launch's blocks."""


@dataclass(frozen=True)
class _Plans:
    plans: list[PartPlan]
    order: list[int]
    slot: Slot
    staged: Staged


@dataclass
class _Encoding:
    """A batch under way; ``streams`` of each part: name, which of ``coded``, which of its streams."""

    order: list[int]
    slot: Slot
    alive: Any
    streams: list[list[tuple[str, int, int]]]
    coded: list[Streams]
    numbers: torch.Tensor
    ends: torch.Tensor
    parts: torch.Tensor
    known: Callable[[], None]
    arenas: list[torch.Tensor]


class PlaneEncoder:
    """Digests and streams of a capture's parts that :func:`takes_planes` says the GPU takes."""

    def __init__(self, gpu: Launcher, capture: Capture, codec: Codec) -> None:
        """Of ``capture``'s parts, by ``codec``."""
        self._gpu, self._codec, self._start_of_data = gpu, codec, capture.file.header.data_start
        self._source = Source(capture.file.view)
        self._slots = [Slot(gpu) for _ in range(SLOTS)]

    def encode(self, plans: Iterable[PartPlan]) -> Iterator[EncodedPart | None]:
        """As of :meth:`kvpack.gpu.engine.lossless.Encoder.encode`; None for a part that the codec cannot represent."""
        return pipelined(self._batches(plans), self._stage, self._start, self._collect, self._finish, self._slots)

    def _batches(self, plans: Iterable[PartPlan]) -> Iterator[list[PartPlan]]:
        def kind(plan: PartPlan) -> tuple[object, ...]:
            layout = layout_of(plan, self._codec)
            assert layout is not None
            return plan.shape, layout.start, layout.stop

        def joins(batch: list[PartPlan], plan: PartPlan) -> bool:
            fits = len(batch) < BATCH_PARTS and (len(batch) + 1) * 2 * prod(plan.shape) <= BATCH_BYTES
            return fits and kind(batch[-1]) == kind(plan)

        return in_batches(plans, joins)

    def _stage(self, plans: list[PartPlan], slot: Slot) -> _Plans:
        order = by_chain([plan.tensor.name for plan in plans], self._codec)
        plans = [plans[i] for i in order]
        pieces = (piece for plan in plans for piece in pieces_of(plan, self._start_of_data))
        return _Plans(plans, order, slot, self._source.stage(slot, pieces))

    def _start(self, batch: _Plans) -> _Encoding:
        import torch

        from kvpack.gpu.kernels import rans as cuda

        gpu, shape, count = self._gpu, batch.plans[0].shape, len(batch.plans)
        host = batch.staged.ready()
        streams: list[list[tuple[str, int, int]]] = [[] for _ in batch.plans]
        found: dict[Geometry, list[int]] = {}
        with batch.slot as slot:
            sent = slot.send(host)
            given = sent[batch.staged.skip :].view(torch.bfloat16).view(count, *shape)
            alive, lost = [host, sent], []
            for rows, layout in runs_of(batch.plans, self._codec):
                arrays, wrong = layout.gather(gpu, given[rows])
                alive += arrays
                lost.append(wrong)
                for name, array, geometry in layout.planes:
                    known = found.setdefault(geometry, [])
                    number = list(found).index(geometry)
                    for part, one in enumerate(streams[rows], len(known)):
                        one.append((name, number, part))
                    known += addresses_of(arrays[array])
            sizes = [len(addresses) for addresses in found.values()]
            table = slot.send(torch.tensor([*chain(*found.values()), *addresses_of(given)]))
            places = torch.split(table, [*sizes, count])
            coded = [
                (cuda.encode if geometry.modelled else cuda.pack)(gpu, geometry.parts(addresses))
                for geometry, addresses in zip(found, places[:-1], strict=True)
            ]
            digests = cuda.checksums(gpu, places[-1], torch.full_like(places[-1], 2 * prod(shape)))
            numbers = torch.cat([torch.stack([c.places[:-1], c.sizes, c.checksums]) for c in coded], 1)
            ends = slot.fetch(torch.stack([c.places[-1] for c in coded]))
            parts = slot.fetch(torch.stack([digests, torch.cat(lost).long()]))
            fetched = slot.fetch(numbers)
            return _Encoding(batch.order, slot, alive, streams, coded, fetched, ends, parts, slot.record_event(), [])

    def _collect(self, batch: _Encoding) -> _Encoding:
        batch.known()
        with batch.slot as slot:
            ends = batch.ends.tolist()
            batch.arenas = [slot.fetch(coded.arena[:end]) for coded, end in zip(batch.coded, ends, strict=True)]
        return batch

    def _finish(self, batch: _Encoding) -> Iterator[EncodedPart | None]:
        batch.slot.wait()
        firsts = np.cumsum([0, *(len(coded.sizes) for coded in batch.coded)]).tolist()
        places, sizes = (column.tolist() for column in batch.numbers[:2])
        sums, digests = unsigned(batch.numbers[2].tolist()), unsigned(batch.parts[0].tolist())
        lost = batch.parts[1].tolist()
        arenas: list[Any] = [memoryview(arena.numpy().data) for arena in batch.arenas]
        for part in np.argsort(batch.order).tolist():
            if lost[part]:
                yield None
                continue
            every = [(name, coded, firsts[coded] + row) for name, coded, row in batch.streams[part]]
            yield (
                digests[part],
                [(name, arenas[a][places[at] : places[at] + sizes[at]], sums[at]) for name, a, at in every],
            )


@dataclass(frozen=True)
class _Names:
    """Tensors of one shape and codec that are being staged: in the order asked for, and by chain."""

    names: list[str]
    ordered: list[str]
    slot: Slot
    staged: Staged


@dataclass
class _Decoding:
    slot: Slot
    names: list[str]
    ordered: list[str]
    alive: Any
    tensors: torch.Tensor
    fetched: torch.Tensor | None
    parts: NDArray[np.int64]
    faults: torch.Tensor


OFFSET, SIZE, SUM, TARGET, PLACE, PART, TABLES = range(7)
"""Of streams under way: where they were received, their size and checksum, where their plane goes, where they lie
aligned, which of the batch's parts they are of, and how many tables a coded one has, less one."""


class PlaneDecoder:
    """Tensors of an archive that are coded by codecs :func:`takes_planes` knows, decoded on the GPU."""

    def __init__(self, gpu: Launcher, archive: Archive) -> None:
        """Of ``archive``."""
        self._gpu, self._archive = gpu, archive
        self._source = Source(archive.container.view)
        self._parts: dict[str, list[PartEntry]] = {}
        for part in archive.parts:
            self._parts.setdefault(part.plan.tensor.name, []).append(part)

    def takes(self, name: str) -> bool:
        """Whether a tensor is the GPU's: all its parts of one such codec, with the streams that the kernels read."""
        parts = self._parts.get(name, [])
        return len(parts) <= MOST_PARTS and len({part.codec for part in parts}) == 1 and all(map(self._reads, parts))

    def _codec(self, part: PartEntry) -> Codec:
        return self._archive.codecs[part.codec]

    def _reads(self, part: PartEntry) -> bool:
        from kvpack.gpu.kernels.rans import MAX_PAYLOAD

        if not takes_planes(part.plan, self._codec(part)):
            return False
        layout = layout_of(part.plan, self._codec(part))
        assert layout is not None
        streams = self._archive.container.streams(part)
        return [plane.name for plane in layout.planes] == [name for name, _, _ in streams] and all(
            (len(data) and data[0] == PACKED)
            or (16 <= len(data) <= MAX_PAYLOAD and data[0] == CODED and plane.geometry.modelled)
            for plane, (_, data, _) in zip(layout.planes, streams, strict=True)
        )

    def read(self, names: Sequence[str], *, fetch: bool = True) -> Iterator[tuple[str, Any]]:
        """Names and tensors in order, as the lossless decoder gives them; all are to be taken.

        Raises:
            CorruptError: a checksum or the coding does not hold.

        """
        tensors, slots = self._archive.tensors, [Slot(self._gpu) for _ in range(SLOTS)]

        def joins(batch: list[str], name: str) -> bool:
            alike = tensors[batch[-1]].shape == tensors[name].shape
            fits = (len(batch) + 1) * tensors[name].nbytes <= BATCH_BYTES
            few = (len(batch) + 1) * len(self._parts[name]) <= MOST_PARTS
            return alike and fits and few and self._parts[batch[-1]][0].codec == self._parts[name][0].codec

        start = lambda batch: self._start(batch, fetch)  # noqa: E731
        yield from pipelined(in_batches(names, joins), self._stage, start, lambda one: one, self._finish, slots)

    def _chunks(self, names: list[str]) -> Iterator[tuple[PartEntry, ...]]:
        """Parts of tensors of one length, chunk by chunk."""
        return zip(*(self._parts[name] for name in names), strict=True)

    def _stage(self, names: list[str], slot: Slot) -> _Names:
        ordered = [names[i] for i in by_chain(names, self._codec(self._parts[names[0]][0]))]
        places = self._archive.container.places
        pieces = (piece for chunk in self._chunks(ordered) for part in chunk for piece in places(part))
        return _Names(names, ordered, slot, self._source.stage(slot, pieces))

    def _start(self, batch: _Names, fetch: bool) -> _Decoding:
        import torch

        from kvpack.gpu.kernels import rans as cuda

        gpu, spec, host = self._gpu, self._archive.tensors[batch.names[0]], batch.staged.ready()
        with batch.slot as slot:
            tensors = torch.empty((len(batch.names), *spec.shape), dtype=torch.bfloat16, device=slot.device)
            received = torch.empty(-(-len(host) // 8) * 8 + 8, dtype=torch.uint8, device=slot.device)
            received[: len(host)].copy_(host, non_blocking=True)
            pieces, kinds, columns = self._targets(batch.ordered, tensors)
            columns[OFFSET] += received.data_ptr() + batch.staged.skip
            slack = max(cuda.slack(geometry.parts(received)) for geometry in {geometry for geometry, _ in kinds})
            space = int(columns[[SIZE, PLACE], -1].sum()) + slack
            arena = torch.empty(space, dtype=torch.uint8, device=slot.device)
            columns[PLACE] += arena.data_ptr()
            order = sorted(range(len(kinds)), key=lambda i: (not kinds[i][0].modelled, kinds[i]))
            columns, kinds = np.take(columns, order, 1), [kinds[i] for i in order]
            table = slot.send(torch.from_numpy(columns))
            gpu.launch("common/align:align", {}, (8, len(kinds)), 256, 0, table[OFFSET], table[SIZE], table[PLACE])
            sums = cuda.checksums(gpu, table[PLACE], table[SIZE])
            unsound = self._decode(kinds, table, columns[TABLES])
            for layout, arrays, goal in pieces:
                layout.scatter(gpu, arrays, goal)
            faults = slot.fetch(torch.stack([sums != table[SUM], unsound != 0]))
            fetched = slot.fetch(tensors) if fetch else None
        alive = [host, received, arena, table, pieces]
        return _Decoding(slot, batch.names, batch.ordered, alive, tensors, fetched, columns[PART], faults)

    def _targets(
        self, names: list[str], tensors: torch.Tensor
    ) -> tuple[list[tuple[Layout, list[torch.Tensor], torch.Tensor]], list[tuple[Geometry, int]], NDArray[np.int64]]:
        """Arrays to be decoded and where they go from there; of each stream its plane, whether it is coded; columns."""
        view = self._archive.container.view
        pieces, kinds, rows, sums = [], [], [], []
        for number, chunk in enumerate(self._chunks(names)):
            first, tokens = chunk[0].plan.first, chunk[0].plan.tokens
            for some, layout in runs_of([part.plan for part in chunk], self._codec(chunk[0])):
                arrays = layout.empty(self._gpu, some.stop - some.start)
                pieces.append((layout, arrays, tensors[some, :, first : first + tokens]))
                targets = zip(*(addresses_of(arrays[plane.array]) for plane in layout.planes), strict=True)
                for i, (part, goals) in enumerate(zip(chunk[some], targets, strict=True), some.start):
                    for (record, at), plane, goal in zip(part.streams, layout.planes, goals, strict=True):
                        kinds.append((plane.geometry, view[at]))
                        sums.append(record.checksum)
                        last = view[at + 1] if view[at] == CODED else 0
                        rows.append((record.size, goal, number * len(names) + i, last))
        sizes, goals, parts, tables = np.array(rows, np.int64).T
        spaces = (sizes + 15) // 16 * 16
        columns = (np.cumsum(sizes) - sizes, sizes, signed(sums), goals, np.cumsum(spaces) - spaces, parts, tables)
        return pieces, kinds, np.stack(columns)

    def _decode(
        self, kinds: list[tuple[Geometry, int]], table: torch.Tensor, tables: NDArray[np.int64]
    ) -> torch.Tensor:
        """Streams ``[S]``, those of a kind next to each other, into their planes; faults ``[S]``."""
        import torch

        from kvpack.gpu.kernels import rans as cuda

        faults, at = [], 0
        for (geometry, mode), run in groupby(kinds):
            stop = at + len(list(run))
            for first in range(at, stop, BATCH_PARTS):
                rows = slice(first, min(first + BATCH_PARTS, stop))
                some = table[:, rows]
                goal = geometry.parts(some[TARGET])
                if mode == CODED:
                    shared = cuda.shared_for(int(tables[rows].max()) + 1)
                    meta, _, _ = cuda.decode(self._gpu, some[PLACE], some[SIZE], goal, shared=shared)
                    faults.append(meta[:, cuda.FAULT])
                else:
                    faults.append(cuda.unpack(self._gpu, some[PLACE], some[SIZE], goal, not geometry.modelled))
            at = stop
        return torch.cat(faults)

    def _finish(self, batch: _Decoding) -> Iterator[tuple[str, Any]]:
        batch.slot.wait()
        parts = [part for chunk in self._chunks(batch.ordered) for part in chunk]
        for kind, found in enumerate(batch.faults.numpy()):
            if found.any():
                name = parts[batch.parts[found.argmax()]].plan.name
                told = (f"corrupt: the checksum of a stream of {name} does not match", f"{name}: rans stream: unsound")
                raise CorruptError(told[kind])
        every: Any = batch.tensors
        if batch.fetched is not None:
            import torch

            every = batch.fetched.view(torch.int16).numpy().view(np.uint16)
        found_at = {name: i for i, name in enumerate(batch.ordered)}
        yield from ((name, every[found_at[name]]) for name in batch.names)

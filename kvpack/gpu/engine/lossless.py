"""The lossless codec on a GPU: captures to streams and back, batch by batch, the same bytes as on the CPU.

A batch is parts of one shape, of one capture or several (compressing), or whole tensors of one archive
(decompressing), staged in pinned memory, sent, coded and fetched on a stream of its own, while those before it are
written and those after it are staged. Nothing is waited for within a batch but the size of what is to be fetched. What
the kernels do not take (other codecs, dtypes and shapes, and parts that do not compress) goes the CPU's way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.codecs.chain.pipeline import chain_of
from kvpack.codecs.chain.quantizers.float_split import FloatSplit
from kvpack.codecs.recipes import Chain
from kvpack.errors import CorruptError
from kvpack.gpu.engine.staging import SLOTS, Source, Staged, in_batches, pieces_of, pipelined, signed, stage, unsigned
from kvpack.gpu.runtime.host import Slot
from kvpack.jobs.reader import Archive, Capture
from kvpack.kvp import PartEntry
from kvpack.kvp.layout import PartPlan

if TYPE_CHECKING:
    import torch

    from kvpack.gpu.runtime.launch import Launcher

BATCH_BYTES = 96 << 20
BATCH_PARTS = 512
AHEAD_BYTES = 256 << 20
"""Bytes of parts that may be coded before a part that waits for others of its shape."""

EncodedPart = tuple[int, list[tuple[str, Any, int]]]
"""Digest of the original; streams: name, bytes, checksum."""


def _is_ours(chain: Chain) -> bool:
    return isinstance(chain.quantizer, FloatSplit) and isinstance(chain.entropy, Rans)


def takes(plan: PartPlan, chain: Chain) -> bool:
    """Whether the kernels code this part: bf16, coded losslessly, of a shape they are made for."""
    from kvpack.gpu.kernels.rans import supports

    return plan.tensor.dtype == "BF16" and _is_ours(chain) and supports(plan.shape, 9, floats=True)


@dataclass(frozen=True)
class FilePart:
    """A part of a capture's file, whose tensors begin at ``data_start``."""

    source: Source
    data_start: int
    plan: PartPlan

    def pieces(self) -> Iterator[tuple[Source, int, int]]:
        """Where it lies, as :func:`kvpack.gpu.engine.staging.stage` takes it."""
        return ((self.source, *piece) for piece in pieces_of(self.plan, self.data_start))


def parts_of(capture: Capture, plans: Iterable[PartPlan], source: Source | None = None) -> Iterator[FilePart]:
    """Planned parts of an open capture, from ``source`` (the capture's file)."""
    source, data_start = source or Source(capture.file.view), capture.file.header.data_start
    return (FilePart(source, data_start, plan) for plan in plans)


Numbered = tuple[int, FilePart]


def _batches(parts: Iterable[FilePart]) -> Iterator[list[Numbered]]:
    """Parts of one shape with their numbers, as many as a batch takes or come within :data:`AHEAD_BYTES`."""
    waiting: dict[tuple[int, int, int], tuple[int, list[Numbered]]] = {}
    passed = 0
    for number, part in enumerate(parts):
        shape, size = part.plan.shape, 2 * prod(part.plan.shape)
        _, batch = waiting.setdefault(shape, (passed, []))
        batch.append((number, part))
        passed += size
        if len(batch) == BATCH_PARTS or (len(batch) + 1) * size > BATCH_BYTES:
            yield waiting.pop(shape)[1]
        while waiting and passed - next(iter(waiting.values()))[0] >= AHEAD_BYTES:
            yield waiting.pop(next(iter(waiting)))[1]
    yield from (batch for _, batch in waiting.values())


@dataclass(frozen=True)
class _Parts:
    """A batch that is being staged."""

    numbers: list[int]
    shape: tuple[int, int, int]
    slot: Slot
    staged: Staged


@dataclass
class _Encoding:
    """A batch under way: what must stay alive, and what is known when its stream is done."""

    slot: Slot
    numbers: list[int]
    alive: Any
    coded: Any
    columns: torch.Tensor
    known: Callable[[], None]
    mantissas: torch.Tensor
    mantissa_size: int
    arena: torch.Tensor | None = None


class Encoder:
    """Streams of parts that :func:`takes` says the GPU takes, of any number of captures."""

    def __init__(self, gpu: Launcher) -> None:
        """On ``gpu``."""
        self._gpu = gpu
        self._slots = [Slot(gpu) for _ in range(SLOTS)]

    def encode(self, parts: Iterable[FilePart]) -> Iterator[EncodedPart]:
        """The parts' digests and streams, in order; a stream's bytes are pinned, and to be let go of soon.

        Parts are asked for ahead of those that are given, by some batches and :data:`AHEAD_BYTES`.
        """
        early: dict[int, EncodedPart] = {}
        turn, batches = 0, _batches(parts)
        coded = pipelined(batches, self._stage, self._start, self._collect, self._finish, self._slots)
        for number, part in coded:
            early[number] = part
            while turn in early:
                yield early.pop(turn)
                turn += 1

    def _stage(self, batch: list[Numbered], slot: Slot) -> _Parts:
        staged = stage(slot, (piece for _, part in batch for piece in part.pieces()))
        return _Parts([number for number, _ in batch], batch[0][1].plan.shape, slot, staged)

    def _start(self, batch: _Parts) -> _Encoding:
        import torch

        from kvpack.gpu.kernels import rans as cuda

        shape, count = batch.shape, len(batch.numbers)
        host = batch.staged.ready()
        with batch.slot as slot:
            sent = slot.send(host)
            first = sent.data_ptr() + batch.staged.skip
            addresses = torch.arange(count, device=slot.device) * (2 * prod(shape)) + first
            parts = cuda.Parts(addresses, shape, shape[1] * shape[2], item=2, shift=7, width=9, floats=True)
            coded = cuda.encode(self._gpu, parts)
            assert coded.mantissas is not None
            assert coded.digests is not None
            assert coded.mantissa_checksums is not None
            columns = (coded.places[1:], coded.sizes, coded.checksums, coded.mantissa_checksums, coded.digests)
            fetched = slot.fetch(torch.stack(columns))
            known = slot.record_event()
            mantissas, size = slot.fetch(coded.mantissas), 1 + cuda.mantissa_size(parts)
        return _Encoding(slot, batch.numbers, (host, sent), coded, fetched, known, mantissas, size)

    def _collect(self, batch: _Encoding) -> _Encoding:
        batch.known()
        with batch.slot as slot:
            batch.arena = slot.fetch(batch.coded.arena[: int(batch.columns[0, -1])])
        return batch

    def _finish(self, batch: _Encoding) -> Iterator[tuple[int, EncodedPart]]:
        batch.slot.wait()
        assert batch.arena is not None
        places, sizes = [0, *batch.columns[0].tolist()], batch.columns[1].tolist()
        sums, mantissa_sums, digests = (unsigned(column.tolist()) for column in batch.columns[2:])
        streams: Any = memoryview(batch.arena.numpy().data)
        mantissas = batch.mantissas.numpy()
        for i, number in enumerate(batch.numbers):
            coded = ("sign_exponent", streams[places[i] : places[i] + sizes[i]], sums[i])
            packed = ("mantissa", mantissas[i, 15 : 15 + batch.mantissa_size].data, mantissa_sums[i])
            yield number, (digests[i], [coded, packed])


TAKEN, CODED, CODED_SIZE, CODED_SUM, TABLES, PACKED, PACKED_SIZE, PACKED_SUM, DIGEST = range(9)
"""Columns of what a decoder knows of parts: whether it takes one; offsets, sizes and checksums of its streams; how many
tables the first has, less one; the original's digest."""


@dataclass(frozen=True)
class _Names:
    """Tensors of one shape that are being staged; ``parts`` ``[C, N]``, rows of each chunk's tensors."""

    names: list[str]
    parts: NDArray[np.int64]
    slot: Slot
    staged: Staged


@dataclass
class _Decoding:
    slot: Slot
    names: list[str]
    alive: list[Any]
    tensors: torch.Tensor
    fetched: torch.Tensor | None
    checks: list[tuple[NDArray[np.int64], torch.Tensor]]


class Decoder:
    """Tensors of an archive, decoded on the GPU where it can, each checked against its digests."""

    def __init__(self, gpu: Launcher, archive: Archive, source: Source | None = None) -> None:
        """Of ``archive``, from ``source`` (its file)."""
        self._gpu, self._archive = gpu, archive
        self._source = source or Source(archive.container.view)
        self._slots = [Slot(gpu) for _ in range(SLOTS)]
        self._kinds: dict[tuple[Any, ...], bool] = {}
        self._parts: dict[str, list[int]] = {}
        for i, part in enumerate(archive.parts):
            self._parts.setdefault(part.plan.tensor.name, []).append(i)
        self._table = np.array([self._row(part) for part in archive.parts], np.int64).reshape(-1, DIGEST + 1)

    def takes(self, name: str) -> bool:
        """Whether a tensor is the GPU's: all its parts bf16, lossless, of shapes the kernels take, and compressed."""
        return name in self._parts and all(self._table[i, TAKEN] for i in self._parts[name])

    def _row(self, part: PartEntry) -> list[int]:
        from kvpack.gpu.kernels.rans import MAX_PAYLOAD

        name, shape = part.plan.tensor.name, part.plan.shape
        kind = (part.codec, name.endswith(".keys"), part.plan.layer is None, part.plan.tensor.dtype, shape)
        if kind not in self._kinds:
            chain = chain_of(self._archive.codecs[part.codec], name)
            self._kinds[kind] = part.plan.layer is not None and takes(part.plan, chain)
        if not self._kinds[kind] or len(part.streams) != 2:
            return [0] * (DIGEST + 1)
        (coded, at), (packed, packed_at) = part.streams
        view, size = self._archive.container.view, 1 + prod(shape) * 7 // 8
        taken = 16 <= coded.size <= MAX_PAYLOAD and view[at] == 1 and packed.size == size and view[packed_at] == 0
        sums = signed((coded.checksum, packed.checksum, part.digest))
        return [taken, at, coded.size, sums[0], view[at + 1] if taken else 0, packed_at, packed.size, *sums[1:]]

    def read(self, names: Sequence[str], *, fetch: bool = True) -> Iterator[tuple[str, Any]]:
        """Names and tensors in order: bit patterns in pinned memory, or with ``fetch`` False bf16 in device memory.

        Raises:
            CorruptError: a checksum, the coding or the digest does not hold.

        """
        for ours, run in groupby(names, key=self.takes):
            if ours:
                batches, start = self._batches(run), lambda batch: self._start(batch, fetch)
                yield from pipelined(batches, self._stage, start, lambda batch: batch, self._finish, self._slots)
            else:
                yield from ((name, self._archive.read(name)) for name in run)

    def _batches(self, names: Iterable[str]) -> Iterator[list[str]]:
        tensors = self._archive.tensors

        def joins(batch: list[str], name: str) -> bool:
            alike = tensors[batch[-1]].shape == tensors[name].shape
            return alike and (len(batch) + 1) * tensors[name].nbytes <= BATCH_BYTES

        return in_batches(names, joins)

    def _stage(self, names: list[str], slot: Slot) -> _Names:
        parts = np.array([self._parts[name] for name in names]).T  # one shape, so the same chunks
        pieces = self._table[parts.reshape(-1)][:, [CODED, CODED_SIZE, PACKED, PACKED_SIZE]].reshape(-1, 2)
        follows = np.flatnonzero(pieces[1:, 0] != pieces[:-1].sum(1)) + 1
        firsts = np.concatenate([[0], follows]).astype(np.int64)
        runs = zip(pieces[firsts, 0].tolist(), np.add.reduceat(pieces[:, 1], firsts).tolist(), strict=True)
        return _Names(names, parts, slot, self._source.stage(slot, runs))

    def _start(self, batch: _Names, fetch: bool) -> _Decoding:
        import torch

        spec = self._archive.tensors[batch.names[0]]
        host = batch.staged.ready()
        with batch.slot as slot:
            tensors = torch.empty((len(batch.names), *spec.shape), dtype=torch.int16, device=slot.device)
            received = torch.empty(-(-len(host) // 8) * 8 + 8, dtype=torch.uint8, device=slot.device)
            received[: len(host)].copy_(host, non_blocking=True)
            under_way = _Decoding(slot, batch.names, [host, received], tensors, None, [])
            at = received.data_ptr() + batch.staged.skip
            for chunk in batch.parts:
                plan = self._archive.parts[chunk[0]].plan
                for some in range(0, len(chunk), BATCH_PARTS):
                    target = tensors[some:].data_ptr() + 2 * plan.first * spec.shape[2]
                    at = self._decode(under_way, chunk[some : some + BATCH_PARTS], plan, at, target)
            if fetch:
                under_way.fetched = slot.fetch(tensors)
        return under_way

    def _decode(self, batch: _Decoding, parts: NDArray[np.int64], plan: PartPlan, at: int, target: int) -> int:
        """Ask for the decoding of parts whose streams lie from ``at`` on, and for all their checks; where they end."""
        import torch

        from kvpack.gpu.kernels import rans as cuda

        slot, rows = batch.slot, self._table[parts]
        sizes = rows[:, [CODED_SIZE, PACKED_SIZE]].reshape(-1)
        ends = at + np.cumsum(sizes)
        odd = np.arange(len(sizes)) % 2  # mantissas are aligned without their mode byte
        spaces = (sizes - odd + 15) // 16 * 16
        stride = batch.tensors[0].numel()
        goals = target + 2 * stride * np.arange(len(parts))
        columns = (ends - sizes, sizes, rows[:, [CODED_SUM, PACKED_SUM]].reshape(-1), np.cumsum(spaces) - spaces, odd)
        table = slot.send(torch.from_numpy(np.stack(columns)))
        wanted = slot.send(torch.from_numpy(np.stack([goals, rows[:, DIGEST]])))
        goal = cuda.Parts(wanted[0], plan.shape, stride // plan.shape[0], item=2, shift=7, width=9, floats=True)
        arena = torch.empty(int(spaces.sum()) + cuda.slack(goal), dtype=torch.uint8, device=slot.device)
        places = table[3] + arena.data_ptr()
        own, mantissas = places.view(-1, 2).t().contiguous()
        begins, lengths = table[0] + table[4], table[1] - table[4]
        self._gpu.launch("common/align:align", {}, (8, len(sizes)), 256, 0, begins, lengths, places)
        shared = cuda.shared_for(int(rows[:, TABLES].max()) + 1)
        meta, digests, sums = cuda.decode(
            self._gpu, own, table[1][::2].contiguous(), goal, mantissas, shared, (table[0], table[1])
        )
        assert sums is not None
        wrong = sums.ne(table[2])
        faults = torch.stack([wrong[::2] | wrong[1::2], meta[:, cuda.FAULT] != 0, digests != wanted[1]])
        batch.checks.append((parts, slot.fetch(faults)))
        batch.alive += [arena, table, wanted]
        return int(ends[-1])

    def _finish(self, batch: _Decoding) -> Iterator[tuple[str, Any]]:
        import torch

        batch.slot.wait()
        for parts, faults in batch.checks:
            for kind, found in enumerate(faults.numpy()):
                if found.any():
                    self._refuse(kind, self._archive.parts[parts[found.argmax()]].plan.name)
        every: Any = batch.tensors.view(torch.bfloat16)
        if batch.fetched is not None:
            every = batch.fetched.numpy().view(np.uint16)
        yield from zip(batch.names, every, strict=True)

    def _refuse(self, kind: int, name: str) -> NoReturn:
        messages = (
            f"corrupt: the checksum of a stream of {name} does not match",
            f"{name}: rans stream: unsound",
            f"corrupt: {name} does not match the digest of the original",
        )
        raise CorruptError(messages[kind])

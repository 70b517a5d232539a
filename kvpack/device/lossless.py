"""The lossless codec on a GPU: captures to streams and back, batch by batch, the same bytes as on the CPU.

A batch is parts of one shape (compressing) or whole tensors (decompressing), staged in pinned memory, sent, coded and
fetched on a stream of its own, while those before it are written and those after it are staged. Nothing is waited for
within a batch but the size of what is to be fetched. What the kernels do not take (other codecs, dtypes and shapes, and
parts that do not compress) goes the CPU's way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpack.archive import Archive, Capture
from kvpack.codecs import Chain
from kvpack.container import PartEntry, layer_of
from kvpack.container.layout import PartPlan
from kvpack.device.staging import SLOTS, Source, Staged, pieces_of, pipelined, signed, unsigned
from kvpack.errors import CorruptError
from kvpack.pipeline import chain_of
from kvpack.stages.device.host import Slot
from kvpack.stages.entropy.rans import Rans
from kvpack.stages.quantizers.float_split import FloatSplit

if TYPE_CHECKING:
    import torch

    from kvpack.stages.device.launch import Launcher

BATCH_BYTES = 96 << 20
BATCH_PARTS = 512

EncodedPart = tuple[int, list[tuple[str, Any, int]]]
"""Digest of the original; streams: name, bytes, checksum."""


def _is_ours(chain: Chain) -> bool:
    return isinstance(chain.quantizer, FloatSplit) and isinstance(chain.entropy, Rans)


def takes(plan: PartPlan, chain: Chain) -> bool:
    """Whether the kernels code this part: bf16, coded losslessly, of a shape they are made for."""
    from kvpack.stages.entropy.rans.cuda import supports

    return plan.tensor.dtype == "BF16" and _is_ours(chain) and supports(plan.shape, 9, floats=True)


def _batches(plans: Iterable[PartPlan]) -> Iterator[list[PartPlan]]:
    """Runs of plans of one shape and one length of tensor, no more than a batch takes."""
    for _, run in groupby(plans, key=lambda plan: (plan.shape, plan.tensor.shape)):
        batch: list[PartPlan] = []
        for plan in run:
            size = 2 * prod(plan.shape)
            if batch and (len(batch) == BATCH_PARTS or (len(batch) + 1) * size > BATCH_BYTES):
                yield batch
                batch = []
            batch.append(plan)
        yield batch


@dataclass(frozen=True)
class _Plans:
    """A batch that is being staged."""

    plans: list[PartPlan]
    slot: Slot
    staged: Staged


@dataclass
class _Encoding:
    """A batch under way: what must stay alive, and what is known when its stream is done."""

    slot: Slot
    count: int
    alive: Any
    coded: Any
    numbers: torch.Tensor
    known: Callable[[], None]
    mantissas: torch.Tensor
    mantissa_size: int
    arena: torch.Tensor | None = None


class Encoder:
    """Streams of parts that :func:`takes` says the GPU takes."""

    def __init__(self, gpu: Launcher, capture: Capture, source: Source | None = None) -> None:
        """Of ``capture``'s parts, from ``source`` (the capture's file)."""
        self._gpu, self._start_of_data = gpu, capture.file.header.data_start
        self._source = source or Source(capture.file.view)
        self._slots = [Slot(gpu) for _ in range(SLOTS)]

    def encode(self, plans: Iterable[PartPlan]) -> Iterator[EncodedPart]:
        """The plans' digests and streams, in order; a stream's bytes are pinned, and to be used before the next."""
        return pipelined(_batches(plans), self._stage, self._start, self._collect, self._finish, self._slots)

    def _stage(self, plans: list[PartPlan], slot: Slot) -> _Plans:
        pieces = (piece for plan in plans for piece in pieces_of(plan, self._start_of_data))
        return _Plans(plans, slot, self._source.stage(slot, pieces))

    def _start(self, batch: _Plans) -> _Encoding:
        import torch

        from kvpack.stages.entropy.rans import cuda

        shape, count = batch.plans[0].shape, len(batch.plans)
        host = batch.staged.ready()
        with batch.slot as slot:
            sent = slot.send(host)
            addresses = torch.arange(count, device=slot.device) * (2 * prod(shape)) + sent.data_ptr()
            parts = cuda.Parts(addresses, shape, shape[1] * shape[2], item=2, shift=7, width=9, floats=True)
            coded = cuda.encode(self._gpu, parts)
            assert coded.mantissas is not None
            assert coded.digests is not None
            assert coded.mantissa_checksums is not None
            columns = (coded.places[1:], coded.sizes, coded.checksums, coded.mantissa_checksums, coded.digests)
            numbers = slot.fetch(torch.stack(columns))
            known = slot.mark()
            mantissas = slot.fetch(coded.mantissas)
        return _Encoding(slot, count, (host, sent), coded, numbers, known, mantissas, 1 + cuda.mantissa_size(parts))

    def _collect(self, batch: _Encoding) -> _Encoding:
        batch.known()
        with batch.slot as slot:
            batch.arena = slot.fetch(batch.coded.arena[: int(batch.numbers[0, -1])])
        return batch

    def _finish(self, batch: _Encoding) -> Iterator[EncodedPart]:
        batch.slot.wait()
        assert batch.arena is not None
        places, sizes = [0, *batch.numbers[0].tolist()], batch.numbers[1].tolist()
        sums, mantissa_sums, digests = (unsigned(column.tolist()) for column in batch.numbers[2:])
        streams: Any = memoryview(batch.arena.numpy().data)
        mantissas = batch.mantissas.numpy()
        for i in range(batch.count):
            yield (
                digests[i],
                [
                    ("sign_exponent", streams[places[i] : places[i] + sizes[i]], sums[i]),
                    ("mantissa", mantissas[i, 15 : 15 + batch.mantissa_size].data, mantissa_sums[i]),
                ],
            )


@dataclass(frozen=True)
class _Names:
    """Tensors of one shape that are being staged; ``parts`` are chunk by chunk."""

    names: list[str]
    parts: list[PartEntry]
    slot: Slot
    staged: Staged


@dataclass
class _Decoding:
    slot: Slot
    names: list[str]
    alive: list[Any]
    tensors: torch.Tensor
    fetched: torch.Tensor | None
    checks: list[tuple[list[PartEntry], torch.Tensor]]


class Decoder:
    """Tensors of an archive, decoded on the GPU where it can, each checked against its digests."""

    def __init__(self, gpu: Launcher, archive: Archive, source: Source | None = None) -> None:
        """Of ``archive``, from ``source`` (its file)."""
        self._gpu, self._archive = gpu, archive
        self._source = source or Source(archive.container.view)
        self._slots = [Slot(gpu) for _ in range(SLOTS)]
        self._taken: dict[tuple[Any, ...], bool] = {}
        self._parts: dict[str, list[PartEntry]] = {}
        for part in archive.parts:
            self._parts.setdefault(part.plan.tensor.name, []).append(part)

    def takes(self, name: str) -> bool:
        """Whether a tensor is the GPU's: all its parts bf16, lossless, of shapes the kernels take, and compressed."""
        spec = self._archive.tensors[name]
        return layer_of(spec) is not None and spec.elements > 0 and all(map(self._takes_part, self._parts[name]))

    def _takes_part(self, part: PartEntry) -> bool:
        from kvpack.stages.entropy.rans.cuda import MAX_PAYLOAD

        name, shape = part.plan.tensor.name, part.plan.shape
        kind = (part.codec, name.endswith(".keys"), part.plan.tensor.dtype, shape)
        if kind not in self._taken:
            self._taken[kind] = takes(part.plan, chain_of(self._archive.codecs[part.codec], name))
        if not self._taken[kind] or len(part.streams) != 2:
            return False
        (coded, at), (packed, packed_at) = part.streams
        view, size = self._archive.container.view, 1 + prod(shape) * 7 // 8
        return 0 < coded.size <= MAX_PAYLOAD and view[at] == 1 and packed.size == size and view[packed_at] == 0

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
        for _, run in groupby(names, key=lambda name: tensors[name].shape):
            batch: list[str] = []
            for name in run:
                if batch and (len(batch) + 1) * tensors[name].nbytes > BATCH_BYTES:
                    yield batch
                    batch = []
                batch.append(name)
            yield batch

    def _stage(self, names: list[str], slot: Slot) -> _Names:
        chunks = zip(*(self._parts[name] for name in names), strict=True)  # one shape, so the same chunks
        parts = [part for chunk in chunks for part in chunk]
        pieces = (piece for part in parts for piece in self._archive.container.places(part))
        return _Names(names, parts, slot, self._source.stage(slot, pieces))

    def _start(self, batch: _Names, fetch: bool) -> _Decoding:
        import torch

        spec = self._archive.tensors[batch.names[0]]
        host = batch.staged.ready()
        with batch.slot as slot:
            tensors = torch.empty((len(batch.names), *spec.shape), dtype=torch.int16, device=slot.device)
            received = torch.empty(-(-len(host) // 8) * 8 + 8, dtype=torch.uint8, device=slot.device)
            received[: len(host)].copy_(host, non_blocking=True)
            under_way = _Decoding(slot, batch.names, [host, received], tensors, None, [])
            at = received.data_ptr()
            for first in range(0, len(batch.parts), len(batch.names)):
                chunk = batch.parts[first : first + len(batch.names)]
                for some in range(0, len(chunk), BATCH_PARTS):
                    targets = tensors[some:].data_ptr() + 2 * chunk[0].plan.first * spec.shape[2]
                    at = self._decode(under_way, chunk[some : some + BATCH_PARTS], at, targets)
            if fetch:
                under_way.fetched = slot.fetch(tensors)
        return under_way

    def _decode(self, batch: _Decoding, parts: list[PartEntry], at: int, target: int) -> int:
        """Ask for the decoding of parts whose streams lie from ``at`` on, and for all their checks; where they end."""
        import torch

        from kvpack.stages.entropy.rans import cuda

        slot, shape = batch.slot, parts[0].plan.shape
        streams = [stream for part in parts for stream in part.streams]
        sizes = [record.size for record, _ in streams]
        starts, places, end = [], [], 0
        for i, size in enumerate(sizes):
            starts.append(at)
            places.append(end)
            at += size
            end += -(-(size - i % 2) // 16) * 16  # mantissas without their mode byte
        stride = batch.tensors[0].numel()
        targets = [target + 2 * stride * i for i in range(len(parts))]
        table = slot.send(torch.tensor([starts, sizes, signed(record.checksum for record, _ in streams), places]))
        wanted = slot.send(torch.tensor([targets, signed(part.digest for part in parts)]))
        goal = cuda.Parts(wanted[0], shape, stride // shape[0], item=2, shift=7, width=9, floats=True)
        arena = torch.empty(end + cuda.slack(goal), dtype=torch.uint8, device=slot.device)
        aligned = (table[3] + arena.data_ptr()).view(-1, 2)
        odd = torch.arange(len(sizes), device=slot.device) % 2
        self._gpu.launch("device/align:align", {}, (8, len(sizes)), 256, 0, table[0] + odd, table[1] - odd, aligned)
        view = self._archive.container.view
        heads = [view[place : place + 16] for _, place in streams[::2]]
        own, mantissas = aligned.t().contiguous()
        meta, digests, sums = cuda.decode(
            self._gpu, own, table[1][::2].contiguous(), goal, mantissas, cuda.shared_for(heads), (table[0], table[1])
        )
        assert sums is not None
        wrong = sums.ne(table[2])
        faults = torch.stack([wrong[::2] | wrong[1::2], meta[:, cuda.FAULT] != 0, digests != wanted[1]])
        batch.checks.append((parts, slot.fetch(faults)))
        batch.alive += [arena, table, wanted]
        return at

    def _finish(self, batch: _Decoding) -> Iterator[tuple[str, Any]]:
        import torch

        batch.slot.wait()
        for parts, faults in batch.checks:
            for part, (checksum, coding, digest) in zip(parts, faults.T.tolist(), strict=True):
                if checksum:
                    raise CorruptError(f"corrupt: the checksum of a stream of {part.plan.name} does not match")
                if coding:
                    raise CorruptError(f"{part.plan.name}: rans stream: unsound")
                if digest:
                    raise CorruptError(f"corrupt: {part.plan.name} does not match the digest of the original")
        every: Any = batch.tensors.view(torch.bfloat16)
        if batch.fetched is not None:
            every = batch.fetched.numpy().view(np.uint16)
        yield from zip(batch.names, every, strict=True)

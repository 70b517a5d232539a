"""The lossless codec on a GPU: it gives the same bytes as on the CPU, in batches of parts of one shape.

A batch may hold parts of several windows and files. The CPU does what the kernels do not support: other codecs, dtypes
and shapes, and parts that did not compress.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.cache import PartSpec
from kvpack.codecs.chain.codec import ChainCodec
from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.codecs.chain.quantizers.float_split import FloatSplit
from kvpack.codecs.protocol import Codec
from kvpack.engine import DecodeTask, Done, EncodeTask, Task
from kvpack.errors import CorruptError
from kvpack.gpu.engine.kernels import KnownParts, Outcome
from kvpack.gpu.engine.staging import Staged, signed, stage, stage_windows, streams_of, unsigned
from kvpack.gpu.kernels import rans
from kvpack.gpu.kernels.rans import MAX_PAYLOAD
from kvpack.gpu.runtime.host import Slot
from kvpack.gpu.runtime.launch import Launcher
from kvpack.kvp.frame import FramePart, Stream

BATCH_PARTS = 512
MAX_PARTS = 4096
"""The most parts that one launch codes, and that a batch has when it is decoded."""

FAULTS = (
    "corrupt: the checksum of a stream of {} does not match",
    "{}: rans stream: unsound",
    "corrupt: {} does not match the digest of the original",
)


def supports(part: PartSpec, codec: Codec) -> bool:
    """Return whether the kernels support this part: lossless bf16 keys or values of a supported shape."""
    if part.tensor.layer is None or part.tensor.dtype != "BF16" or not isinstance(codec, ChainCodec):
        return False
    chain = codec.chain_for(part)
    ours = isinstance(chain.quantizer, FloatSplit) and isinstance(chain.entropy, Rans)
    return ours and rans.supports(part.shape, 9, floats=True)


@dataclass(frozen=True)
class _Batch:
    """A batch that is being staged."""

    tasks: list[Any]
    slot: Slot
    staged: Staged


@dataclass
class _Encoding:
    """A running batch: memory that must stay alive, and results that are known when its CUDA stream is done."""

    tasks: list[EncodeTask]
    slot: Slot
    alive: Any
    coded: Any
    columns: torch.Tensor
    known: Callable[[], None]
    mantissas: torch.Tensor
    mantissa_size: int
    arena: torch.Tensor | None = None


class LosslessEncoding:
    """Encodes parts of one shape."""

    batch_bytes: ClassVar[int] = 96 << 20

    def __init__(self, gpu: Launcher, pinned: Sequence[torch.Tensor]) -> None:
        """Use ``gpu`` and the regions ``pinned``. See :class:`kvpack.gpu.engine.GpuEngine`."""
        self._gpu, self._pinned, self._supports = gpu, pinned, KnownParts(supports)

    def key(self, task: Task) -> Hashable | None:
        """Return the shape of a part that is coded by itself."""
        if not isinstance(task, EncodeTask) or len(task.block.spec.parts) > 1:
            return None
        part = task.block.spec.parts[0]
        return part.shape if self._supports(part, task.codecs[0][1]) else None

    def joins(self, batch: Sequence[Task], task: Task) -> bool:
        """Return whether one launch can take one more part."""
        return len(batch) < BATCH_PARTS

    def stage(self, tasks: list[EncodeTask], slot: Slot) -> _Batch:
        """Begin to copy the parts."""
        staged = stage_windows(slot, [task.block for task in tasks], [(0,)] * len(tasks), self._pinned)
        return _Batch(tasks, slot, staged)

    def start(self, batch: _Batch) -> _Encoding:
        """Encode the parts, and request sizes, checksums and mantissas."""
        shape, count = batch.tasks[0].block.spec.parts[0].shape, len(batch.tasks)
        host = batch.staged.ready()
        with batch.slot as slot:
            sent = slot.send(host)
            first = sent.data_ptr() + batch.staged.skip
            addresses = torch.arange(count, device=slot.device) * (2 * prod(shape)) + first
            parts = rans.Parts(addresses, shape, shape[1] * shape[2], item=2, shift=7, width=9, floats=True)
            coded = rans.encode(self._gpu, parts)
            assert coded.mantissas is not None
            assert coded.digests is not None
            assert coded.mantissa_checksums is not None
            columns = (coded.places[1:], coded.sizes, coded.checksums, coded.mantissa_checksums, coded.digests)
            fetched = slot.fetch(torch.stack(columns))
            known = slot.record_event()
            mantissas, size = slot.fetch(coded.mantissas), 1 + rans.mantissa_size(parts)
        return _Encoding(batch.tasks, slot, (host, sent, batch.staged), coded, fetched, known, mantissas, size)

    def collect(self, batch: _Encoding) -> _Encoding:
        """Request the streams, since their sizes are known now."""
        batch.known()
        with batch.slot as slot:
            batch.arena = slot.fetch(batch.coded.arena[: int(batch.columns[0, -1])])
        return batch

    def finish(self, batch: _Encoding) -> Iterator[Outcome]:
        """Yield the streams. Their bytes are in pinned memory, which the caller should release soon."""
        batch.slot.wait()
        assert batch.arena is not None
        places, sizes = [0, *batch.columns[0].tolist()], batch.columns[1].tolist()
        sums, mantissa_sums, digests = (unsigned(column) for column in batch.columns[2:])
        streams: Any = memoryview(batch.arena.numpy().data)
        mantissas: Any = memoryview(batch.mantissas.reshape(-1).numpy().data)
        stride, size = batch.mantissas.shape[1], batch.mantissa_size
        for i, task in enumerate(batch.tasks):
            coded = Stream("sign_exponent", streams[places[i] : places[i] + sizes[i]], sums[i])
            at = i * stride + 15
            packed = Stream("mantissa", mantissas[at : at + size], mantissa_sums[i])
            yield Done(task.ticket, (FramePart(task.codecs[0][0], digests[i], (coded, packed)),))


CODED_SIZE, CODED_SUM, TABLES, PACKED_SIZE, PACKED_SUM, DIGEST = range(6)
"""What is known of a part to decode: the sizes and checksums of its streams, the number of tables of the first stream
minus one, and the original's digest."""


@dataclass
class _Decoding:
    tasks: list[DecodeTask]
    slot: Slot
    alive: list[Any]
    fetched: torch.Tensor | None
    checks: list[torch.Tensor]


class LosslessDecoding:
    """Decodes parts of one shape, and checks each against its digest."""

    batch_bytes: ClassVar[int] = 96 << 20

    def __init__(self, gpu: Launcher, pinned: Sequence[torch.Tensor]) -> None:
        """Use ``gpu`` and the regions ``pinned``. See :class:`kvpack.gpu.engine.GpuEngine`."""
        self._gpu, self._pinned, self._supports = gpu, pinned, KnownParts(supports)

    def key(self, task: Task) -> Hashable | None:
        """Return a key of a part's shape and the stride between heads of the target."""
        if not isinstance(task, DecodeTask) or len(task.parts) > 1 or len(task.parts[0].streams) != 2:
            return None
        part = task.block.parts[0]
        if not self._supports(part, task.codec):
            return None
        (_, coded, _), (_, packed, _) = task.parts[0].streams
        if not 16 <= len(coded) <= MAX_PAYLOAD or coded[0] != 1:
            return None
        if len(packed) != 1 + prod(part.shape) * 7 // 8 or packed[0] != 0:
            return None
        return part.shape, None if task.room is None else task.room.arrays[0].stride(0)

    def joins(self, batch: Sequence[Task], task: Task) -> bool:
        """Return whether a batch can take one more part."""
        return len(batch) < MAX_PARTS

    def stage(self, tasks: list[DecodeTask], slot: Slot) -> _Batch:
        """Begin to copy the streams."""
        pieces = streams_of(task.parts[0] for task in tasks)
        return _Batch(tasks, slot, stage(slot, pieces, self._pinned))

    def start(self, batch: _Batch) -> _Decoding:
        """Decode the parts, and request those that have no room of their own and the errors."""
        tasks = batch.tasks
        shape = tasks[0].block.parts[0].shape
        host = batch.staged.ready()
        with batch.slot as slot:
            own = None
            if tasks[0].room is None:
                own = torch.empty((len(tasks), *shape), dtype=torch.int16, device=slot.device)
                goals = own.data_ptr() + 2 * prod(shape) * np.arange(len(tasks))
                stride = shape[1] * shape[2]
            else:
                goals = np.array([task.room.arrays[0].data_ptr() for task in tasks], np.int64)
                stride = tasks[0].room.arrays[0].stride(0)
            received = torch.empty(-(-len(host) // 8) * 8 + 8, dtype=torch.uint8, device=slot.device)
            received[: len(host)].copy_(host, non_blocking=True)
            under_way = _Decoding(tasks, slot, [host, received, batch.staged, own], None, [])
            at = received.data_ptr() + batch.staged.skip
            for some in range(0, len(tasks), BATCH_PARTS):
                rows = slice(some, some + BATCH_PARTS)
                at = self._decode(under_way, tasks[rows], stride, at, goals[rows])
            if own is not None:
                under_way.fetched = slot.fetch(own)
        return under_way

    def _decode(self, batch: _Decoding, tasks: list[DecodeTask], stride: int, at: int, goals: NDArray[np.int64]) -> int:
        """Request the decoding and checks of parts whose streams begin at ``at``. Return where the streams end."""
        slot, rows = batch.slot, np.array([_row(task.parts[0]) for task in tasks], np.int64)
        sizes = rows[:, [CODED_SIZE, PACKED_SIZE]].reshape(-1)
        ends = at + np.cumsum(sizes)
        odd = np.arange(len(sizes)) % 2  # mantissas are aligned after their mode byte
        spaces = (sizes - odd + 15) // 16 * 16
        columns = (ends - sizes, sizes, rows[:, [CODED_SUM, PACKED_SUM]].reshape(-1), np.cumsum(spaces) - spaces, odd)
        table = slot.send(torch.from_numpy(np.stack(columns)))
        wanted = slot.send(torch.from_numpy(np.stack([goals, rows[:, DIGEST]])))
        shape = tasks[0].block.parts[0].shape
        goal = rans.Parts(wanted[0], shape, stride, item=2, shift=7, width=9, floats=True)
        arena = torch.empty(int(spaces.sum()) + rans.slack(goal), dtype=torch.uint8, device=slot.device)
        places = table[3] + arena.data_ptr()
        own, mantissas = places.view(-1, 2).t().contiguous()
        begins, lengths = table[0] + table[4], table[1] - table[4]
        self._gpu.launch("common/align:align", {}, (8, len(sizes)), 256, 0, begins, lengths, places)
        shared = rans.shared_for(int(rows[:, TABLES].max()) + 1)
        meta, digests, sums = rans.decode(
            self._gpu, own, table[1][::2].contiguous(), goal, mantissas, shared, (table[0], table[1])
        )
        assert sums is not None
        wrong = sums.ne(table[2])
        faults = torch.stack([wrong[::2] | wrong[1::2], meta[:, rans.FAULT] != 0, digests != wanted[1]])
        batch.checks.append(slot.fetch(faults))
        batch.alive += [arena, table, wanted]
        return int(ends[-1])

    def collect(self, batch: _Decoding) -> _Decoding:
        """Return the batch unchanged, since all its results were requested before."""
        return batch

    def finish(self, batch: _Decoding) -> Iterator[Outcome]:
        """Yield the parts or their errors."""
        batch.slot.wait()
        faults = np.concatenate([found.numpy() for found in batch.checks], axis=1)
        every: Any = None if batch.fetched is None else batch.fetched.numpy().view(np.uint16)
        wrong: list[bool] = np.any(faults, axis=0).tolist()
        for i, task in enumerate(batch.tasks):
            if wrong[i]:
                text = FAULTS[int(faults[:, i].argmax())].format(task.block.parts[0].label)
                yield Done(task.ticket, error=CorruptError(text))
            else:
                yield Done(task.ticket, arrays=() if every is None else (every[i],))


def _row(part: FramePart) -> list[int]:
    coded, packed = part.streams
    sums = signed((coded.checksum, packed.checksum, part.digest))
    return [len(coded.data), sums[0], coded.data[1], len(packed.data), *sums[1:]]

"""``fisher`` on a GPU: windows of a cache to streams, and back.

A batch is a run of neighbouring windows of one length. The CPU decides the tokens' levels before a window is sent, and
the GPU decides their shifts. The CPU codes the streams of both, which take a few bits per token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch

from kvpack.cache import WindowSpec
from kvpack.codecs.chain.base import Part
from kvpack.codecs.chain.codec import ChainCodec
from kvpack.codecs.chain.quantizers.dead_zone import MIDDLE
from kvpack.codecs.chain.quantizers.dead_zone.reference import MAX_SHIFT
from kvpack.codecs.context import DecodeContext
from kvpack.codecs.protocol import Codec, Scope
from kvpack.engine import DecodeTask, Done, EncodeTask, Task
from kvpack.errors import CorruptError, UnsupportedError
from kvpack.gpu.engine.fisher_kernels import Coefficients, FisherKernels
from kvpack.gpu.engine.kernels import Outcome
from kvpack.gpu.engine.staging import Staged, signed, stage, stage_windows, unsigned
from kvpack.gpu.kernels import scaled_rans
from kvpack.gpu.runtime.host import Slot
from kvpack.gpu.runtime.launch import Launcher
from kvpack.kvp.frame import FramePart, Stream
from kvpack.numerics.checksum import checksum

KEPT = 2
"""The number of pairs of profile and capture whose matrices stay in device memory."""


@dataclass(frozen=True)
class _Stack:
    """All parts of a window as one array: the order in which they are stacked, and the properties of the whole."""

    order: tuple[int, ...]
    array: Part


class _Windows:
    """What encoding and decoding share: which windows the kernels support, and the kernels for a capture."""

    batch_bytes: ClassVar[int] = 256 << 20

    def __init__(self, gpu: Launcher, pinned: Sequence[torch.Tensor]) -> None:
        """Use ``gpu`` and the regions ``pinned``. See :class:`kvpack.gpu.engine.GpuEngine`."""
        self._gpu, self._pinned = gpu, pinned
        self._kernels: OrderedDict[Hashable, tuple[DecodeContext, FisherKernels]] = OrderedDict()
        self._stacks: OrderedDict[Hashable, tuple[object, _Stack | None]] = OrderedDict()

    def stack(self, block: WindowSpec, codec: Codec, context: DecodeContext) -> _Stack | None:
        """Return how a window is stacked, or None if the kernels do not support it."""
        parts = block.parts
        key = (id(context), id(codec), id(parts[0]), id(parts[-1]), len(parts))
        if key not in self._stacks:  # the entry keeps these objects alive, so their ids stay unique
            self._stacks[key] = (context, codec, parts), self._found(block, codec, context)
            while len(self._stacks) > 64:
                self._stacks.popitem(last=False)
        return self._stacks[key][1]

    def _found(self, block: WindowSpec, codec: Codec, context: DecodeContext) -> _Stack | None:
        if not isinstance(codec, ChainCodec) or codec.traits.scope is not Scope.CACHE or context.profile is None:
            return None
        try:
            stacks = codec.stacks(block)
        except UnsupportedError:
            return None
        array = codec.array_of(block.take(stacks[0]).parts, context)
        fits = len(stacks) == 1 and prod(array.shape) > 0 and array.shape[0] % 2 == 0
        if not fits or not FisherKernels.supports(array, codec.keys, len(stacks[0]), self._gpu.max_shared):
            return None
        return _Stack(tuple(stacks[0]), array)

    def window_key(self, block: WindowSpec, codec: Codec, context: DecodeContext) -> Hashable | None:
        """Return the key of a window. Windows of one capture and one length are coded together."""
        if len(block.parts) < 2 or not block.layered or self.stack(block, codec, context) is None:
            return None
        return id(context), codec.name, block.parts[0].tokens

    def kernels(self, codec: Any, stack: _Stack, context: DecodeContext, slot: Slot) -> FisherKernels:
        """Return the kernels for a capture, with its profile's matrices and what follows from its token ids."""
        length = stack.array.length if stack.array.length is not None else stack.array.first + stack.array.shape[1]
        key = (id(context), codec, stack.array.shape[0], length)
        if key not in self._kernels:
            self._kernels[key] = context, FisherKernels(self._gpu, codec.keys, stack.array)
            slot.synchronize()
            while len(self._kernels) > KEPT:
                self._kernels.popitem(last=False)
        self._kernels.move_to_end(key)
        return self._kernels[key][1]


def _follows(before: WindowSpec, after: WindowSpec) -> bool:
    return before.parts[0].first + before.parts[0].tokens == after.parts[0].first


@dataclass(frozen=True)
class _Batch:
    tasks: list[Any]
    stacks: list[_Stack]
    kernels: FisherKernels
    slot: Slot
    staged: Staged


@dataclass
class _Encoding:
    tasks: list[EncodeTask]
    stacks: list[_Stack]
    slot: Slot
    alive: Any
    done: Coefficients
    numbers: torch.Tensor
    digests: torch.Tensor
    known: Callable[[], None]
    levels: Any
    shifts: torch.Tensor
    arena: torch.Tensor | None = None


class FisherEncoding(_Windows):
    """Encodes windows of one length."""

    def key(self, task: Task) -> Hashable | None:
        """Return a key of the capture, the codec, and the windows' length."""
        if not isinstance(task, EncodeTask):
            return None
        return self.window_key(task.block.spec, task.codecs[0][1], task.context)

    def joins(self, batch: Sequence[Task], task: Task) -> bool:
        """Return whether a window directly follows those in the batch."""
        last: Any = batch[-1]
        return isinstance(task, EncodeTask) and _follows(last.block.spec, task.block.spec)

    def stage(self, tasks: list[EncodeTask], slot: Slot) -> _Batch:
        """Begin to copy the windows, in the order in which they are stacked."""
        codec, context = tasks[0].codecs[0][1], tasks[0].context
        stacks = [self.stack(task.block.spec, codec, context) for task in tasks]
        found = [stack for stack in stacks if stack is not None]
        kernels = self.kernels(codec, found[0], context, slot)
        orders = [stack.order for stack in found]
        staged = stage_windows(slot, [task.block for task in tasks], orders, self._pinned)
        return _Batch(tasks, found, kernels, slot, staged)

    def start(self, batch: _Batch) -> _Encoding:
        """Transform, quantize and encode the windows, and request sizes, checksums and shifts."""
        first = batch.tasks[0].block.spec.parts[0]
        shape, tensors, units = first.shape, len(batch.stacks[0].order), len(batch.tasks)
        kernels, position = batch.kernels, first.position
        host = batch.staged.ready()
        levels = kernels.levels(first.first, units, shape[1], batch.tasks[0].hints.mass)
        with batch.slot as slot:
            sent = slot.send(host)
            begin = sent.data_ptr() + batch.staged.skip
            addresses = torch.arange(units * tensors, device=slot.device) * (2 * prod(shape)) + begin
            given = addresses.view(units, tensors)
            done = kernels.compress(given, shape, shape[1] * shape[2], position, levels)
            numbers = slot.fetch(
                torch.stack([done.coded.places[1:], done.coded.sizes, done.coded.checksums, done.faults])
            )
            digests, shifts = slot.fetch(done.digests), slot.fetch(done.shifts)
            known = slot.record_event()
        alive = (host, sent, batch.staged)
        return _Encoding(batch.tasks, batch.stacks, slot, alive, done, numbers, digests, known, levels, shifts)

    def collect(self, batch: _Encoding) -> _Encoding:
        """Request the streams, since their sizes are known now."""
        batch.known()
        with batch.slot as slot:
            batch.arena = slot.fetch(batch.done.coded.arena[: int(batch.numbers[0, -1])])
        return batch

    def finish(self, batch: _Encoding) -> Iterator[Outcome]:
        """Yield the streams. If the codec cannot represent a window's values, yield its task instead."""
        batch.slot.wait()
        assert batch.arena is not None
        places = [0, *batch.numbers[0].tolist()]
        arena: Any = memoryview(batch.arena.numpy().data)
        for u, (task, stack) in enumerate(zip(batch.tasks, batch.stacks, strict=True)):
            if batch.numbers[3, u]:
                yield task
                continue
            number, codec = task.codecs[0]
            levels, shifts = _side_streams(codec, batch.levels[u], batch.shifts[u].numpy())
            coded = arena[places[u] : places[u] + int(batch.numbers[1, u])]
            streams = (
                Stream("levels", levels, checksum(levels)),
                Stream("shifts", shifts, checksum(shifts)),
                Stream("coefficients", coded, *unsigned(batch.numbers[2, u : u + 1])),
            )
            digests = dict(zip(stack.order, unsigned(batch.digests[u]), strict=True))
            parts = (FramePart(number, digests[i], streams if i == 0 else ()) for i in range(len(stack.order)))
            yield Done(task.ticket, tuple(parts))


def _side_streams(codec: Any, levels: Any, shifts: Any) -> list[bytes]:
    """Return the streams of levels and shifts ``[T]``."""
    planes = codec.keys.quantizer.planes(Part("", (1, len(levels), 1), 0, 0))
    codes = [levels + MIDDLE, shifts + MAX_SHIFT]
    entropy = codec.keys.entropy
    return [entropy.encode(c.astype(np.uint8)[None, :, None], p) for c, p in zip(codes, planes[:2], strict=True)]


@dataclass(frozen=True)
class _Decoding:
    tasks: list[DecodeTask]
    stacks: list[_Stack]
    slot: Slot
    alive: Any
    fetched: torch.Tensor | None
    faults: torch.Tensor


class FisherDecoding(_Windows):
    """Decodes windows of one length."""

    def key(self, task: Task) -> Hashable | None:
        """Return a key of the capture, the codec, the windows' length, and the stride between heads of the target."""
        if not isinstance(task, DecodeTask) or [len(part.streams) for part in task.parts[:2]] != [3, 0]:
            return None
        key = self.window_key(task.block, task.codec, task.context)
        if key is None or any(part.streams for part in task.parts[1:]):
            return None
        strides = None if task.room is None else {array.stride(0) for array in task.room.arrays}
        if strides is not None and len(strides) > 1:
            return None
        return key, None if strides is None else strides.pop()

    def joins(self, batch: Sequence[Task], task: Task) -> bool:
        """Return whether a window directly follows those in the batch."""
        last: Any = batch[-1]
        return isinstance(task, DecodeTask) and _follows(last.block, task.block)

    def stage(self, tasks: list[DecodeTask], slot: Slot) -> _Batch:
        """Begin to copy the streams of coefficients."""
        codec, context = tasks[0].codec, tasks[0].context
        stacks = [self.stack(task.block, codec, context) for task in tasks]
        found = [stack for stack in stacks if stack is not None]
        kernels = self.kernels(codec, found[0], context, slot)
        pieces = (np.frombuffer(task.parts[0].streams[2].data, np.uint8) for task in tasks)
        return _Batch(tasks, found, kernels, slot, stage(slot, pieces, self._pinned))

    def start(self, batch: _Batch) -> _Decoding:
        """Decode the windows, and request the parts that have no room of their own and the errors."""
        tasks, kernels = batch.tasks, batch.kernels
        first = tasks[0].block.parts[0]
        heads, tokens, dims = first.shape
        levels, shifts = np.stack([_side_codes(task) for task in tasks], axis=1)
        streams = [task.parts[0].streams[2] for task in tasks]
        sizes = [len(stream.data) for stream in streams]
        size = tokens * kernels.rank
        places = np.cumsum([0, *(-(-n // 16) * 16 for n in sizes)]).tolist()
        host = batch.staged.ready()
        with batch.slot as slot:
            own, targets, stride = self._targets(batch)
            received = torch.empty(-(-len(host) // 8) * 8 + 8, dtype=torch.uint8, device=slot.device)
            received[: len(host)].copy_(host, non_blocking=True)
            arena = torch.empty(places[-1] + scaled_rans.slack(size), dtype=torch.uint8, device=slot.device)
            starts = np.cumsum([0, *sizes[:-1]]).tolist()
            sums = signed(stream.checksum for stream in streams)
            table = slot.send(torch.tensor([starts, sizes, places[:-1], sums]))
            aligned = table[2] + arena.data_ptr()
            begins = table[0] + received.data_ptr() + batch.staged.skip
            self._gpu.launch("common/align:align", {}, (64, len(sizes)), 256, 0, begins, table[1], aligned)
            groups = scaled_rans.groups_of([bytes(stream.data[:8]) for stream in streams], sizes, size)
            addresses = slot.send(torch.tensor(targets))
            unsound, found, nonfinite = kernels.decompress(
                aligned, table[1], groups, addresses, (heads, tokens, dims), stride, first.position, levels, shifts
            )
            faults = slot.fetch(torch.stack([found != table[3], unsound != 0, nonfinite != 0]))
            fetched = None if own is None else slot.fetch(own)
        alive = (host, received, arena, table, addresses, own, batch.staged)
        return _Decoding(tasks, batch.stacks, slot, alive, fetched, faults)

    def _targets(self, batch: _Batch) -> tuple[torch.Tensor | None, list[list[int]], int]:
        """Return memory for a batch without rooms (else None), each window's target addresses, and heads' stride."""
        first = batch.tasks[0].block.parts[0]
        heads, tokens, dims = first.shape
        if batch.tasks[0].room is not None:
            rooms = [task.room.arrays for task in batch.tasks]
            targets = [[r[i].data_ptr() for i in s.order] for r, s in zip(rooms, batch.stacks, strict=True)]
            return None, targets, int(rooms[0][0].stride(0))
        count = len(batch.stacks[0].order)
        own = torch.empty((len(batch.tasks), count, heads, tokens, dims), dtype=torch.int16, device=self._gpu.device)
        one = 2 * heads * tokens * dims
        return own, [[own[u].data_ptr() + k * one for k in range(count)] for u in range(len(own))], tokens * dims

    def collect(self, batch: _Decoding) -> _Decoding:
        """Return the batch unchanged, since all its results were requested before."""
        return batch

    def finish(self, batch: _Decoding) -> Iterator[Outcome]:
        """Yield the windows or their errors. The CPU decodes windows whose values are not finite."""
        batch.slot.wait()
        every: Any = None if batch.fetched is None else batch.fetched.numpy().view(np.uint16)
        for u, (task, faults) in enumerate(zip(batch.tasks, batch.faults.T.tolist(), strict=True)):
            label = task.block.parts[0].label
            wrong, unsound, nonfinite = faults
            if wrong:
                text = f"corrupt: the checksum of {label}, stream 'coefficients', does not match"
                yield Done(task.ticket, error=CorruptError(text))
            elif unsound:
                yield Done(task.ticket, error=CorruptError(f"{label}: scaled_rans stream: unsound"))
            elif nonfinite:
                yield task
            elif every is None:
                yield Done(task.ticket)
            else:
                place = {part: k for k, part in enumerate(batch.stacks[u].order)}
                yield Done(task.ticket, arrays=tuple(every[u, place[i]] for i in range(len(place))))


def _side_codes(task: DecodeTask) -> Any:
    """Return the levels and shifts of a window's tokens, ``[2, T]``.

    Raises:
        CorruptError: A checksum does not match, or the coding is invalid.

    """
    codec: Any = task.codec
    label = task.block.parts[0].label
    planes = codec.keys.quantizer.planes(Part("", (1, task.block.parts[0].tokens, 1), 0, 0))[:2]
    found = []
    for plane, (_, data, expected) in zip(planes, task.parts[0].streams, strict=False):
        if checksum(data) != expected:
            raise CorruptError(f"corrupt: the checksum of {label}, stream {plane.name!r}, does not match")
        try:
            codes = codec.keys.entropy.decode(data, plane)
        except CorruptError as error:
            raise CorruptError(f"{label}: {error}") from None
        found.append(codes.reshape(-1).astype(np.int32))
    return np.stack(found) - np.array([[MIDDLE], [MAX_SHIFT]], np.int32)

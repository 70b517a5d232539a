"""``fisher``'s files on a GPU: chunks of captures to streams, and chunks of archives to tensors.

A batch is chunks of one length; it is staged, coded and fetched like those of the lossless codec. Levels of tokens are
the CPU's, known before a chunk is sent; their shifts are the GPU's; the streams of both, a few bits a token, the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpack.codecs.chain.base import Part, Side
from kvpack.codecs.chain.quantizers.dead_zone import MIDDLE
from kvpack.codecs.chain.quantizers.dead_zone.reference import MOST_SHIFT
from kvpack.codecs.chain.units import Unit
from kvpack.codecs.recipes import Codec
from kvpack.errors import CorruptError, UnsupportedError
from kvpack.gpu.engine.joint import Compressed, Joint
from kvpack.gpu.engine.lossless import EncodedPart
from kvpack.gpu.engine.staging import SLOTS, Source, Staged, in_batches, pieces_of, pipelined, signed, unsigned
from kvpack.gpu.runtime.host import Slot
from kvpack.jobs.reader import Archive, Capture, side_of
from kvpack.kvp import PartEntry, layer_of
from kvpack.kvp.layout import PartPlan
from kvpack.numerics.checksum import checksum
from kvpack.profiles import Profile

if TYPE_CHECKING:
    import torch

    from kvpack.gpu.runtime.launch import Launcher

BATCH_BYTES = 256 << 20
Chunk = tuple[PartPlan, ...]


def _stack(chunk: Chunk, codec: Codec, profile: Profile | None, side: Side) -> tuple[list[PartPlan], Part]:
    return Unit(chunk, codec, profile, side).joint_stack()


def takes_chunk(chunk: Chunk, codec: Codec, profile: Profile | None, side: Side) -> bool:
    """Whether the kernels code the parts of these plans as one."""
    if not codec.joint or chunk[0].layer is None or not prod(chunk[0].shape):
        return False
    try:
        stack, part = _stack(chunk, codec, profile, side)
    except UnsupportedError:
        return False
    return len(stack) == len(chunk) and part.shape[0] % 2 == 0 and Joint.supports(part, codec.keys, len(stack))


def _batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks of one length that follow each other, no more than a batch takes, and at least one."""

    def joins(batch: list[Chunk], chunk: Chunk) -> bool:
        last, first = batch[-1][0], chunk[0]
        size = 2 * len(chunk) * prod(first.shape)
        follows = last.tokens == first.tokens and last.first + last.tokens == first.first
        return follows and (len(batch) + 1) * size <= BATCH_BYTES

    return in_batches(chunks, joins)


@dataclass(frozen=True)
class _Chunks:
    chunks: list[Chunk]
    slot: Slot
    staged: Staged


@dataclass
class _Encoding:
    chunks: list[Chunk]
    slot: Slot
    alive: Any
    done: Compressed
    numbers: torch.Tensor
    digests: torch.Tensor
    known: Callable[[], None]
    levels: Any
    shifts: torch.Tensor
    arena: torch.Tensor | None = None


class ChunkEncoder:
    """Digests and streams of a capture's chunks that :func:`takes_chunk` says the GPU takes."""

    def __init__(self, gpu: Launcher, capture: Capture, codec: Codec, profile: Profile | None, side: Side) -> None:
        """Of ``capture``'s chunks."""
        self._gpu, self._codec, self._profile, self._side = gpu, codec, profile, side
        self._start_of_data = capture.file.header.data_start
        self._source = Source(capture.file.view)
        self._slots = [Slot(gpu) for _ in range(SLOTS)]
        self._joint: Joint | None = None

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[list[EncodedPart] | None]:
        """A list of the chunk's parts for each chunk; None for one with values that the codec cannot represent."""
        return pipelined(_batches(chunks), self._stage, self._start, self._collect, self._finish, self._slots)

    def _stage(self, chunks: list[Chunk], slot: Slot) -> _Chunks:
        if self._joint is None:
            _, part = _stack(chunks[0], self._codec, self._profile, self._side)
            self._joint = Joint(self._gpu, self._codec.keys, part)
            slot.synchronize()
        stacks = [_stack(chunk, self._codec, self._profile, self._side)[0] for chunk in chunks]
        pieces = (piece for stack in stacks for plan in stack for piece in pieces_of(plan, self._start_of_data))
        return _Chunks(chunks, slot, self._source.stage(slot, pieces))

    def _start(self, batch: _Chunks) -> _Encoding:
        import torch

        assert self._joint is not None
        first = batch.chunks[0][0]
        shape, tensors = first.shape, len(batch.chunks[0])
        host = batch.staged.ready()
        levels = self._joint.levels(first.first, len(batch.chunks), shape[1])
        with batch.slot as slot:
            sent = slot.send(host)
            begin = sent.data_ptr() + batch.staged.skip
            addresses = torch.arange(len(batch.chunks) * tensors, device=slot.device) * (2 * prod(shape)) + begin
            given = addresses.view(len(batch.chunks), tensors)
            done = self._joint.compress(given, shape, shape[1] * shape[2], first.first, levels)
            numbers = slot.fetch(
                torch.stack([done.coded.places[1:], done.coded.sizes, done.coded.checksums, done.faults])
            )
            digests, shifts = slot.fetch(done.digests), slot.fetch(done.shifts)
            known = slot.record_event()
        return _Encoding(batch.chunks, slot, (host, sent), done, numbers, digests, known, levels, shifts)

    def _collect(self, batch: _Encoding) -> _Encoding:
        batch.known()
        with batch.slot as slot:
            batch.arena = slot.fetch(batch.done.coded.arena[: int(batch.numbers[0, -1])])
        return batch

    def _finish(self, batch: _Encoding) -> Iterator[list[EncodedPart] | None]:
        batch.slot.wait()
        assert batch.arena is not None
        places = [0, *batch.numbers[0].tolist()]
        streams: Any = memoryview(batch.arena.numpy().data)
        for u, chunk in enumerate(batch.chunks):
            if batch.numbers[3, u]:
                yield None
                continue
            levels, shifts = self._beside(batch.levels[u], batch.shifts[u].numpy())
            coded = streams[places[u] : places[u] + int(batch.numbers[1, u])]
            mine = [
                ("levels", levels, checksum(levels)),
                ("shifts", shifts, checksum(shifts)),
                ("coefficients", coded, *unsigned(batch.numbers[2, u : u + 1])),
            ]
            stack = _stack(chunk, self._codec, self._profile, self._side)[0]
            digests = dict(zip(stack, unsigned(batch.digests[u]), strict=True))
            yield [(digests[plan], mine if plan is chunk[0] else []) for plan in chunk]

    def _beside(self, levels: Any, shifts: Any) -> list[bytes]:
        """Streams of both."""
        planes = self._codec.keys.quantizer.planes(Part("", (1, len(levels), 1), 0, 0))
        codes = [levels + MIDDLE, shifts + MOST_SHIFT]
        entropy = self._codec.keys.entropy
        return [entropy.encode(c.astype(np.uint8)[None, :, None], p) for c, p in zip(codes, planes[:2], strict=True)]


@dataclass(frozen=True)
class _Entries:
    chunks: list[tuple[PartEntry, ...]]
    slot: Slot
    staged: Staged


@dataclass(frozen=True)
class _Decoding:
    chunks: list[tuple[PartEntry, ...]]
    slot: Slot
    alive: Any
    faults: torch.Tensor


class ChunkDecoder:
    """All keys and values of an archive whose layers are coded as one, in device memory."""

    def __init__(self, gpu: Launcher, archive: Archive) -> None:
        """Of ``archive``."""
        self._gpu, self._archive = gpu, archive
        self._source = Source(archive.container.view)
        self._chunks: list[tuple[PartEntry, ...]] = []
        layered = [part for part in archive.parts if part.plan.layer is not None]
        for _, run in groupby(layered, key=lambda part: part.plan.first):
            self._chunks.append(tuple(run))
        self._side: Side | None = None
        self._tensors: dict[str, torch.Tensor] | None = None

    def takes(self) -> bool:
        """Whether the GPU decodes it: every chunk is coded by one joint codec, of shapes the kernels take."""
        codecs = {part.codec for chunk in self._chunks for part in chunk}
        if len(codecs) != 1 or not self._archive.codecs[codecs.copy().pop()].joint or self._archive.profile is None:
            return False
        return all(
            takes_chunk(tuple(part.plan for part in chunk), self._codec, self._archive.profile, self._known())
            and [len(part.streams) for part in chunk] == [3] + [0] * (len(chunk) - 1)
            for chunk in self._chunks
        )

    @property
    def _codec(self) -> Codec:
        return self._archive.codecs[self._chunks[0][0].codec]

    def _known(self) -> Side:
        if self._side is None:
            self._side = side_of(self._archive, ("tokens",))
        return self._side

    def read(self, names: Sequence[str], *, fetch: bool = True) -> Iterator[tuple[str, Any]]:
        """Names and tensors in order, as :meth:`kvpack.gpu.engine.lossless.Decoder.read` gives them.

        Raises:
            CorruptError: a checksum or the coding does not hold.

        """
        import torch

        if self._tensors is None:
            self._tensors = self._decoded()
        if not self._tensors:  # values that are not finite: the CPU says what comes of them
            yield from ((name, self._archive.read(name)) for name in names)
            return
        if not fetch:
            yield from ((name, self._tensors[name].view(torch.bfloat16)) for name in names)
            return
        tensors, slots = self._tensors, [Slot(self._gpu) for _ in range(SLOTS)]

        def start(name: str, slot: Slot) -> tuple[str, Slot, torch.Tensor]:
            with slot:
                return name, slot, slot.fetch(tensors[name])

        def finish(one: tuple[str, Slot, torch.Tensor]) -> Iterator[tuple[str, Any]]:
            name, slot, host = one
            slot.wait()
            yield name, host.numpy().view(np.uint16)

        yield from pipelined(names, start, lambda one: one, lambda one: one, finish, slots)

    def _decoded(self) -> dict[str, torch.Tensor]:
        """All tensors; none where some value is not finite."""
        import torch

        specs = [spec for spec in self._archive.tensors.values() if layer_of(spec) is not None]
        tensors = {s.name: torch.empty(s.shape, dtype=torch.int16, device=self._gpu.device) for s in specs}
        plans = tuple(part.plan for part in self._chunks[0])
        _, part = _stack(plans, self._codec, self._archive.profile, self._known())
        joint = Joint(self._gpu, self._codec.keys, part)
        slots = [Slot(self._gpu) for _ in range(SLOTS)]
        slots[0].synchronize()
        entries = {tuple(part.plan for part in chunk): chunk for chunk in self._chunks}
        batches = ([entries[plans] for plans in batch] for batch in _batches(entries))
        start = lambda batch: self._start(batch, joint, tensors)  # noqa: E731
        odd = list(pipelined(batches, self._stage, start, lambda batch: batch, self._finish, slots))
        return {} if any(odd) else tensors

    def _stage(self, chunks: list[tuple[PartEntry, ...]], slot: Slot) -> _Entries:
        pieces = [self._archive.container.places(chunk[0])[2] for chunk in chunks]
        return _Entries(chunks, slot, self._source.stage(slot, pieces))

    def _start(self, batch: _Entries, joint: Joint, tensors: dict[str, torch.Tensor]) -> _Decoding:
        import torch

        from kvpack.gpu.kernels import scaled_rans as cuda

        plan = batch.chunks[0][0].plan
        heads, tokens, dims = plan.shape
        levels, shifts = np.stack([self._beside(chunk[0]) for chunk in batch.chunks], axis=1)
        streams = [self._archive.container.streams(chunk[0])[2] for chunk in batch.chunks]
        sizes = [len(data) for _, data, _ in streams]
        size = tokens * joint.rank
        places = np.cumsum([0, *(-(-n // 16) * 16 for n in sizes)]).tolist()
        stack = _stack(tuple(p.plan for p in batch.chunks[0]), self._codec, self._archive.profile, self._known())[0]
        targets = [
            [tensors[one.tensor.name].data_ptr() + 2 * chunk[0].plan.first * dims for one in stack]
            for chunk in batch.chunks
        ]
        host = batch.staged.ready()
        with batch.slot as slot:
            received = torch.empty(-(-len(host) // 8) * 8 + 8, dtype=torch.uint8, device=slot.device)
            received[: len(host)].copy_(host, non_blocking=True)
            arena = torch.empty(places[-1] + cuda.slack(size), dtype=torch.uint8, device=slot.device)
            starts = np.cumsum([0, *sizes[:-1]]).tolist()
            table = slot.send(torch.tensor([starts, sizes, places[:-1], signed(total for _, _, total in streams)]))
            aligned = table[2] + arena.data_ptr()
            begins = table[0] + received.data_ptr() + batch.staged.skip
            self._gpu.launch("common/align:align", {}, (64, len(sizes)), 256, 0, begins, table[1], aligned)
            groups = cuda.groups_of([bytes(data[:8]) for _, data, _ in streams], sizes, size)
            addresses = slot.send(torch.tensor(targets))
            unsound, sums, odd = joint.decompress(
                aligned,
                table[1],
                groups,
                addresses,
                (heads, tokens, dims),
                plan.tensor.shape[1] * dims,
                plan.first,
                levels,
                shifts,
            )
            faults = slot.fetch(torch.stack([sums != table[3], unsound != 0, odd != 0]))
        return _Decoding(batch.chunks, slot, (host, received, arena, table, addresses), faults)

    def _beside(self, part: PartEntry) -> Any:
        """Levels and shifts of the chunk's tokens ``[2, T]``."""
        planes = self._codec.keys.quantizer.planes(Part("", (1, part.plan.tokens, 1), 0, 0))[:2]
        found = []
        for plane, (_, data, expected) in zip(planes, self._archive.container.streams(part), strict=False):
            if checksum(data) != expected:
                raise CorruptError(f"corrupt: the checksum of {part.plan.name}, stream {plane.name!r}, does not match")
            try:
                codes = self._codec.keys.entropy.decode(data, plane)
            except CorruptError as error:
                raise CorruptError(f"{part.plan.name}: {error}") from None
            found.append(codes.reshape(-1).astype(np.int32))
        return np.stack(found) - np.array([[MIDDLE], [MOST_SHIFT]], np.int32)

    def _finish(self, batch: _Decoding) -> Iterator[bool]:
        batch.slot.wait()
        for chunk, (wrong, unsound, odd) in zip(batch.chunks, batch.faults.T.tolist(), strict=True):
            name = chunk[0].plan.name
            if wrong:
                raise CorruptError(f"corrupt: the checksum of {name}, stream 'coefficients', does not match")
            if unsound:
                raise CorruptError(f"{name}: scaled_rans stream: unsound")
            yield odd

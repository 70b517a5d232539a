"""The lossless codec on a GPU: captures to streams and back, batch by batch, the same bytes as on the CPU.

A batch is parts of one shape (compressing) or whole tensors (decompressing), copied to pinned memory, sent, coded and
fetched on a stream of its own, while the batch before it is written and the one after it is read. Nothing is waited for
within a batch but the size of what is to be fetched. What the kernels do not take (other codecs, dtypes and shapes, and
parts that do not compress) goes the CPU's way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpack.archive import Archive, Capture
from kvpack.codecs import Chain
from kvpack.container import PartEntry, layer_of
from kvpack.container.layout import PartPlan
from kvpack.errors import CorruptError, UsageError
from kvpack.parallel import ordered_map
from kvpack.pipeline import Bits, chain_of
from kvpack.stages.device.host import AUTO_BYTES, Slot, find_gpu
from kvpack.stages.entropy.rans import Rans
from kvpack.stages.quantizers.float_split import FloatSplit
from kvpack.tensorfile import TensorSpec

if TYPE_CHECKING:
    import torch

    from kvpack.stages.device.launch import Launcher

BATCH_BYTES = 256 << 20
BATCH_PARTS = 512
AHEAD = 2
"""Batches under way at a time."""

EncodedPart = tuple[int, list[tuple[str, Any, int]]]
"""Digest of the original; streams: name, bytes, checksum."""


def _is_ours(chain: Chain) -> bool:
    return isinstance(chain.quantizer, FloatSplit) and isinstance(chain.entropy, Rans)


def takes(plan: PartPlan, chain: Chain) -> bool:
    """Whether the kernels code this part: bf16, coded losslessly, of a shape they are made for."""
    from kvpack.stages.entropy.rans.cuda import supports

    return plan.tensor.dtype == "BF16" and _is_ours(chain) and supports(plan.shape, 9, floats=True)


def _unsigned(values: torch.Tensor) -> list[int]:
    return [int(value) % (1 << 64) for value in values]


def _batches(plans: Iterable[PartPlan]) -> Iterator[list[PartPlan]]:
    """Runs of plans of one shape and one length of tensor, no more than a batch takes."""
    for _, run in groupby(plans, key=lambda plan: (plan.shape, plan.tensor.shape)):
        batch: list[PartPlan] = []
        for plan in run:
            size = 2 * int(np.prod(plan.shape))
            if batch and (len(batch) == BATCH_PARTS or (len(batch) + 1) * size > BATCH_BYTES):
                yield batch
                batch = []
            batch.append(plan)
        yield batch


@dataclass
class _Encoding:
    """A batch under way: what must stay alive, and what is known when its stream is done."""

    slot: Slot
    count: int
    alive: Any
    coded: Any
    numbers: torch.Tensor
    mantissas: torch.Tensor
    mantissa_size: int


class Encoder:
    """Streams of parts that :func:`takes` says the GPU takes."""

    def __init__(self, gpu: Launcher, capture: Capture) -> None:
        """Of ``capture``'s parts."""
        self._gpu, self._capture = gpu, capture
        self._slots = [Slot(gpu) for _ in range(AHEAD)]

    def encode(self, plans: Iterable[PartPlan]) -> Iterator[EncodedPart]:
        """The plans' digests and streams, in their order."""
        under_way: deque[_Encoding] = deque()
        for number, batch in enumerate(_batches(plans)):
            under_way.append(self._start(batch, self._slots[number % AHEAD]))
            if len(under_way) == AHEAD:
                yield from self._finish(under_way.popleft())
        while under_way:
            yield from self._finish(under_way.popleft())

    def _start(self, batch: list[PartPlan], slot: Slot) -> _Encoding:
        import torch

        from kvpack.stages.entropy.rans import cuda

        shape = batch[0].shape
        with slot:
            slot.wait()
            host = slot.pinned(2 * int(np.prod(shape)) * len(batch))
            rows = host.numpy().view(np.uint16).reshape(len(batch), *shape)
            for row, plan in zip(rows, batch, strict=True):
                bits = self._capture.read(plan.tensor.name)
                row[:] = (
                    bits[:, plan.first : plan.first + plan.tokens] if plan.layer is not None else bits.reshape(shape)
                )
            sent = slot.send(host)
            addresses = torch.arange(len(batch), device=slot.device) * rows[0].nbytes + sent.data_ptr()
            parts = cuda.Parts(addresses, shape, shape[1] * shape[2], item=2, shift=7, width=9, floats=True)
            coded = cuda.encode(self._gpu, parts)
            assert coded.mantissas is not None
            assert coded.digests is not None
            assert coded.mantissa_checksums is not None
            columns = (coded.places[1:], coded.sizes, coded.checksums, coded.mantissa_checksums, coded.digests)
            numbers = slot.fetch(torch.stack(columns))
            mantissas = slot.fetch(coded.mantissas)
        return _Encoding(slot, len(batch), (host, sent), coded, numbers, mantissas, 1 + cuda.mantissa_size(parts))

    def _finish(self, batch: _Encoding) -> Iterator[EncodedPart]:
        batch.slot.wait()
        places = [0, *batch.numbers[0].tolist()]
        with batch.slot as slot:
            arena = slot.fetch(batch.coded.arena[: places[-1]])
            slot.wait()
        sizes = batch.numbers[1].tolist()
        sums, mantissa_sums, digests = map(_unsigned, batch.numbers[2:])
        streams: Any = memoryview(arena.numpy().data)
        mantissas = batch.mantissas.numpy()
        for i in range(batch.count):
            yield (
                digests[i],
                [
                    ("sign_exponent", streams[places[i] : places[i] + sizes[i]], sums[i]),
                    ("mantissa", mantissas[i, 15 : 15 + batch.mantissa_size].data, mantissa_sums[i]),
                ],
            )


@dataclass
class _Decoding:
    slot: Slot
    names: list[str]
    alive: list[Any]
    tensors: dict[str, torch.Tensor]
    fetched: dict[str, torch.Tensor]
    checks: list[tuple[list[PartEntry], torch.Tensor]]


class Decoder:
    """Tensors of an archive, decoded on the GPU where it can, each checked against its digests."""

    def __init__(self, gpu: Launcher, archive: Archive) -> None:
        """Of ``archive``."""
        self._gpu, self._archive = gpu, archive
        self._slots = [Slot(gpu) for _ in range(AHEAD)]
        self._parts: dict[str, list[PartEntry]] = {}
        for part in archive.parts:
            self._parts.setdefault(part.plan.tensor.name, []).append(part)

    def takes(self, name: str) -> bool:
        """Whether a tensor is the GPU's: all its parts bf16, lossless, of shapes the kernels take, and compressed."""
        spec = self._archive.tensors[name]
        return layer_of(spec) is not None and spec.elements > 0 and all(map(self._takes_part, self._parts[name]))

    def _takes_part(self, part: PartEntry) -> bool:
        from kvpack.stages.entropy.rans.cuda import MAX_PAYLOAD

        chain = chain_of(self._archive.codecs[part.codec], part.plan.tensor.name)
        if not takes(part.plan, chain) or len(part.streams) != 2:
            return False
        (_, coded, _), (_, packed, _) = self._archive.container.streams(part)
        size = 1 + int(np.prod(part.plan.shape)) * 7 // 8
        return 0 < len(coded) <= MAX_PAYLOAD and coded[0] == 1 and len(packed) == size and packed[0] == 0

    def read(self, names: Sequence[str], *, fetch: bool = True) -> Iterator[tuple[str, Any]]:
        """Names and tensors in order: bit patterns in main memory, or with ``fetch`` False bf16 in device memory.

        Raises:
            CorruptError: a checksum, the coding or the digest does not hold.

        """
        under_way: deque[_Decoding] = deque()
        for number, (ours, batch) in enumerate(self._grouped(names)):
            if ours:
                under_way.append(self._start(batch, self._slots[number % AHEAD], fetch))
                if len(under_way) == AHEAD:
                    yield from self._finish(under_way.popleft())
                continue
            while under_way:
                yield from self._finish(under_way.popleft())
            for name in batch:
                yield name, self._archive.read(name)
        while under_way:
            yield from self._finish(under_way.popleft())

    def _grouped(self, names: Sequence[str]) -> Iterator[tuple[bool, list[str]]]:
        tensors = self._archive.tensors
        for (ours, _), run in groupby(names, key=lambda name: (self.takes(name), tensors[name].shape)):
            batch: list[str] = []
            for name in run:
                if batch and sum(tensors[n].nbytes for n in (*batch, name)) > BATCH_BYTES:
                    yield ours, batch
                    batch = []
                batch.append(name)
            yield ours, batch

    def _start(self, names: list[str], slot: Slot, fetch: bool) -> _Decoding:
        import torch

        specs = [self._archive.tensors[name] for name in names]
        with slot:
            tensors = {spec.name: torch.empty(spec.shape, dtype=torch.int16, device=slot.device) for spec in specs}
            batch = _Decoding(slot, names, [], tensors, {}, [])
            chunks = zip(*(self._parts[name] for name in names), strict=True)  # one shape, so the same chunks
            for chunk in chunks:
                for first in range(0, len(chunk), BATCH_PARTS):
                    self._decode(batch, list(chunk[first : first + BATCH_PARTS]), specs[0])
            if fetch:
                batch.fetched = {name: slot.fetch(tensor) for name, tensor in tensors.items()}
        return batch

    def _decode(self, batch: _Decoding, parts: list[PartEntry], spec: TensorSpec) -> None:
        """Ask for the decoding of parts of one shape into their tensors, and for all their checks."""
        import torch

        from kvpack.stages.entropy.rans import cuda

        slot, shape, first = batch.slot, parts[0].plan.shape, parts[0].plan.first
        streams = [stream for part in parts for stream in self._archive.container.streams(part)]
        places, at = [], 0
        for i, (_, data, _) in enumerate(streams):
            at = -(-at // 16) * 16 + (15 if i % 2 else 0)  # packed mantissas are aligned behind their mode byte
            places.append(at)
            at += len(data)
        slot.wait()  # the slot's last batch, or its last chunk of tokens, may still be on its way
        host = slot.pinned(at)
        memory = host.numpy()

        def stage(i: int) -> None:
            data = streams[i][1]
            memory[places[i] : places[i] + len(data)] = np.frombuffer(data, np.uint8)

        deque(ordered_map(stage, range(len(streams))), maxlen=0)
        targets = [batch.tensors[part.plan.tensor.name].data_ptr() + 2 * first * shape[2] for part in parts]
        columns = [places, [len(data) for _, data, _ in streams], [_signed(total) for _, _, total in streams]]
        table = slot.send(torch.tensor(columns))
        wanted = slot.send(torch.tensor([targets, [_signed(part.digest) for part in parts]]))
        goal = cuda.Parts(wanted[0], shape, spec.shape[1] * shape[2], item=2, shift=7, width=9, floats=True)
        arena = torch.empty(at + cuda.slack(goal), dtype=torch.uint8, device=slot.device)
        arena[:at].copy_(host, non_blocking=True)
        starts = table[0] + arena.data_ptr()
        heads = [bytes(data[:16]) for _, data, _ in streams[::2]]
        meta, digests, sums = cuda.decode(
            self._gpu, starts[::2].contiguous(), table[1][::2].contiguous(), goal, (starts[1::2] + 1).contiguous(),
            cuda.shared_for(heads), (starts, table[1]),
        )  # fmt: skip
        assert sums is not None
        wrong = sums.ne(table[2])
        faults = torch.stack([wrong[::2] | wrong[1::2], meta[:, cuda.FAULT] != 0, digests != wanted[1]])
        batch.checks.append((parts, slot.fetch(faults)))
        batch.alive += [host, arena, table, wanted, starts]

    def _finish(self, batch: _Decoding) -> Iterator[tuple[str, Any]]:
        batch.slot.wait()
        for parts, faults in batch.checks:
            for part, (checksum, coding, digest) in zip(parts, faults.T.tolist(), strict=True):
                if checksum:
                    raise CorruptError(f"corrupt: the checksum of a stream of {part.plan.name} does not match")
                if coding:
                    raise CorruptError(f"{part.plan.name}: rans stream: unsound")
                if digest:
                    raise CorruptError(f"corrupt: {part.plan.name} does not match the digest of the original")
        for name in batch.names:
            if batch.fetched:
                bits: Bits = batch.fetched[name].numpy().view(np.uint16)
                yield name, bits
            else:
                yield name, batch.tensors[name].view(_bfloat16())


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _bfloat16() -> Any:
    import torch

    return torch.bfloat16


def to_device(archive: Archive, device: str = "cuda") -> dict[str, torch.Tensor]:
    """Every layer's keys and values as tensors on ``device``, by name: decoded there, not sent through main memory.

    What the kernels do not take is decoded by the CPU and sent.

    Raises:
        UsageError: there is no such GPU.
        CorruptError: the file is damaged.

    """
    import torch

    gpu, reason = find_gpu(device, AUTO_BYTES)
    if gpu is None:
        raise UsageError(f"no GPU for {device!r}: {reason or 'asked for the CPU'}")
    names = [name for name, spec in archive.tensors.items() if layer_of(spec) is not None]
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    out = {}
    for name, data in Decoder(gpu, archive).read(names, fetch=False):
        if isinstance(data, np.ndarray):
            signed = np.ascontiguousarray(data).view(np.dtype(f"i{data.itemsize}"))
            out[name] = torch.from_numpy(signed).view(dtypes[archive.tensors[name].dtype]).to(gpu.device)
        else:
            out[name] = data
    return out

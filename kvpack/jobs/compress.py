"""What kvpack does, for programs: compress, decompress, test. The command line is a thin layer over this."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, partial
from itertools import groupby, islice
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import kvpack
from kvpack.codecs.chain.base import Side, UnrepresentableError
from kvpack.codecs.chain.pipeline import chain_of
from kvpack.codecs.chain.quantizers.dead_zone import DeadZone
from kvpack.codecs.chain.units import Unit, units
from kvpack.codecs.recipes import CODECS, Codec
from kvpack.engine.threads import Progress, ordered_map
from kvpack.errors import FormatError, UsageError
from kvpack.formats.safetensors import Header as SourceHeader
from kvpack.formats.safetensors import TensorFile, build_header
from kvpack.jobs.decompress import Selection, check, decompress
from kvpack.jobs.hints import with_hints
from kvpack.jobs.reader import Archive, Capture, side_of
from kvpack.kvp import ContainerWriter, layer_of, plan_parts
from kvpack.kvp.header import Header
from kvpack.kvp.layout import FLOAT_DTYPES, PartPlan
from kvpack.numerics.checksum import checksum
from kvpack.numerics.floats import Bits
from kvpack.profiles import Profile

if TYPE_CHECKING:
    from kvpack.gpu.runtime.launch import Launcher

__all__ = [
    "PROBES",
    "Compressed",
    "Planned",
    "Progress",
    "Selection",
    "Write",
    "check",
    "compress",
    "compress_many",
    "decompress",
    "differing_parts",
    "plan",
]

CHUNK_TOKENS = 2048
CHUNK_MULTIPLE = 128
"""Chunks begin at multiples of this many tokens, so that groups of tokens never straddle two."""

WINDOW_BYTES, WINDOW_FILES = 256 << 20, 128
"""Captures that are open at a time at most, beyond one, to be coded together on a GPU."""

PROBES = ("queries.*", "query_positions", "attention_mass", "continuation")
"""Tensors of a capture that only measure fidelity."""


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress` did: the codec's name, sizes in bytes, and the parts it had to carry losslessly.

    ``surprise`` is how many bits coefficients took over how many the profile expected of texts like those of its
    calibration, where a codec says so; else None.
    """

    codec: str
    original: int
    size: int
    carried: list[str] = field(default_factory=list)
    surprise: float | None = None


def compress(
    source: Path,
    output: BinaryIO,
    codec: Codec,
    *,
    profile: Profile | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    drop: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
    gpu: Launcher | None = None,
) -> Compressed:
    """Compress the capture ``source`` into ``output`` (written once, in order: may be a pipe).

    Keys and values go through ``codec``; every other tensor, and parts a lossy codec cannot represent (NaN,
    Inf, out of range), are carried losslessly. Tensors whose names match a pattern of ``drop`` are left out,
    and the file says so. ``gpu`` is :func:`kvpack.gpu.runtime.host.find_gpu`'s.

    Raises:
        FormatError: ``source`` is not a sound safetensors file, or has no keys and values to be lossy about.
        UsageError: ``chunk_tokens`` is not a positive multiple of 128, or the codec needs a profile.
        MismatchError: ``profile`` is for another model.
        UnsupportedError: the codec codes all layers as one, and they differ in shape.

    """
    capture = Capture(TensorFile.open(source))
    one = plan(capture, codec, profile=profile, chunk_tokens=chunk_tokens, drop=drop)
    return next(compress_many([one], threads=threads, gpu=gpu))(output, progress)


def plan(
    capture: Capture,
    codec: Codec,
    *,
    profile: Profile | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    drop: Sequence[str] = (),
) -> Planned:
    """What :func:`compress_many` takes; arguments and errors are those of :func:`compress`."""
    if chunk_tokens < 1 or chunk_tokens % CHUNK_MULTIPLE or chunk_tokens > 1 << 20:
        raise UsageError(f"chunk tokens must be a multiple of {CHUNK_MULTIPLE} up to {1 << 20}")
    kept, dropped = _without(capture.file.header, drop)
    plans = plan_parts(kept, chunk_tokens)
    if not codec.lossless and not any(layer_of(spec) is not None for spec in kept.tensors):
        raise FormatError(f"{capture.file.path}: no layers.N.keys or layers.N.values to compress lossily")
    if codec.profiled:
        if profile is None:
            raise UsageError(f"{codec.name} needs a calibration profile: -D FILE, made by kvpack calibrate")
        profile.require_model(capture.metadata)
    codecs = list({c.name: c for c in (codec, CODECS["lossless"], CODECS["zstd"])}.values())
    known = {spec.name for spec in kept.tensors if spec.name == "tokens"} | {"attention_mass"}
    side = side_of(capture, known) if codec.joint else Side()
    if codec.adaptive:
        side = with_hints(side, capture)
    encoder = _Encoder(capture, codecs, profile if codec.profiled else None, side)
    groups = list(units(plans, codec.stacked))
    header = Header(
        writer=f"kvpack {kvpack.__version__}",
        codecs=[c.to_json() for c in codecs],
        chunk_tokens=chunk_tokens,
        lossless=codec.lossless,
        streams=sorted(set().union(*map(encoder.stream_names, _distinct(groups)))),
        profile=profile.identity() if profile and codec.profiled else None,
        dropped=dropped,
        source=kept.raw.decode(),
    )
    return Planned(capture, codec, profile, kept, header, encoder, groups)


def _distinct(groups: Sequence[tuple[PartPlan, ...]]) -> Iterable[tuple[PartPlan, ...]]:
    """One of each kind of group: most parts that are coded by themselves differ in their layer alone."""

    def kind(group: tuple[PartPlan, ...]) -> object:
        part, spec = group[0], group[0].tensor
        alike = (spec.name.endswith(".keys"), part.layer is None, spec.dtype, spec.shape, part.first)
        return alike if len(group) == 1 else group

    return {kind(group): group for group in groups}.values()


@dataclass(frozen=True)
class Planned:
    """A capture that is to be compressed, by :func:`plan`: open and checked, nothing of it coded."""

    capture: Capture
    codec: Codec
    profile: Profile | None
    kept: SourceHeader
    header: Header
    encoder: _Encoder
    groups: list[tuple[PartPlan, ...]]

    @cached_property
    def ways(self) -> list[str]:
        """How a GPU codes each group."""
        return list(map(self.encoder.way, self.groups))

    def batched(self) -> list[PartPlan]:
        """Parts that a GPU codes in batches with those of other captures, in order."""
        return [group[0] for group, way in zip(self.groups, self.ways, strict=True) if way == "part"]

    def write(
        self,
        output: BinaryIO,
        progress: Progress | None,
        threads: int | None,
        gpu: Launcher | None,
        parts: Iterator[tuple[int, Streams]],
    ) -> Compressed:
        """Code and write everything; ``parts`` are digests and streams of what is :meth:`batched`."""
        writer = ContainerWriter(output, self.header)
        carried: list[str] = []
        coded = 0
        done, total = 0, sum(spec.nbytes for spec in self.kept.tensors)
        if gpu is None:
            every = ordered_map(self.encoder, self.groups, threads)
        else:
            every = self.encoder.run(self.groups, self.ways, threads, gpu, parts)
        for group, encoded in zip(self.groups, every, strict=True):
            for plan, part in zip(group, encoded, strict=True):
                writer.add(part.codec, part.digest, part.streams)
                if part.fallback:
                    carried.append(plan.name)
                coded += sum(8 * len(data) for name, data, _ in part.streams if name == "coefficients")
                done += part.nbytes
            if progress:
                progress(done, total)
        surprise, quantizer = None, self.codec.keys.quantizer
        if self.profile is not None and isinstance(quantizer, DeadZone) and not carried:
            tokens = max(spec.shape[1] for spec in self.kept.tensors if layer_of(spec) is not None)
            surprise = coded / max(quantizer.expected_bits(self.profile) * tokens, 1)
        size = self.capture.file.header.file_size
        return Compressed(self.codec.name, size, writer.finish(), carried, surprise)


Write = Callable[[BinaryIO, Progress | None], Compressed]
"""Writes one file, before the next is asked for."""


def compress_many(
    plans: Iterable[Planned], *, threads: int | None = None, gpu: Launcher | None = None
) -> Iterator[Write]:
    """What writes each planned capture's file, in order: the bytes that :func:`compress` gives.

    With a GPU, parts of one shape of several captures are coded together, so plans are asked for ahead: by no more than
    :data:`WINDOW_BYTES` of captures, and :data:`WINDOW_FILES`. An error in making a plan is raised in its turn.
    """
    if gpu is None:
        for one in plans:
            yield partial(one.write, threads=threads, gpu=None, parts=iter(()))
        return
    from kvpack.gpu import engine as device

    encoder = device.Encoder(gpu)
    for window in _windows(plans):
        batched = [(one.capture, one.batched()) for one in window]
        coded = encoder.encode(part for capture, some in batched for part in device.parts_of(capture, some))
        for one, (_, some) in zip(window, batched, strict=True):
            mine = islice(coded, len(some))
            yield partial(one.write, threads=threads, gpu=gpu, parts=mine)
            deque(mine, maxlen=0)  # of a file that was not written: the next one's parts come after these


def _windows(plans: Iterable[Planned]) -> Iterator[list[Planned]]:
    """Plans that are made before the first of them is coded; what went wrong in making one comes after those before."""
    from kvpack.gpu.engine.staging import in_batches

    wrong: list[Exception] = []

    def sound() -> Iterator[Planned]:
        try:
            yield from plans
        except Exception as error:
            wrong.append(error)

    def joins(window: list[Planned], one: Planned) -> bool:
        size = sum(other.capture.file.header.file_size for other in (*window, one))
        return len(window) < WINDOW_FILES and size <= WINDOW_BYTES

    yield from in_batches(sound(), joins)
    if wrong:
        raise wrong[0]


def _without(header: SourceHeader, patterns: Sequence[str]) -> tuple[SourceHeader, list[str]]:
    gone = [s.name for s in header.tensors if any(fnmatchcase(s.name, pattern) for pattern in patterns)]
    if not gone:
        return header, []
    kept = [(s.name, s.dtype, s.shape) for s in header.tensors if s.name not in set(gone)]
    return build_header(kept, header.metadata), gone


def _codec_for(plan: PartPlan, codecs: Sequence[Codec]) -> int:
    """The codec asked for where it applies, else the lossless one that carries such a tensor."""
    names = [codec.name for codec in codecs]
    if plan.tensor.dtype not in FLOAT_DTYPES:
        return names.index("zstd")
    return 0 if plan.layer is not None or codecs[0].lossless else names.index("lossless")


Streams = list[tuple[str, bytes, int]]
"""Names, bytes and checksums."""


@dataclass(frozen=True)
class _EncodedPart:
    codec: int
    digest: int
    streams: Streams
    nbytes: int
    fallback: bool


@dataclass(frozen=True)
class _Encoder:
    """Encodes parts that are coded at once, for the thread pool."""

    capture: Capture
    codecs: list[Codec]
    profile: Profile | None
    side: Side

    def _chosen(self, plans: tuple[PartPlan, ...]) -> int:
        return _codec_for(plans[0], self.codecs)

    def _fallback(self, plans: tuple[PartPlan, ...]) -> int:
        """The codec for what the chosen one cannot represent."""
        chosen = self._chosen(plans)
        return chosen if self.codecs[chosen].lossless else [codec.name for codec in self.codecs].index("lossless")

    def _units(self, plans: tuple[PartPlan, ...], codec: int) -> list[Unit]:
        groups = units(plans, self.codecs[codec].stacked)
        return [Unit(group, self.codecs[codec], self.profile, self.side) for group in groups]

    def stream_names(self, plans: tuple[PartPlan, ...]) -> set[str]:
        every = (*self._units(plans, self._chosen(plans)), *self._units(plans, self._fallback(plans)))
        return set().union(*(unit.stream_names() for unit in every))

    def __call__(self, plans: tuple[PartPlan, ...]) -> list[_EncodedPart]:
        bits = [self.capture.read_part(plan) for plan in plans]
        chosen = used = self._chosen(plans)
        try:
            streams = self._encode(used, bits, plans)
        except UnrepresentableError:
            used = self._fallback(plans)
            streams = self._encode(used, bits, plans)
        return [
            _EncodedPart(
                used,
                checksum(one),
                [(name, data, checksum(data)) for name, data in mine],
                one.nbytes,
                used != chosen,
            )
            for one, mine in zip(bits, streams, strict=True)
        ]

    def way(self, group: tuple[PartPlan, ...]) -> str:
        """How a GPU codes a group: a ``part`` beside others of its shape, ``planes``, a ``chunk``; or not at all."""
        from kvpack.gpu import engine as device

        codec = self.codecs[self._chosen(group)]
        if len(group) == 1 and device.takes(group[0], chain_of(codec, group[0].tensor.name)):
            return "part"
        if len(group) == 1 and device.takes_planes(group[0], codec):
            return "planes"
        return "chunk" if device.takes_chunk(group, codec, self.profile, self.side) else ""

    def run(
        self,
        groups: Sequence[tuple[PartPlan, ...]],
        ways: Sequence[str],
        threads: int | None,
        gpu: Launcher,
        parts: Iterator[tuple[int, Streams]],
    ) -> Iterator[list[_EncodedPart]]:
        """All groups in order, each in its way; ``parts`` gives those that are coded in batches."""
        from kvpack.gpu import engine as device

        planes, chunks = None, None
        for way, run in groupby(zip(ways, groups, strict=True), key=itemgetter(0)):
            some = [group for _, group in run]
            if way == "part":
                encoded: Iterator[list[tuple[int, Streams]] | None] = ([one] for one in islice(parts, len(some)))
            elif way == "planes":
                planes = planes or device.PlaneEncoder(gpu, self.capture, self.codecs[self._chosen(some[0])])
                encoded = (one and [one] for one in planes.encode(p for (p,) in some))
            elif way == "chunk":
                codec = self.codecs[self._chosen(some[0])]
                chunks = chunks or device.ChunkEncoder(gpu, self.capture, codec, self.profile, self.side)
                encoded = chunks.encode(some)
            else:
                yield from ordered_map(self, some, threads) if len(some) > 1 else map(self, some)  # no pool for one
                continue
            for group, coded in zip(some, encoded, strict=True):
                yield self._coded(group, coded) if coded else self(group)

    def _coded(self, group: tuple[PartPlan, ...], coded: list[tuple[int, Streams]]) -> list[_EncodedPart]:
        return [
            _EncodedPart(self._chosen(group), digest, streams, plan.tensor.itemsize * prod(plan.shape), False)
            for plan, (digest, streams) in zip(group, coded, strict=True)
        ]

    def _encode(self, codec: int, bits: list[Bits], plans: tuple[PartPlan, ...]) -> list[list[tuple[str, bytes]]]:
        given = dict(zip(plans, bits, strict=True))
        return [
            streams
            for unit in self._units(plans, codec)
            for streams in unit.encode([given[plan] for plan in unit.plans])
        ]


def differing_parts(archive: Archive, capture: Capture) -> Iterator[str]:
    """Names of parts whose digests say that ``capture`` is not what ``archive`` was made from."""
    for part in archive.parts:
        spec = capture.tensors.get(part.plan.tensor.name)
        same = spec is not None and (spec.dtype, spec.shape) == (part.plan.tensor.dtype, part.plan.tensor.shape)
        if not same or checksum(capture.read_part(part.plan)) != part.digest:
            yield part.plan.name

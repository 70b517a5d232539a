"""What kvpack does, for programs: compress, decompress, test. The command line is a thin layer over this."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import kvpack
from kvpack.archive import Archive, Capture, as_bytes, side_of
from kvpack.checksum import checksum
from kvpack.codecs import CODECS, Codec
from kvpack.container import ContainerWriter, layer_of, plan_parts
from kvpack.container.header import Header
from kvpack.container.layout import FLOAT_DTYPES, PartPlan
from kvpack.errors import FormatError, UsageError
from kvpack.floats import Bits
from kvpack.hints import with_hints
from kvpack.parallel import ordered_map
from kvpack.pipeline import chain_of
from kvpack.profile import Profile
from kvpack.stages.base import Side, UnrepresentableError
from kvpack.stages.quantizers.dead_zone import DeadZone
from kvpack.tensorfile import Header as SourceHeader
from kvpack.tensorfile import TensorFile, TensorSpec, build_header
from kvpack.units import Unit, units

if TYPE_CHECKING:
    from kvpack.stages.device.launch import Launcher

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

CHUNK_TOKENS = 2048
CHUNK_MULTIPLE = 128
"""Chunks begin at multiples of this many tokens, so that groups of tokens never straddle two."""

PROBES = ("queries.*", "query_positions", "attention_mass", "continuation")
"""Tensors of a capture that only measure fidelity."""


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress` did: sizes in bytes, and the parts it had to carry losslessly.

    ``surprise`` is how many bits coefficients took over how many the profile expects of texts like those of its
    calibration, where a codec says so; else None.
    """

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
    and the file says so.

    Raises:
        FormatError: ``source`` is not a sound safetensors file, or has no keys and values to be lossy about.
        UsageError: ``chunk_tokens`` is not a positive multiple of 128, or the codec needs a profile.
        MismatchError: ``profile`` is for another model.
        UnsupportedError: the codec codes all layers as one, and they differ in shape.

    """
    if chunk_tokens < 1 or chunk_tokens % CHUNK_MULTIPLE or chunk_tokens > 1 << 20:
        raise UsageError(f"chunk tokens must be a multiple of {CHUNK_MULTIPLE} up to {1 << 20}")
    capture = Capture(TensorFile.open(source))
    return compress_capture(
        capture,
        output,
        codec,
        profile=profile,
        chunk_tokens=chunk_tokens,
        drop=drop,
        threads=threads,
        progress=progress,
        gpu=gpu,
    )


def compress_capture(
    capture: Capture,
    output: BinaryIO,
    codec: Codec,
    *,
    profile: Profile | None,
    chunk_tokens: int,
    drop: Sequence[str],
    threads: int | None,
    progress: Progress | None,
    gpu: Launcher | None = None,
) -> Compressed:
    """:func:`compress` for an open capture; ``gpu`` is :func:`kvpack.stages.device.host.find_gpu`'s."""
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
        streams=sorted(set().union(*map(encoder.stream_names, groups))),
        profile=profile.identity() if profile and codec.profiled else None,
        dropped=dropped,
        source=kept.raw.decode(),
    )
    writer = ContainerWriter(output, header)
    carried: list[str] = []
    coded = 0
    done, total = 0, sum(spec.nbytes for spec in kept.tensors)
    for group, encoded in zip(groups, encoder.run(groups, threads, gpu), strict=True):
        for plan, part in zip(group, encoded, strict=True):
            writer.add(part.codec, part.digest, part.streams)
            if part.fallback:
                carried.append(plan.name)
            coded += sum(8 * len(data) for name, data, _ in part.streams if name == "coefficients")
            done += part.nbytes
        if progress:
            progress(done, total)
    surprise = None
    if profile is not None and isinstance(codec.keys.quantizer, DeadZone) and not carried:
        tokens = max(spec.shape[1] for spec in kept.tensors if layer_of(spec) is not None)
        surprise = coded / max(codec.keys.quantizer.expected_bits(profile) * tokens, 1)
    return Compressed(capture.file.header.file_size, writer.finish(), carried, surprise)


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

    def run(
        self, groups: list[tuple[PartPlan, ...]], threads: int | None, gpu: Launcher | None
    ) -> Iterator[list[_EncodedPart]]:
        """All groups in order, each on the GPU if it takes it."""
        if gpu is None:
            yield from ordered_map(self, groups, threads)
            return
        from kvpack import device

        def ours(group: tuple[PartPlan, ...]) -> str:
            codec = self.codecs[self._chosen(group)]
            if len(group) == 1 and device.takes(group[0], chain_of(codec, group[0].tensor.name)):
                return "part"
            if len(group) == 1 and device.takes_planes(group[0], codec):
                return "planes"
            return "chunk" if device.takes_chunk(group, codec, self.profile, self.side) else ""

        parts, planes, chunks = device.Encoder(gpu, self.capture), None, None
        for kind, run in groupby(groups, key=ours):
            some = list(run)
            if kind == "part":
                encoded: Iterator[list[tuple[int, Streams]] | None] = (
                    [one] for one in parts.encode(p for (p,) in some)
                )
            elif kind == "planes":
                planes = planes or device.PlaneEncoder(gpu, self.capture, self.codecs[self._chosen(some[0])])
                encoded = (one and [one] for one in planes.encode(p for (p,) in some))
            elif kind == "chunk":
                codec = self.codecs[self._chosen(some[0])]
                chunks = chunks or device.ChunkEncoder(gpu, self.capture, codec, self.profile, self.side)
                encoded = chunks.encode(some)
            else:
                yield from ordered_map(self, some, threads)
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


@dataclass(frozen=True)
class Selection:
    """Which part of a cache to decompress: layers by index, tokens ``[start, stop)``; None means all."""

    layers: frozenset[int] | None = None
    tokens: tuple[int, int] | None = None

    @property
    def partial(self) -> bool:
        """Whether anything is left out."""
        return self.layers is not None or self.tokens is not None


def decompress(
    archive: Archive,
    output: BinaryIO,
    selection: Selection | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    gpu: Launcher | None = None,
) -> list[str]:
    """Write the capture that ``archive`` holds to ``output`` (in order: may be a pipe).

    Without a selection, a losslessly compressed file comes back byte for byte. With one, the chosen layers'
    keys and values and the ``tokens`` tensor are written, cut to the range; returns the names left out.

    Raises:
        UsageError: a selection outside the cache.
        CorruptError: the file is damaged.

    """
    if selection is None or not selection.partial:
        chosen: dict[str, slice | None] = dict.fromkeys(archive.tensors)
        header, left_out = archive.container.source, []
    else:
        chosen = _select(archive.tensors, selection)
        header = _cut_header(archive, chosen)
        left_out = [name for name in archive.tensors if name not in chosen]
    output.write(len(header.raw).to_bytes(8, "little") + header.raw)
    total = sum(spec.nbytes for spec in header.tensors)
    done = 0
    names = [spec.name for spec in header.tensors]
    if gpu is None or left_out or any(cut is not None for cut in chosen.values()):
        read = ordered_map(lambda name: archive.read(name, chosen[name]), names, threads)
    else:
        from kvpack import device

        read = (bits for _, bits in device.read(gpu, archive, names))
    for bits in read:
        output.write(as_bytes(bits))
        done += bits.nbytes
        if progress:
            progress(done, total)
    return left_out


def _select(tensors: Mapping[str, TensorSpec], selection: Selection) -> dict[str, slice | None]:
    layers = {name: layer for name, spec in tensors.items() if (layer := layer_of(spec)) is not None}
    if not layers:
        raise UsageError("this file has no layers to select from")
    wanted = selection.layers if selection.layers is not None else frozenset(layers.values())
    missing = sorted(wanted - set(layers.values()))
    if missing:
        raise UsageError(f"no layer {missing[0]}: the file has layers 0 to {max(layers.values())}")
    cut = slice(*selection.tokens) if selection.tokens else None
    chosen: dict[str, slice | None] = {name: cut for name, layer in layers.items() if layer in wanted}
    longest = min(tensors[name].shape[1] for name in chosen)
    if selection.tokens and not 0 <= selection.tokens[0] < selection.tokens[1] <= longest:
        raise UsageError(f"tokens {selection.tokens[0]}:{selection.tokens[1]} are not within 0:{longest}")
    if "tokens" in tensors and len(tensors["tokens"].shape) == 1:
        chosen["tokens"] = cut
    return chosen


def _cut_header(archive: Archive, chosen: Mapping[str, slice | None]) -> SourceHeader:
    entries = []
    for name, cut in chosen.items():
        spec = archive.tensors[name]
        shape = list(spec.shape)
        if cut is not None:
            axis = 0 if name == "tokens" else 1
            start, stop, _ = cut.indices(shape[axis])
            shape[axis] = stop - start
        entries.append((name, spec.dtype, shape))
    return build_header(entries, archive.metadata)


def check(archive: Archive, *, threads: int | None = None, progress: Progress | None = None) -> None:
    """Decode everything and keep nothing: checksums, coding, and the digests of what is lossless.

    Raises:
        CorruptError: the file is damaged.

    """
    done, total = 0, sum(spec.nbytes for spec in archive.tensors.values())
    for size in ordered_map(lambda part: archive.read_part(part).nbytes, archive.parts, threads):
        done += size
        if progress:
            progress(done, total)


def differing_parts(archive: Archive, capture: Capture) -> Iterator[str]:
    """Names of parts whose digests say that ``capture`` is not what ``archive`` was made from."""
    for part in archive.parts:
        spec = capture.tensors.get(part.plan.tensor.name)
        same = spec is not None and (spec.dtype, spec.shape) == (part.plan.tensor.dtype, part.plan.tensor.shape)
        if not same or checksum(capture.read_part(part.plan)) != part.digest:
            yield part.plan.name

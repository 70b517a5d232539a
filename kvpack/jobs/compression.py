"""Compresses captures into ``.kvp`` files: prepares jobs, has an engine encode their blocks, writes their frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

from kvpack.cache import CacheSpec, WindowSpec, windows
from kvpack.codecs.context import DecodeContext, Hints
from kvpack.codecs.protocol import Codec, Need
from kvpack.codecs.recipes import CODECS
from kvpack.engine import CpuEngine, EncodeTask, Engine, InTurn, Progress, Ticket
from kvpack.errors import FormatError, UsageError
from kvpack.formats.captures import FLOAT_DTYPES, cache_spec, layer_of
from kvpack.formats.records import token_ids
from kvpack.formats.safetensors import Header as SourceHeader
from kvpack.formats.safetensors import build_header
from kvpack.formats.source import Capture
from kvpack.jobs.hints import encoder_hints
from kvpack.kvp import ContainerWriter
from kvpack.kvp.header import Header
from kvpack.profiles import Profile
from kvpack.version import __version__

CHUNK_TOKENS = 2048
CHUNK_MULTIPLE = 128
"""Windows begin at multiples of this many tokens, so that groups of tokens never straddle two."""

PROBES = ("queries.*", "query_positions", "attention_mass", "continuation")
"""Tensors of a capture that only measure fidelity."""


@dataclass(frozen=True)
class Compressed:
    """What was written: the codec's name, sizes in bytes, and the parts that had to be carried losslessly.

    ``surprise`` is how many bits coefficients took over how many the profile expected of texts like those of its
    calibration, where the codec can say so; else None.
    """

    codec: str
    original: int
    size: int
    carried: list[str] = field(default_factory=list)
    surprise: float | None = None


def compress(
    source: Capture | Path,
    output: BinaryIO,
    codec: Codec,
    *,
    profile: Profile | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    drop: Sequence[str] = (),
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Compress the capture ``source``, open or a path, into ``output``, which is written in order: it may be a pipe.

    Keys and values go through ``codec``. Every other tensor, and parts that a lossy codec cannot represent (NaN, Inf,
    out of range), are carried losslessly. Tensors whose names match a pattern of ``drop`` are left out, and the file
    says so. Without an ``engine`` all processors are used.

    Raises:
        FormatError: ``source`` has no keys and values to be lossy about.
        UsageError: ``chunk_tokens`` is not a positive multiple of 128, or the codec needs a profile.
        MismatchError: ``profile`` is for another model.
        UnsupportedError: the codec codes all layers as one, and they differ in shape.

    """
    capture = source if isinstance(source, Capture) else Capture.open(source)
    job = prepare(capture, codec, profile=profile, chunk_tokens=chunk_tokens, drop=drop)
    return next(compress_many([job], engine))(output, progress)


def prepare(
    source: Capture,
    codec: Codec,
    *,
    profile: Profile | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    drop: Sequence[str] = (),
) -> CompressJob:
    """Check everything that can be checked before work begins; arguments and errors are those of :func:`compress`."""
    if chunk_tokens < 1 or chunk_tokens % CHUNK_MULTIPLE or chunk_tokens > 1 << 20:
        raise UsageError(f"chunk tokens must be a multiple of {CHUNK_MULTIPLE} up to {1 << 20}")
    kept, dropped = _without(source.file.header, drop)
    cache = cache_spec(kept)
    if not codec.lossless and not any(layer_of(entry) is not None for entry in kept.tensors):
        raise FormatError(f"{source.file.name}: no layers.N.keys or layers.N.values to compress lossily")
    needed = None
    if Need.PROFILE in codec.traits.needs:
        if profile is None:
            raise UsageError(f"{codec.name} needs a calibration profile: -D FILE, made by kvpack calibrate")
        profile.require_model(source.metadata)
        needed = profile
    tokens = None
    if Need.TOKENS in codec.traits.needs and any(entry.name == "tokens" for entry in kept.tensors):
        tokens = token_ids(source)
    job = CompressJob(source, cache, codec, needed, chunk_tokens, DecodeContext(needed, tokens), kept, dropped)
    job.header  # noqa: B018 - whether the blocks can be coded is known now
    return job


@dataclass(frozen=True, eq=False)
class CompressJob:
    """One file to be written, by :func:`prepare`: the source is open and checked, and nothing of it encoded."""

    source: Capture
    cache: CacheSpec
    codec: Codec
    profile: Profile | None
    chunk_tokens: int
    context: DecodeContext
    kept: SourceHeader
    dropped: list[str]

    @cached_property
    def codecs(self) -> list[Codec]:
        """The codecs of the file: the one asked for, then those that carry what it does not take."""
        return list({codec.name: codec for codec in (self.codec, CODECS["lossless"], CODECS["zstd"])}.values())

    @cached_property
    def blocks(self) -> list[list[tuple[WindowSpec, tuple[int, ...]]]]:
        """By window its blocks in order, each with the numbers of the codecs to try."""
        return [list(self._split(window)) for window in windows(self.cache, self.chunk_tokens)]

    def _split(self, window: WindowSpec) -> Iterator[tuple[WindowSpec, tuple[int, ...]]]:
        if window.layered:
            choices = self._choices(0)
            yield from ((window.take(block), choices) for block in self.codec.blocks(window))
            return
        for i, part in enumerate(window.parts):
            yield window.take(slice(i, i + 1)), self._choices(self._carrier(part.tensor.dtype))

    def _choices(self, number: int) -> tuple[int, ...]:
        names = [codec.name for codec in self.codecs]
        return (number,) if self.codecs[number].lossless else (number, names.index("lossless"))

    def _carrier(self, dtype: str) -> int:
        """The codec for a tensor that is neither keys nor values."""
        names = [codec.name for codec in self.codecs]
        if dtype not in FLOAT_DTYPES:
            return names.index("zstd")
        return 0 if self.codec.lossless else names.index("lossless")

    @cached_property
    def header(self) -> Header:
        """What the file says before its streams."""
        names: set[str] = set()
        for block, choices in self._distinct():
            for number in choices:
                names |= self.codecs[number].stream_names(block, self.context)
        return Header(
            writer=f"kvpack {__version__}",
            codecs=[codec.to_json() for codec in self.codecs],
            chunk_tokens=self.chunk_tokens,
            lossless=self.codec.lossless,
            streams=sorted(names),
            profile=self.profile.identity() if self.profile else None,
            dropped=self.dropped,
            source=self.kept.raw.decode(),
        )

    def _distinct(self) -> Iterable[tuple[WindowSpec, tuple[int, ...]]]:
        """One block of each kind: most parts that are coded by themselves differ in their layer alone."""

        def kind(block: WindowSpec) -> object:
            part = block.parts[0]
            tensor, ranges = part.tensor, (part.shape, part.first, part.length)
            alike = (tensor.role, tensor.layer is None, tensor.dtype, tensor.name.endswith(".keys"), *ranges)
            return alike if len(block.parts) == 1 else block

        return {kind(block): (block, choices) for window in self.blocks for block, choices in window}.values()

    def tasks(self, number: int) -> Iterator[EncodeTask]:
        """The file's work in order, as job ``number``; the first of it waits for the encoder's hints."""
        hints = encoder_hints(self.source, self.codec)
        for w, blocks in enumerate(self.blocks):
            for b, (block, choices) in enumerate(blocks):
                codecs = tuple((choice, self.codecs[choice]) for choice in choices)
                layered = block.layered
                context, own = (self.context, hints) if layered else (DecodeContext(), Hints())
                yield EncodeTask(Ticket(number, w, b), self.source.window(block), codecs, context, own)

    def write(self, results: InTurn, number: int, output: BinaryIO, progress: Progress | None = None) -> Compressed:
        """Write the file from the results of :meth:`tasks`."""
        writer = ContainerWriter(output, self.header)
        carried: list[str] = []
        sizes: Counter[str] = Counter()
        done = 0
        total = sum(entry.nbytes for entry in self.kept.tensors)
        for w, blocks in enumerate(self.blocks):
            for b, (block, choices) in enumerate(blocks):
                parts = results.take(Ticket(number, w, b)).parts
                for spec, part in zip(block.parts, parts, strict=True):
                    writer.add(part)
                    if part.codec != choices[0]:
                        carried.append(spec.label)
                    sizes.update({stream.name: len(stream.data) for stream in part.streams})
                done += block.nbytes
                if progress:
                    progress(done, total)
        surprise = None if carried else self._surprise(sizes)
        return Compressed(self.codec.name, self.source.file.header.file_size, writer.finish(), carried, surprise)

    def _surprise(self, sizes: Mapping[str, int]) -> float | None:
        expected = self.codec.expected_bits(self.context, self.cache.rows)
        return 8 * sizes[expected[0]] / max(expected[1], 1) if expected else None


Write = Callable[[BinaryIO, Progress | None], Compressed]
"""Writes one file, before the next is asked for."""


def compress_many(jobs: Iterable[CompressJob], engine: Engine | None = None) -> Iterator[Write]:
    """What writes each job's file, in order: the bytes that :func:`compress` gives.

    Blocks of several jobs are in work together, so jobs are asked for ahead, as far as the engine asks for tasks. An
    error in making a job is raised after the files before it were given.
    """
    feed = _Feed(jobs)
    results = InTurn((engine or CpuEngine()).run(feed.tasks()))
    number = 0
    while (job := feed.job(number, results)) is not None:
        yield partial(job.write, results, number)
        results.drop(number)  # of a file that was not written
        number += 1


class _Feed:
    """Makes jobs as an engine asks for their tasks."""

    def __init__(self, jobs: Iterable[CompressJob]) -> None:
        self._jobs = iter(jobs)
        self._made: dict[int, CompressJob] = {}
        self._error: Exception | None = None

    def tasks(self) -> Iterator[EncodeTask]:
        number = 0
        while True:
            try:
                job = next(self._jobs, None)
            except Exception as error:
                self._error = error
                return
            if job is None:
                return
            self._made[number] = job
            yield from job.tasks(number)
            number += 1

    def job(self, number: int, results: InTurn) -> CompressJob | None:
        """The job of that number, or None where there are no more; what went wrong in making it is raised."""
        self._made.pop(number - 1, None)
        while number not in self._made and results.pump():
            pass
        if number not in self._made and self._error is not None:
            raise self._error
        return self._made.get(number)


def _without(header: SourceHeader, patterns: Sequence[str]) -> tuple[SourceHeader, list[str]]:
    gone = [s.name for s in header.tensors if any(fnmatchcase(s.name, pattern) for pattern in patterns)]
    if not gone:
        return header, []
    kept = [(s.name, s.dtype, s.declared_shape) for s in header.tensors if s.name not in set(gone)]
    return build_header(kept, header.metadata), gone

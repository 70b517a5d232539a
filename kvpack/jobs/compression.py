"""Compress captures into ``.kvp`` files: prepare jobs, let an engine encode their blocks, and write the frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from kvpack import __version__
from kvpack.cache import CacheSpec, PartSpec, WindowSpec, windows
from kvpack.codecs.context import DecodeContext, Hints
from kvpack.codecs.model import LanguageModel
from kvpack.codecs.protocol import Codec, Need
from kvpack.codecs.recipes import CODECS
from kvpack.codecs.replay import ReplayCodec
from kvpack.engine import CpuEngine, EncodeTask, Engine, InTurn, Progress, Ticket
from kvpack.errors import FormatError, KvpackError, UsageError, naming
from kvpack.formats.captures import cache_spec, layer_of
from kvpack.formats.records import preceded, token_ids
from kvpack.formats.safetensors import Header as SourceHeader
from kvpack.formats.safetensors import build_header
from kvpack.formats.source import Capture
from kvpack.jobs import replay
from kvpack.jobs.hints import encoder_hints
from kvpack.kvp import ContainerWriter
from kvpack.kvp.header import Header
from kvpack.profiles import Profile, profile_for

CHUNK_TOKENS = 2048
CHUNK_MULTIPLE = 128
"""Every window begins at a multiple of this many tokens, so that no group of tokens lies in two windows."""

PROBES = ("queries.*", "query_positions", "attention_mass", "continuation")
"""These tensors of a capture are used only to measure fidelity."""


def left_out(codec: Codec, drop: Sequence[str], keep_probes: bool | None) -> list[str]:
    """Return the patterns of the tensors that a file leaves out: ``drop``, and :data:`PROBES` unless they are kept.

    With ``keep_probes`` None, lossless files keep them, so that they come back byte for byte, and lossy files do not:
    the original is what a lossy file is measured with, and probes would take more bytes in it than the cache.
    """
    kept = codec.lossless if keep_probes is None else keep_probes
    return [*drop, *(() if kept else PROBES)]


@dataclass(frozen=True)
class Compressed:
    """The result of a compression.

    It holds the codec's name, the sizes in bytes, the bytes of each kind of stream, and the parts that had to be stored
    losslessly. ``original`` is the size of the capture that the file gives back, without the tensors that were left out
    (``dropped``, of ``dropped_bytes`` in all). ``surprise`` is the number of bits that the coefficients took, divided
    by the number that the profile expects for texts like those of its calibration. It is None if the codec cannot
    compute it.
    """

    codec: str
    original: int
    size: int
    streams: Mapping[str, int] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    surprise: float | None = None
    dropped: list[str] = field(default_factory=list)
    dropped_bytes: int = 0


def compress(
    source: Capture | Path,
    output: BinaryIO,
    codec: Codec,
    *,
    profile: Profile | None = None,
    model: LanguageModel | None = None,
    chunk_tokens: int | None = None,
    drop: Sequence[str] = (),
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Compress the capture ``source`` into ``output``.

    ``source`` is an open capture or a path. ``output`` is written strictly in order, so it may be a pipe. ``codec``
    compresses keys and values. Every other tensor is stored losslessly, and so is each part that a lossy codec cannot
    represent (because it has NaN, Inf, or values out of range). Tensors whose names match a pattern in ``drop`` are
    left out, and the file records this. Without an ``engine``, all processors are used. Codecs that run the model are
    given it as ``model``. Without ``chunk_tokens``, a chunk has :data:`CHUNK_TOKENS` tokens, or all tokens if the codec
    runs the model, because then a range of tokens is not read faster than all of them.

    Raises:
        FormatError: The codec is lossy, but ``source`` has no keys and values.
        UsageError: ``chunk_tokens`` is not a positive multiple of 128, or the codec needs a profile or a model.
        MismatchError: ``profile`` or ``model`` is another model's, or the model cannot compute the cache again.
        UnsupportedError: The codec codes all layers as one array, but the layers differ in shape.

    """
    capture = source if isinstance(source, Capture) else Capture.open(source)
    job = prepare(capture, codec, profile=profile, model=model, chunk_tokens=chunk_tokens, drop=drop)
    return next(compress_many([job], engine))(output, progress)


def prepare(
    source: Capture,
    codec: Codec,
    *,
    profile: Profile | None = None,
    model: LanguageModel | None = None,
    chunk_tokens: int | None = None,
    drop: Sequence[str] = (),
    origin: int | None = None,
    before: NDArray[np.int32] | None = None,
) -> CompressJob:
    """Check all that can be checked before the work begins. Arguments and errors are those of :func:`compress`.

    With ``origin`` the source is a part of a text: its first row has that position, and more rows may follow. Its
    codec must not depend on what follows (:attr:`kvpack.codecs.protocol.Traits.prefix_stable`). ``before`` ``[origin]``
    int32 are then the token ids of the text before it.

    If the codec runs the model, it is run here.
    """
    replayed = Need.MODEL in codec.traits.needs
    if origin is not None and (replayed or not codec.traits.prefix_stable):
        raise UsageError(f"{codec.name} codes tokens by what follows them: it cannot code a part of a text")
    chunk_tokens = chunk_of(source, codec, chunk_tokens)
    kept, dropped = without(source.file.header, drop)
    cache = cache_spec(kept, origin)
    if not codec.lossless and not any(layer_of(entry) is not None for entry in kept.tensors):
        raise FormatError(f"{source.file.name}: no layers.N.keys or layers.N.values to compress lossily")
    needed = None
    if Need.PROFILE in codec.traits.needs:
        needed = profile if profile is not None else profile_for(source.metadata, codec.name, kept.tensors)
        if needed is None:
            raise UsageError(
                f"{codec.name} needs a calibration profile, and none is installed for this model: -D FILE, made by "
                "kvpack calibrate"
            )
        needed.require_model(source.metadata)
    tokens = None
    if Need.TOKENS in codec.traits.needs and any(entry.name == "tokens" for entry in kept.tensors):
        tokens = preceded(token_ids(source), before)
    context = DecodeContext(needed, tokens)
    if replayed:
        if model is None:
            raise UsageError(f"{codec.name} runs the model that made the cache: give it with --model")
        with naming(source.file.name):
            codec, context = _replayed(source, cache, codec, tokens, model)
    job = CompressJob(source, cache, codec, needed, chunk_tokens, context, kept, dropped)
    job.header  # noqa: B018 - computing the header checks that the blocks can be coded
    return job


def chunk_of(source: Capture, codec: Codec, asked: int | None) -> int:
    """Return the number of tokens in a chunk: what was asked for, or what the codec takes by default.

    Raises:
        UsageError: What was asked for is not a positive multiple of 128, or more than 2^20.

    """
    if asked is None:
        rows = -(-source.spec.rows // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
        replayed = Need.MODEL in codec.traits.needs
        return min(max(rows, CHUNK_MULTIPLE), 1 << 20) if replayed else CHUNK_TOKENS
    if asked < 1 or asked % CHUNK_MULTIPLE or asked > 1 << 20:
        raise UsageError(f"--chunk-tokens is a multiple of {CHUNK_MULTIPLE} up to {1 << 20}, not {asked}")
    return asked


def _replayed(
    source: Capture, cache: CacheSpec, codec: Codec, tokens: NDArray[np.int32] | None, model: LanguageModel
) -> tuple[Codec, DecodeContext]:
    """Let the model compute the cache again, and return the codec and the context with what it computes."""
    found, sample = replay.run(cache, source.metadata, tokens, model)
    replay.require_same_text(source, found)
    assert isinstance(codec, ReplayCodec)
    return codec.with_sample(sample), DecodeContext(tokens=tokens, model=model, replay=found)


@dataclass(frozen=True, eq=False)
class CompressJob:
    """One file that is to be written. :func:`prepare` has opened and checked its source, and nothing is encoded yet."""

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
        """Return the file's codecs: first the requested one, then those that store what it cannot take."""
        return list({codec.name: codec for codec in (self.codec, CODECS["lossless"], CODECS["zstd"])}.values())

    @cached_property
    def blocks(self) -> list[list[tuple[WindowSpec, tuple[int, ...]]]]:
        """Return the blocks of each window in order, each with the numbers of the codecs to try."""
        return [list(self._split(window)) for window in windows(self.cache, self.chunk_tokens)]

    def _split(self, window: WindowSpec) -> Iterator[tuple[WindowSpec, tuple[int, ...]]]:
        if window.layered:
            choices = self._choices(0)
            yield from ((window.take(block), choices) for block in self.codec.blocks(window))
            return
        for i, part in enumerate(window.parts):
            yield window.take(slice(i, i + 1)), self._choices(self._carrier(part))

    def _choices(self, number: int) -> tuple[int, ...]:
        names = [codec.name for codec in self.codecs]
        return (number,) if self.codecs[number].lossless else (number, names.index("lossless"))

    def _carrier(self, part: PartSpec) -> int:
        """Return the number of the codec for a tensor that is neither keys nor values: the first that restores it."""
        every = enumerate(self.codecs)
        return next(number for number, codec in every if codec.takes(part.tensor) and codec.exact(part))

    @cached_property
    def header(self) -> Header:
        """Return the file's header, which is written before its streams."""
        names: set[str] = set()
        for block, choices in self._distinct():
            for number in choices:
                names |= self.codecs[number].stream_names(block, self.context)
        return Header.of(
            self.kept,
            compact_source=Need.MODEL in self.codec.traits.needs,
            writer=f"kvpack {__version__}",
            codecs=[codec.to_json() for codec in self.codecs],
            chunk_tokens=self.chunk_tokens,
            lossless=self.codec.lossless,
            streams=sorted(names),
            profile=self.profile.identity() if self.profile else None,
            dropped=self.dropped,
            origin=self.cache.origin,
        )

    def _distinct(self) -> Iterable[tuple[WindowSpec, tuple[int, ...]]]:
        """Return one block of each kind: most parts that are coded separately differ only in their layer."""

        def kind(block: WindowSpec) -> object:
            part = block.parts[0]
            tensor, ranges = part.tensor, (part.shape, part.first, part.length)
            alike = (tensor.role, tensor.layer is None, tensor.dtype, tensor.name.endswith(".keys"), *ranges)
            return alike if len(block.parts) == 1 else block

        return {kind(block): (block, choices) for window in self.blocks for block, choices in window}.values()

    def tasks(self, number: int) -> Iterator[EncodeTask]:
        """Yield the file's tasks in order, as job ``number``. The encoder's hints are computed before the first."""
        hints = encoder_hints(self.source, self.codec, open_ended=self.cache.origin is not None)
        for w, blocks in enumerate(self.blocks):
            for b, (block, choices) in enumerate(blocks):
                codecs = tuple((choice, self.codecs[choice]) for choice in choices)
                layered = block.layered
                context, own = (self.context, hints) if layered else (DecodeContext(model=self.context.model), Hints())
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
        whole = sum(entry.nbytes for entry in self.source.file.header.tensors)
        return Compressed(
            self.codec.name,
            self.kept.file_size,
            writer.finish(),
            dict(sizes),
            carried,
            surprise,
            self.dropped,
            whole - sum(entry.nbytes for entry in self.kept.tensors),
        )

    def _surprise(self, sizes: Mapping[str, int]) -> float | None:
        expected = self.codec.expected_bits(self.context, self.cache.rows)
        return 8 * sizes[expected[0]] / max(expected[1], 1) if expected else None


Write = Callable[[BinaryIO, Progress | None], Compressed]
"""A function that writes one file. It must be called before the next one is requested."""


def compress_many(jobs: Iterable[CompressJob], engine: Engine | None = None) -> Iterator[Write]:
    """Yield for each job, in order, a function that writes its file: the same bytes as :func:`compress` writes.

    The engine works on blocks of several jobs at once. Jobs are therefore requested ahead of time, as far ahead as the
    engine requests tasks. If making a job fails, the error is raised after the files before it were yielded. If making
    a job's tasks fails, because its source cannot be read any more, the function that writes its file raises the error,
    and the files after it are not affected.
    """
    feed = _Feed(jobs)
    results = InTurn((engine or CpuEngine()).run(feed.tasks()))
    feed.failed = results.fail
    number = 0
    while (job := feed.job(number, results)) is not None:
        yield partial(job.write, results, number)
        results.drop(number)  # in case the caller did not write the file
        number += 1


class _Feed:
    """Makes jobs when an engine requests their tasks."""

    def __init__(self, jobs: Iterable[CompressJob]) -> None:
        self._jobs = iter(jobs)
        self._made: dict[int, CompressJob] = {}
        self._error: Exception | None = None
        self.failed: Callable[[int, Exception], None]

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
            try:
                yield from job.tasks(number)
            except (KvpackError, OSError) as error:
                self.failed(number, error)
            number += 1

    def job(self, number: int, results: InTurn) -> CompressJob | None:
        """Return the job of that number, or None if there are no more. Raise the error if making it failed."""
        self._made.pop(number - 1, None)
        while number not in self._made and results.pump():
            pass
        if number not in self._made and self._error is not None:
            raise self._error
        return self._made.get(number)


def without(header: SourceHeader, patterns: Sequence[str]) -> tuple[SourceHeader, list[str]]:
    """Return a header without the tensors whose names match a pattern, and the names of these."""
    gone = [s.name for s in header.tensors if any(fnmatchcase(s.name, pattern) for pattern in patterns)]
    if not gone:
        return header, []
    without = set(gone)
    kept = [(s.name, s.dtype, s.declared_shape) for s in header.tensors if s.name not in without]
    return build_header(kept, header.metadata), gone

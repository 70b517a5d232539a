"""What ``kvpack compress`` does with its files: open and check them, choose codecs, write, compare, remove."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvpack import jobs
from kvpack.cache.metadata import parse_metadata
from kvpack.cli import batch, common
from kvpack.cli.batch import Item, Outcome
from kvpack.codecs.recipes import codec_named
from kvpack.codecs.replay import ReplayCodec
from kvpack.engine import Engine
from kvpack.errors import KvpackError, UsageError, naming
from kvpack.formats.output import sync_folder
from kvpack.formats.source import Capture
from kvpack.jobs.rate import Goal, choose
from kvpack.jobs.replay import require_identity

if TYPE_CHECKING:
    from kvpack.capture import ReplayModel

DEFAULT = "lossless"
"""The codec if the user names neither a codec nor a goal."""

FAST = "fast"
"""The token coder that needs no model."""


@dataclass(frozen=True)
class Options(batch.FileOptions):
    """How to compress files. The names are those of the command's options."""

    codec: str | None
    quality: str | None
    max_kl: float | None
    max_attn_err: float | None
    ratio: float | None
    token_coder: str
    chunk_tokens: int | None
    drop: list[str]
    keep_probes: bool | None
    lossy_ok: bool


class Compressing:
    """Compresses files, each as the options say."""

    def __init__(self, options: Options) -> None:
        """Check the options, and open the profile.

        Raises:
            UsageError: Options contradict each other.

        """
        self.options = options
        named, self.goal = codec_named(options.codec or DEFAULT), _goal(options)
        if isinstance(named, ReplayCodec):
            named = named.with_token_coder(options.token_coder)
            if options.remove:
                raise UsageError(
                    "--rm is refused with replay: its files need the model and a machine that computes alike"
                )
        elif options.model is not None or options.token_coder != FAST:
            raise UsageError("--model and --token-coder are for the codec replay: -c replay")
        self.exact = self.goal is None and named.lossless
        whole = self.exact and not jobs.left_out(named, options.drop, options.keep_probes)
        if options.remove and not options.lossy_ok and not whole:
            raise UsageError("--rm would delete what the output does not hold: give --lossy-ok too, or keep the input")
        if options.lossy_ok and not options.remove:
            raise UsageError("--lossy-ok goes with --rm")
        self.codec = named
        self.profile = common.open_profile(options.profile)
        self.models = _Models(options) if isinstance(named, ReplayCodec) else None
        self.read = [options.profile, common.model_files(options.model) if self.models else None]

    def outcomes(self, items: Iterable[Item]) -> Iterator[Outcome]:
        """Compress files and yield the outcome of each, in order."""
        items = list(items)
        with ExitStack() as stack:
            run = _Run(self, items, stack)
            yield from run.outcomes()


def _goal(options: Options) -> Goal | None:
    """Return the goal that the user gave instead of a codec, or None."""
    given = (options.quality, options.max_kl, options.max_attn_err, options.ratio)
    if given == (None,) * 4:
        return None
    goal = Goal(*given)
    if options.codec is not None:
        raise UsageError("give a codec (-c) or a goal (--quality, --max-kl, --max-attn-err, --ratio), not both")
    return goal


class _Models:
    """The model for the codec ``replay``, which is loaded for the first file, in the dtype of its cache."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.loaded: ReplayModel | None = None

    def model_for(self, capture: Capture) -> ReplayModel:
        """Return the model for a capture, after checking that it is the right one."""
        known = parse_metadata(capture.metadata)
        with naming(capture.file.name):
            if self.loaded is None or known.dtype not in (None, self.loaded.dtype):
                self.loaded = common.replay_model(capture.metadata, self._options.model, self._options.device)
            else:
                require_identity(known, self.loaded.identity)
        if known.weights_sha256 is None:
            line = f"kvpack: {capture.file.name}: does not say which model made it, so this is not checked"
            common.say(line, quiet=self._options.quiet, to_stderr=True)
        return self.loaded


class _Run:
    """The work on some files, whose blocks one engine codes together.

    The engine asks for files ahead of those that are written. A file that cannot be opened, or is there already, is
    noted then, and its outcome given in its turn.
    """

    def __init__(self, work: Compressing, items: list[Item], stack: ExitStack) -> None:
        self.work, self.options, self.items, self._stack = work, work.options, items, stack
        self._known: dict[int, Outcome] = {}
        self._prepared: list[int] = []

    @cached_property
    def engine(self) -> Engine:
        paths = [item.path for item in self.items]
        return common.engine(
            self.options.device, paths, self.options.threads, self.options.quiet, exact=self.work.exact
        )

    def outcomes(self) -> Iterator[Outcome]:
        following = 0
        for write in jobs.compress_many(self._jobs(), self.engine):
            number = self._prepared.pop(0)
            yield from (self._known.pop(before) for before in range(following, number))
            yield self._written(self.items[number], write)
            following = number + 1
        yield from (self._known.pop(number) for number in range(following, len(self.items)))

    def _jobs(self) -> Iterator[jobs.CompressJob]:
        for number, item in enumerate(self.items):
            try:
                job = self._prepare(item)
            except Exception as error:
                self._known[number] = Outcome.failed(item, error)
                continue
            if isinstance(job, Outcome):
                self._known[number] = job
                continue
            self._prepared.append(number)
            yield job

    def _prepare(self, item: Item) -> jobs.CompressJob | Outcome:
        """Open and check an input, without writing anything. Return its outcome if there is nothing to do."""
        if item.problem is not None:
            raise item.problem
        target, options = item.target, self.options
        assert target is not None
        there = batch.prepare_output(target, options, self.work.read)
        source = self._stack.enter_context(common.readable(item.path))
        capture = Capture.open(source, str(item.path))
        codec, profile = self.work.codec, self.work.profile
        tokens = options.chunk_tokens
        if self.work.goal is not None:
            goal, probes = self.work.goal, options.keep_probes
            codec = choose(
                capture, profile, goal, chunk_tokens=tokens, drop=options.drop, keep_probes=probes, engine=self.engine
            )
        drop = jobs.left_out(codec, options.drop, options.keep_probes)
        if there:
            try:
                found = jobs.require_compressed(target, capture, codec, profile=profile, chunk_tokens=tokens, drop=drop)
            except KvpackError as error:
                if not options.force:
                    raise batch.other_output(target, error) from None
            else:
                return self._finished(item, _skipped(item, found))
        model = self.work.models.model_for(capture) if self.work.models else None
        return jobs.prepare(capture, codec, profile=profile, model=model, chunk_tokens=tokens, drop=drop)

    def _written(self, item: Item, write: jobs.Write) -> Outcome:
        options, models = self.options, self.work.models
        assert item.target is not None
        try:
            with (
                common.progress_bar(f"compressing {item.path.name}", options.quiet) as progress,
                common.writable(item.target, options.force, [item.path]) as sink,
            ):
                if models is not None and models.loaded is not None:
                    models.loaded.progress = progress
                done = write(sink, progress)
        except BrokenPipeError:
            raise
        except Exception as error:
            return Outcome.failed(item, error)
        return self._finished(
            item,
            {
                "input": str(item.path),
                "output": str(item.target),
                "codec": done.codec,
                "original_size": done.original,
                "size": done.size,
                "ratio": done.original / done.size,
                "skipped": False,
                "carried_losslessly": done.carried,
                "dropped": done.dropped,
                "dropped_bytes": done.dropped_bytes,
                "surprise": done.surprise,
                "streams": done.streams,
            },
        )

    def _finished(self, item: Item, row: dict[str, Any]) -> Outcome:
        """Return the outcome of an input whose output is there, and remove the input if that was asked for."""
        if self.options.remove:
            try:
                self._remove_verified(item)
            except Exception as error:
                return replace(Outcome.failed(item, error), row=row)
        return Outcome(str(item.path), row)

    def _remove_verified(self, item: Item) -> None:
        """Delete an input after its output was decompressed as ``kvpack decompress`` does it, and compared with it."""
        assert item.target is not None
        try:
            written = jobs.KvpFile.open(item.target, self.work.profile)
            exact = written.lossless and not written.container.header.dropped
            if not (exact or self.options.lossy_ok):
                raise KvpackError("it is not the whole original")
            jobs.require_restorable(written, item.path if exact else None, self.engine)
        except KvpackError as error:
            raise KvpackError(f"{item.path}: kept, because what was written does not restore it ({error})") from None
        sync_folder(item.target)
        item.path.unlink()


def _skipped(item: Item, found: jobs.KvpFile) -> dict[str, Any]:
    size, original = found.container.size, found.container.source.file_size
    return {
        "input": str(item.path),
        "output": str(item.target),
        "codec": found.codecs[0].name,
        "original_size": original,
        "size": size,
        "ratio": original / size,
        "skipped": True,
    }

"""Put captures into a store: find what it holds of them already, and write an object for each window of the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import BinaryIO

from kvpack.cache.metadata import Schedule, parse_metadata
from kvpack.codecs.protocol import Codec, Need
from kvpack.engine import Engine, Progress
from kvpack.errors import FormatError, MismatchError, UsageError, naming
from kvpack.formats.source import Capture
from kvpack.jobs import CompressJob, KvpFile, Write, compress_many, differing_parts, prepare
from kvpack.jobs.compression import CHUNK_MULTIPLE
from kvpack.profiles import Profile, profile_for
from kvpack.store.identity import identity_of, recipe_of
from kvpack.store.keys import Ids, object_name
from kvpack.store.objects import cut, notes_of, open_object, text_of
from kvpack.store.place import Store, publish, touch
from kvpack.store.schedule import Piece, made_of
from kvpack.store.trie import Step, end_of, follow, longest, nearest

WINDOW = 256
SHORT = 64
"""Objects of fewer tokens are ends of texts: others are not continued from them, and none is cut that short."""


@dataclass(frozen=True)
class Stored:
    """The result of putting one capture.

    ``tokens`` is the text's length, of which ``shared`` were stored before. ``objects`` counts the text's objects, and
    ``written`` those of them that are new, of ``written_bytes`` bytes. ``differing`` are the ranges ``[start, stop)``
    of objects that were stored before from other bits. ``repaired`` are those of damaged objects that were replaced.
    """

    kind: str
    codec: str
    tokens: int
    shared: int
    objects: int
    written: int = 0
    written_bytes: int = 0
    differing: list[tuple[int, int]] = field(default_factory=list)
    repaired: list[tuple[int, int]] = field(default_factory=list)


def put(
    store: Store,
    capture: Capture,
    codec: Codec,
    *,
    profile: Profile | None = None,
    window: int = WINDOW,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Stored:
    """Store a capture's keys, values and token ids. Objects appear one after another, each when it is on the disk.

    Raises:
        UsageError: ``codec`` depends on what follows, it needs a profile, or ``window`` is not a multiple of 128.
        FormatError, UnsupportedError: The capture has no token ids, or layers that do not hold all tokens.
        MismatchError: The capture does not say which weights made it, was decoded from a lossy store, or the profile
            is of another model.

    """
    if not codec.traits.prefix_stable:
        raise UsageError(
            f"{codec.name} codes tokens by what follows them, so its frames cannot be shared: "
            "kvpack.codecs.recipes.prefix_stable gives the variant to use instead"
        )
    if window < CHUNK_MULTIPLE or window % CHUNK_MULTIPLE:
        raise UsageError(f"a window has a multiple of {CHUNK_MULTIPLE} tokens, not {window}")
    with naming(capture.file.name):
        tokens, identity = text_of(capture), identity_of(capture.metadata, capture.tensors)
        if "lossy" in capture.metadata:
            raise MismatchError("was decoded from a lossy codec: stored again it would pass for the model's own")
        if Need.PROFILE in codec.traits.needs and profile is None:
            profile = profile_for(capture.metadata, codec.name, capture.tensors.values())
        work = _Work(store, capture, tokens, codec, profile, window)
        work.job(0, min(window, len(tokens)), "", "")  # This refuses what cannot be coded before anything is written.
        needed = profile.sha256 if profile and Need.PROFILE in codec.traits.needs else None
        with store.locked():
            kind = store.add_kind({"identity": identity, "recipe": recipe_of(codec, needed, window)})
            return work.run(kind, engine, progress)


def _write(write: Write, file: BinaryIO) -> None:
    write(file, None)


@dataclass(frozen=True, eq=False)
class _Work:
    """The putting of one capture."""

    store: Store
    capture: Capture
    tokens: Ids
    codec: Codec
    profile: Profile | None
    window: int

    @property
    def mode(self) -> int | None:
        """Return the permissions of the capture, which its objects get; None if it is in memory."""
        return self.capture.file.source.mode

    @cached_property
    def schedule(self) -> Schedule | None:
        return parse_metadata(self.capture.metadata).schedule_of(len(self.tokens))

    def made(self, stop: int) -> tuple[str]:
        return (made_of(self.schedule, stop),)

    def run(self, kind: str, engine: Engine | None, progress: Progress | None) -> Stored:
        way = longest(follow(self.store, kind, self.tokens, self.window, self.made, SHORT))
        rest = self._rest(kind, way)
        state, differing = self._compared(way)
        damaged = [step for step in way if state[step] == "damaged"]
        plan = [*damaged, *rest]
        written = size = 0
        total = sum(step.stop - step.start for step in plan)
        done = 0
        for step, write in zip(plan, compress_many(self._jobs(kind, plan), engine), strict=True):
            target = self.store.object(step.parent, step.name)
            if publish(self.store.path, target, partial(_write, write), replace=step in damaged, mode=self.mode):
                written, size = written + 1, size + target.stat().st_size
            elif not self._same(step):
                differing.append((step.start, step.stop))
            done += step.stop - step.start
            if progress:
                progress(done, total)
        for step in way:
            touch(self.store.object(step.parent, step.name))
        repaired = [(step.start, step.stop) for step in damaged]
        every = len(way) + len(rest)
        return Stored(kind, self.codec.name, len(self.tokens), end_of(way), every, written, size, differing, repaired)

    def _rest(self, kind: str, way: tuple[Step, ...]) -> list[Step]:
        """Return the objects to write behind ``way``. The first ends where another stored text parts from this one."""
        parent, at = (way[-1].name, way[-1].stop) if way else (kind, 0)
        steps: list[Step] = []
        found = nearest(self.store, parent, self.tokens, self.made, at, SHORT) if at < len(self.tokens) else None
        size = found[1] if found else self.window
        while at < len(self.tokens):
            stop = min(at + size, len(self.tokens))
            name = object_name(self.store.key, parent, *self.made(stop), self.tokens[at:stop])
            steps.append(Step(parent, name, at, stop))
            parent, at, size = name, stop, self.window
        return steps

    def _compared(self, way: tuple[Step, ...]) -> tuple[dict[Step, str], list[tuple[int, int]]]:
        """Return the state of each stored object, and the ranges of those that were made of other bits."""
        state, differing = {}, []
        for step in way:
            try:
                state[step] = "same" if self._same(step) else "other"
            except (FormatError, FileNotFoundError):
                state[step] = "damaged"
            if state[step] == "other":
                differing.append((step.start, step.stop))
        return state, differing

    def _same(self, step: Step) -> bool:
        """Return whether the stored object was made of the capture's own bits, by the digests of its parts."""
        path = self.store.object(step.parent, step.name)
        open_object(self.store, path, streams=True)
        return not any(differing_parts(KvpFile.open(path), cut(self.capture, step.start, step.stop, {})))

    def _jobs(self, kind: str, steps: list[Step]) -> Iterator[CompressJob]:
        for step in steps:
            yield self.job(step.start, step.stop, kind, step.parent)

    def job(self, start: int, stop: int, kind: str, parent: str) -> CompressJob:
        piece = Piece.of(self.schedule, start, stop) if self.schedule else None
        notes = notes_of(kind, parent, piece)
        return prepare(
            cut(self.capture, start, stop, notes),
            self.codec,
            profile=self.profile,
            chunk_tokens=self.window,
            origin=start,
            before=self.tokens[:start],
        )

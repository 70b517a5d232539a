"""Get the longest stored prefix of a prompt, as a capture."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_
from typing import Any, BinaryIO

import numpy as np

from kvpack.cache import PartSpec
from kvpack.cache.metadata import parse_metadata
from kvpack.codecs.protocol import Codec
from kvpack.engine import CpuEngine, DecodeTask, Engine
from kvpack.errors import FormatError, MismatchError, NotStoredError, UnsupportedError, UsageError, naming
from kvpack.formats.captures import layer_of, tensor_info
from kvpack.formats.records import Reader, token_ids
from kvpack.formats.safetensors import Header, build_header
from kvpack.formats.sink import SafetensorsSink
from kvpack.jobs import KvpFile, decoded
from kvpack.jobs.reader import keys_and_values
from kvpack.kvp import Container
from kvpack.profiles import Profile, profile_with
from kvpack.store.identity import Document, identity_of
from kvpack.store.keys import Ids
from kvpack.store.objects import Entry, open_object
from kvpack.store.place import Store, touch
from kvpack.store.schedule import MADE, PREFILL, joined, made_of
from kvpack.store.trie import Step, Wanted, common, end_of, follow, nearest


@dataclass(frozen=True)
class Prompt:
    """What a prefix is wanted of.

    ``tokens`` ``[T]`` int32 are the prompt's. ``identity`` is that of a cache which the prefix must agree with
    (:func:`kvpack.store.identity.identity_of`); without it, ``weights`` may be the SHA-256 of a model's weights.
    ``wanted`` says how an object may have been made, from the position behind its last token.
    """

    tokens: Ids
    wanted: Wanted
    identity: Document | None = None
    weights: str | None = None

    @classmethod
    def of_tokens(cls, tokens: Sequence[int], *, weights: str | None = None, any_way: bool = False) -> Prompt:
        """Return the prompt of token ids, whose prefix must be prefilled unless it may be made ``any_way``."""
        allowed = MADE if any_way else (PREFILL,)
        return cls(np.array(tokens, np.int32), lambda _: allowed, None, weights)

    @classmethod
    def of_cache(cls, source: Reader, metadata: Mapping[str, str], *, any_way: bool = False) -> Prompt:
        """Return the prompt of a capture or ``.kvp`` file: its tokens, of its own identity and made in its own way.

        Raises:
            FormatError: It has no token ids.
            MismatchError: It does not say which weights made it.

        """
        tokens = token_ids(source)
        if tokens is None:
            raise FormatError("has no token ids (a tensor 'tokens' of dtype I32)")
        schedule = parse_metadata(metadata).schedule_of(len(tokens))

        def wanted(stop: int) -> Collection[str]:
            return MADE if any_way else (made_of(schedule, stop),)

        return cls(np.array(tokens, np.int32), wanted, identity_of(metadata, source.tensors))


@dataclass(frozen=True)
class Fetched:
    """The result of :func:`get`: ``held`` of the prompt's ``tokens``, from ``objects`` objects of one kind.

    ``schedule`` is how they were made, or None if that is not known. ``notes`` say what stopped the prefix early.
    ``mode`` are the permissions that all the objects' files give.
    """

    kind: str
    codec: str
    lossless: bool
    tokens: int
    held: int
    objects: int
    schedule: dict[str, Any] | None
    notes: tuple[str, ...]
    mode: int = 0o777


def get(
    store: Store,
    prompt: Prompt,
    codec: Codec,
    output: BinaryIO,
    *,
    profile: Profile | None = None,
    kind: str | None = None,
    engine: Engine | None = None,
) -> Fetched:
    """Write the longest stored prefix of ``prompt`` that ``codec`` coded as a capture to ``output``.

    ``output`` must be seekable. ``kind`` are the first digits of the name of the only kind to look at. Every object is
    proven and its checksums are verified before it counts, and a prefix ends before one that is damaged.

    Raises:
        NotStoredError: The store has no prefix.
        UsageError: Caches of several identities may be meant.
        MismatchError: The prefix needs another profile.

    """
    with store.locked():
        found, notes = _best(store, prompt, codec, profile, kind)
        if not found.entries:
            damaged = f"; {notes[0]}" if notes else ""
            raise NotStoredError(f"{store.path}: holds no prefix of the prompt by {codec.name}{damaged}")
        fetched = _write(found, prompt, output, profile, engine or CpuEngine(), notes)
        for entry in found.entries:
            touch(entry.path)
    return fetched


@dataclass(frozen=True)
class _Found:
    """Proven objects one after another, and the number of tokens that they hold of the prompt."""

    kind: str
    entries: list[Entry]
    held: int


def _best(
    store: Store, prompt: Prompt, codec: Codec, profile: Profile | None, kind: str | None
) -> tuple[_Found, list[str]]:
    candidates = _kinds(store, prompt, codec, kind)
    if not candidates:
        others = sorted({document["recipe"]["codec"]["name"] for _, document in store.kinds()})
        stored = f" (it has caches by {', '.join(others)})" if others else ""
        if damaged := store.damaged_kinds():
            stored += f"; {damaged} kinds are damaged: kvpack store verify names them"
        raise NotStoredError(f"{store.path}: holds nothing of this model by {codec.name}{stored}")
    usable = _with_profile(candidates, profile)
    notes: list[str] = []
    found = [_search(store, prompt, name, document, notes) for name, document in usable]
    return min(found, key=lambda one: (-one.held, len(one.entries), one.kind)), notes


def _kinds(store: Store, prompt: Prompt, codec: Codec, kind: str | None) -> list[tuple[str, Document]]:
    """Return the kinds that the prompt may mean.

    Raises:
        UsageError: They are of several identities, and nothing says which is meant.

    """
    found = []
    for name, document in store.kinds():
        identity, recipe = document["identity"], document["recipe"]
        right = prompt.identity is None or identity == prompt.identity
        right &= prompt.weights is None or identity["model"]["weights_sha256"] == prompt.weights
        if right and name.startswith(kind or "") and recipe["codec"] == codec.to_json():
            found.append((name, document))
    if len({json.dumps(document["identity"], sort_keys=True) for _, document in found}) > 1:
        names = ", ".join(name[:12] for name, _ in found)
        raise UsageError(f"{store.path}: holds caches of several identities; name a kind with --kind: {names}")
    return found


def _with_profile(kinds: list[tuple[str, Document]], profile: Profile | None) -> list[tuple[str, Document]]:
    def fits(needed: str | None) -> bool:
        if needed is None:
            return True
        return profile_with(needed) is not None if profile is None else profile.sha256 == needed

    usable = [one for one in kinds if fits(one[1]["recipe"]["profile"])]
    if not usable:
        needed = kinds[0][1]["recipe"]["profile"]
        given = "not with the one given" if profile else "give it with -D"
        raise MismatchError(f"the stored caches were made with the profile of SHA-256 {needed[:12]}...: {given}")
    return usable


def _search(store: Store, prompt: Prompt, kind: str, document: Document, notes: list[str]) -> _Found:
    """Return the longest sound prefix of one kind. What stops it is added to ``notes``."""
    tokens, window = prompt.tokens, document["recipe"]["window"]
    best = _Found(kind, [], 0)
    compared: set[str] = set()
    for way in sorted(follow(store, kind, tokens, window, prompt.wanted), key=lambda way: (-end_of(way), len(way))):
        entries = _sound(store, way, tokens, notes)
        for count in range(len(entries), -1, -1):
            some = entries[:count]
            held, parent = (some[-1].stop, some[-1].name) if some else (0, kind)
            if held > best.held:
                best = _Found(kind, some, held)
            if held == len(tokens) or held + window <= best.held:
                break
            if parent not in compared:
                compared.add(parent)
                last = _partly(store, parent, prompt, held, notes)
                if last is not None and held + last[1] > best.held:
                    best = _Found(kind, [*some, last[0]], held + last[1])
    return best


def _partly(store: Store, parent: str, prompt: Prompt, at: int, notes: list[str]) -> tuple[Entry, int] | None:
    """Return an object behind ``parent`` of which the prompt has only the first tokens, and their number."""
    found = nearest(store, parent, prompt.tokens, prompt.wanted, at)
    if found is None:
        return None
    entry = _opened(store, Step(parent, found[0].name, at, at + found[1]), prompt.tokens, notes)
    return (entry, found[1]) if entry else None


def _sound(store: Store, way: Sequence[Step], tokens: Ids, notes: list[str]) -> list[Entry]:
    """Return the objects of a way up to the last one before one that is damaged."""
    entries = []
    for step in way:
        entry = _opened(store, step, tokens, notes)
        if entry is None:
            break
        entries.append(entry)
    return entries


def _opened(store: Store, step: Step, tokens: Ids, notes: list[str]) -> Entry | None:
    """Return an object that was proven and verified, or None after noting that it is damaged."""
    path = store.object(step.parent, step.name)
    try:
        entry = open_object(store, path, streams=True)
        if entry.origin != step.start or common(entry.tokens, tokens[step.start :]) < step.stop - step.start:
            raise FormatError(f"{path}: holds other tokens than its place says")
    except (FormatError, MismatchError, UnsupportedError, OSError) as error:
        note = f"stopped at token {step.start}: {error}"
        if note not in notes:
            notes.append(note)
        return None
    return entry


def _write(
    found: _Found, prompt: Prompt, output: BinaryIO, profile: Profile | None, engine: Engine, notes: list[str]
) -> Fetched:
    first, last = found.entries[0], found.entries[-1]
    pieces = [entry.piece for entry in found.entries]
    if last.piece is not None:
        pieces[-1] = last.piece.first(found.held - last.origin)
    schedule = joined(pieces)
    header = _header(found, schedule)
    sink = SafetensorsSink(output, header)
    entry = next(spec for spec in header.tensors if spec.name == "tokens")
    with closing(sink):
        sink.write(_whole(entry), prompt.tokens[: found.held].view(np.uint32).reshape(1, -1, 1))
        for task, arrays in decoded(engine, _tasks(found, prompt.tokens, profile)):
            for part, bits in zip(task.block.parts, arrays, strict=True):
                sink.write(replace(part, first=part.position), bits)
        sink.finish()
    return Fetched(
        found.kind, first.codec, first.lossless, len(prompt.tokens), found.held, len(found.entries), schedule,
        tuple(notes), reduce(and_, (entry.path.stat().st_mode & 0o777 for entry in found.entries)),
    )  # fmt: skip


def _tasks(found: _Found, tokens: Ids, profile: Profile | None) -> Iterator[DecodeTask]:
    """Yield the tasks of all objects. Each is opened when the engine gets to it."""
    for job, entry in enumerate(found.entries):
        with naming(str(entry.path)):
            file = KvpFile(Container.open(entry.path), profile, str(entry.path), tokens[: entry.origin])
            yield from file.tasks(keys_and_values, job=job)


def _whole(entry: Any) -> PartSpec:
    info = tensor_info(entry)
    return PartSpec(info, 0, info.rows, info.rows)


def _header(found: _Found, schedule: dict[str, Any] | None) -> Header:
    """Return the header of the capture: the identity as the first object has it, and how the prefix was made."""
    first = found.entries[0]
    tensors = []
    for spec in first.source.tensors:
        shape = list(spec.declared_shape)
        shape[1 if layer_of(spec) is not None else 0] = found.held
        tensors.append((spec.name, spec.dtype, shape))
    metadata = {name: value for name, value in first.source.metadata.items() if name != "store"}
    metadata["kvpack_capture_version"] = "1"
    if len({entry.source.metadata.get("versions") for entry in found.entries}) > 1:
        metadata.pop("versions", None)
    if schedule is not None:
        metadata["schedule"] = json.dumps(schedule, sort_keys=True)
    if not first.lossless:
        metadata["lossy"] = json.dumps(first.codec)
    return build_header(tensors, metadata)

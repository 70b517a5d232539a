"""Objects of a store: plain ``.kvp`` files that hold one window of a text each, and are proven before they are used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.cache.metadata import parse_value
from kvpack.errors import CorruptError, FormatError, UnsupportedError, naming
from kvpack.formats.captures import layer_of
from kvpack.formats.records import token_ids
from kvpack.formats.safetensors import Header
from kvpack.formats.source import Capture
from kvpack.jobs import KvpFile
from kvpack.store.identity import identity_of, kept_metadata, recipe_of
from kvpack.store.keys import Ids, kind_name, object_name
from kvpack.store.place import Store
from kvpack.store.schedule import MADE, UNKNOWN, Piece


def text_of(capture: Capture) -> Ids:
    """Return the token ids ``[T]`` of a capture whose layers all hold these T tokens.

    Raises:
        FormatError: The capture has no token ids, or no layers.
        UnsupportedError: A layer holds fewer or more rows than there are tokens.

    """
    tokens = token_ids(capture)
    layers = [entry for entry in capture.tensors.values() if layer_of(entry) is not None]
    if tokens is None or not len(tokens):
        raise FormatError("has no token ids (a tensor 'tokens' of dtype I32): a store finds caches by them")
    if not layers:
        raise FormatError("has no layers.N.keys or layers.N.values to store")
    for entry in layers:
        if entry.shape[1] != len(tokens):
            raise UnsupportedError(f"{entry.name} has {entry.shape[1]} rows for {len(tokens)} tokens: cannot be cut")
    return np.array(tokens, np.int32)


def cut(capture: Capture, start: int, stop: int, notes: Mapping[str, Any]) -> Capture:
    """Return a capture in memory of tokens ``[start, stop)``: keys, values, token ids, and the metadata of an object.

    ``notes`` are what the object says of itself (:func:`notes_of`).
    """
    tensors = {
        name: (entry.dtype, capture.read(name, slice(start, stop)))
        for name, entry in capture.tensors.items()
        if layer_of(entry) is not None
    }
    tensors["tokens"] = ("I32", capture.read("tokens")[start:stop])
    metadata = {**kept_metadata(capture.metadata), "store": json.dumps(notes, sort_keys=True)}
    return Capture.of(f"{capture.file.name}[{start}:{stop}]", tensors, metadata)


def notes_of(kind: str, parent: str, piece: Piece | None) -> dict[str, Any]:
    """Return what an object says of itself: its kind, its parent, and how its tokens were made."""
    return {"kind": kind, "parent": parent, "made": piece.to_json() if piece else UNKNOWN}


@dataclass(frozen=True, eq=False)
class Entry:
    """What an object says, after it was proven to be what its place says. The file itself is closed again.

    ``tokens`` ``[n]`` int32 are its own, and the first of them has position ``origin`` in the text. ``made`` is how its
    name says they were made, and ``piece`` the schedule that made them, or None if nobody says. ``source`` is the
    safetensors header of what was compressed, ``codec`` the name of the codec and ``size`` the file's bytes.
    """

    path: Path
    kind: str
    parent: str
    origin: int
    tokens: Ids
    made: str
    piece: Piece | None
    source: Header
    codec: str
    lossless: bool
    size: int

    @property
    def name(self) -> str:
        """Return the object's name."""
        return self.path.stem

    @property
    def stop(self) -> int:
        """Return the position in the text behind the last token."""
        return self.origin + len(self.tokens)


def open_object(store: Store, path: Path, *, streams: bool = False) -> Entry:
    """Open an object, prove that it is what its directory and its name say, and return what it says.

    The name is computed again from the object's own identity, recipe, parent and tokens. With ``streams``, the checksum
    of every stream is verified too. Nothing of the layers is decoded.

    Raises:
        FormatError: The object is damaged, or it is not what its name says.
        MismatchError: It does not say which weights made it.
        UnsupportedError: A newer kvpack wrote it.

    """
    file = KvpFile.open(path)
    with naming(str(path)):
        entry = proven(store.key, path, file)
        if streams:
            for part in file.container.parts:
                file.container.verify(part)
    return entry


def proven(key: bytes, path: Path, file: KvpFile) -> Entry:
    """Prove that an open file is the object that belongs at ``path`` in a store with this key, without its streams.

    The errors are those of :func:`open_object`.
    """
    notes = parse_value(file.metadata.get("store"))
    tokens = token_ids(file)
    if not isinstance(notes, dict) or tokens is None or file.origin is None or len(tokens) != file.spec.rows:
        raise FormatError("is no object of a store")
    kind, parent, made = notes.get("kind"), notes.get("parent"), notes.get("made")
    piece = Piece.from_json(made, len(tokens))
    label = piece.made if piece else made
    if label not in MADE or (piece is None and label != UNKNOWN) or parent != path.parent.name:
        raise CorruptError("corrupt: the object is not of the directory that it lies in")
    if kind_name(key, kind_of(file)) != kind or (parent == kind) != (file.origin == 0):
        raise CorruptError("corrupt: the object's identity or recipe is not what its kind says")
    if object_name(key, parent, label, tokens) != path.stem:
        raise CorruptError("corrupt: the object's tokens are not those that its name stands for")
    ids = np.array(tokens, np.int32)
    container = file.container
    return Entry(
        path, kind, parent, file.origin, ids, label, piece, container.source, file.codecs[0].name, file.lossless,
        container.size,
    )  # fmt: skip


def kind_of(file: KvpFile) -> dict[str, Any]:
    """Return the document of the kind that a file is of: its identity and its recipe."""
    header = file.container.header
    profile = header.profile["sha256"] if header.profile else None
    recipe = recipe_of(file.codecs[0], profile, header.chunk_tokens)
    return {"identity": identity_of(file.metadata, file.tensors), "recipe": recipe}

"""Verify a store: every file is proven to be what its name says, and every bit of it to be what was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvpack.errors import KvpackError, UnsupportedError
from kvpack.store.keys import is_name
from kvpack.store.objects import Entry, open_object
from kvpack.store.place import (
    ENTRIES,
    KEY,
    KINDS,
    LOCK,
    OBJECTS,
    TEMPORARY,
    Store,
    proven_kind,
)


@dataclass(frozen=True)
class Damage:
    """A file or directory of a store that is not as it was written, and what is wrong with it."""

    path: str
    reason: str


@dataclass(frozen=True)
class Verified:
    """The number of objects and kinds that are sound, and all damage."""

    objects: int
    kinds: int
    damage: list[Damage]


def verify(path: Path) -> Verified:
    """Verify the whole store at ``path`` without decoding keys and values.

    Leftovers of dead writers in ``tmp`` are no damage, because they are never read.

    Raises:
        KvpackError: There is no store.

    """
    if not path.is_dir():
        raise KvpackError(f"{path}: is not a store")
    try:
        store = Store(path)
    except UnsupportedError:
        raise
    except KvpackError as error:
        if not any((path / name).exists() for name in ENTRIES):
            raise
        return Verified(0, 0, [Damage(str(path), str(error))])
    with store.locked():
        damage = list(_strangers(path))
        kinds = _kinds(store, damage)
        objects = _objects(store, kinds, damage)
    return Verified(objects, len(kinds), damage)


def _strangers(path: Path) -> Iterator[Damage]:
    """Yield what does not belong into the store's own directory."""
    for entry in sorted(path.iterdir()):
        if entry.name not in ENTRIES or entry.is_dir() != (entry.name in (KINDS, OBJECTS, TEMPORARY)):
            yield Damage(str(entry), "is no part of a store")
    if (path / LOCK).is_file() and (path / LOCK).stat().st_size:
        yield Damage(str(path / LOCK), "is not empty")


def _kinds(store: Store, damage: list[Damage]) -> set[str]:
    sound = set()
    for file in sorted((store.path / KINDS).iterdir()):
        if file.suffix != ".json" or proven_kind(store.key, file) is None:
            damage.append(Damage(str(file), f"corrupt: is not the kind that its name stands for under the {KEY}"))
        else:
            sound.add(file.stem)
    return sound


def _objects(store: Store, kinds: set[str], damage: list[Damage]) -> int:
    """Verify every object, and that each chain leads back to its kind without a gap."""
    found: dict[str, Entry] = {}
    folders = []
    for folder in sorted((store.path / OBJECTS).iterdir()):
        if not folder.is_dir() or not is_name(folder.name):
            damage.append(Damage(str(folder), "is no part of a store"))
            continue
        folders.append(folder)
        for path in sorted(folder.iterdir()):
            if path.suffix != ".kvp":
                damage.append(Damage(str(path), "is no part of a store"))
                continue
            try:
                entry = open_object(store, path, streams=True)
                found[entry.name] = entry
            except (KvpackError, OSError) as error:
                damage.append(Damage(str(path), str(error).removeprefix(f"{path}: ")))
    for entry in found.values():
        before = found.get(entry.parent)
        end = before.stop if before else 0
        if entry.parent in kinds or before is not None:
            if entry.origin != end or entry.kind != (before.kind if before else entry.parent):
                damage.append(Damage(str(entry.path), "corrupt: does not begin where its parent ends"))
    for folder in folders:
        if folder.name not in kinds and folder.name not in found:
            damage.append(Damage(str(folder), "holds objects whose parent is missing or damaged: they are not served"))
    return len(found)

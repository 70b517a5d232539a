"""The directory of a store: its key and description, the lock, and files that appear whole and are never replaced."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from kvpack.cache.metadata import parse_value
from kvpack.errors import CorruptError, KvpackError, UnsupportedError, UsageError
from kvpack.formats.output import writing
from kvpack.formats.temporary import create_beside, settle
from kvpack.store.keys import KEY_BYTES, canonical, is_name, kind_name, new_key, tag

if sys.platform != "win32":
    import fcntl

VERSION = 1
DESCRIPTION, KEY, LOCK, KINDS, OBJECTS, TEMPORARY = "store.json", "key", "lock", "kinds", "objects", "tmp"
ENTRIES = {DESCRIPTION, KEY, LOCK, KINDS, OBJECTS, TEMPORARY}


class Store:
    """An open store. ``path`` is its directory and ``key`` its secret."""

    def __init__(self, path: Path) -> None:
        """Open the store at ``path``.

        Raises:
            KvpackError: There is no store.
            CorruptError: It lacks something, or its key and its description do not belong together.
            UnsupportedError: A newer kvpack made it.

        """
        self.path = path
        if not (path / DESCRIPTION).is_file():
            raise KvpackError(f"{path}: is not a store (no {DESCRIPTION}); kvpack store put makes one")
        if missing := sorted(name for name in ENTRIES if not (path / name).exists()):
            raise CorruptError(f"{path}: corrupt: the store has lost its {missing[0]}")
        self.key = read_key(path)
        if (path / DESCRIPTION).read_bytes() != describe(self.key):
            raise self._refused()

    def _refused(self) -> KvpackError:
        """Tell a newer store from a damaged one, and a damaged description from a damaged key."""
        document = parse_value((self.path / DESCRIPTION).read_bytes().decode(errors="replace"))
        if isinstance(document, dict) and type(found := document.get("kvpack_store")) is int and found > VERSION:
            if document.get("mac") == _mac(self.key, {"kvpack_store": found}):
                return UnsupportedError(f"{self.path}: a store of version {found}: upgrade kvpack")
        proofs = (proven_kind(self.key, file) for file in sorted((self.path / KINDS).glob("*.json")))
        damaged = DESCRIPTION if any(proofs) else f"{DESCRIPTION} or {KEY}"
        return CorruptError(f"{self.path}: corrupt: {damaged} is damaged")

    @classmethod
    def create(cls, path: Path) -> Store:
        """Open the store at ``path``, or make one if the directory is missing or empty.

        Raises:
            UsageError: The directory holds something else. The errors of the constructor are raised too.

        """
        path.mkdir(parents=True, exist_ok=True)
        if strange := sorted({entry.name for entry in path.iterdir()} - ENTRIES):
            raise UsageError(f"{path}: holds {strange[0]}, which is no part of a store: name another directory")
        if not (path / DESCRIPTION).exists():
            for name in (KINDS, OBJECTS, TEMPORARY):
                (path / name).mkdir(exist_ok=True)
            if any((path / OBJECTS).iterdir()) or any((path / KINDS).iterdir()):
                raise CorruptError(f"{path}: corrupt: a store with objects has lost its {DESCRIPTION}")
            (path / LOCK).touch()
            publish(path, path / KEY, new_key().hex().encode() + b"\n", mode=0o600)
            publish(path, path / DESCRIPTION, describe(read_key(path)))
        return cls(path)

    @contextmanager
    def locked(self, *, alone: bool = False) -> Iterator[None]:
        """Hold the store's lock: with others who read and put, or ``alone``, to remove."""
        if sys.platform == "win32":
            raise KvpackError(f"{self.path}: a store needs a system that can lock files as POSIX does")
        with (self.path / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield

    def kinds(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the name and the document of every kind that is sound, in the order of names."""
        for file in sorted((self.path / KINDS).glob("*.json")):
            document = proven_kind(self.key, file)
            if document is not None:
                yield file.stem, document

    def damaged_kinds(self) -> int:
        """Return the number of kinds whose document is not what its name says."""
        return len(list((self.path / KINDS).iterdir())) - len(list(self.kinds()))

    def add_kind(self, document: dict[str, Any]) -> str:
        """Record a kind, if that has not been done, and return its name. A damaged record is replaced."""
        name = kind_name(self.key, document)
        target = self.path / KINDS / f"{name}.json"
        if proven_kind(self.key, target) is None:
            publish(self.path, target, canonical(document), replace=target.exists())
        return name

    def folder(self, parent: str) -> Path:
        """Return the directory of the objects whose parent has this name."""
        return self.path / OBJECTS / parent

    def children(self, parent: str) -> set[str]:
        """Return the names of the objects whose parent has this name."""
        try:
            entries = os.listdir(self.folder(parent))
        except FileNotFoundError:
            return set()
        return {name[:-4] for name in entries if name.endswith(".kvp") and is_name(name[:-4])}

    def object(self, parent: str, name: str) -> Path:
        """Return the path of an object."""
        return self.folder(parent) / f"{name}.kvp"


def read_key(path: Path) -> bytes:
    """Return the key of the store in the directory ``path``.

    Raises:
        CorruptError: The file is not as it was written.

    """
    try:
        text = (path / KEY).read_bytes()
    except FileNotFoundError:
        raise CorruptError(f"{path}: corrupt: the store has lost its {KEY}") from None
    digits = text[:-1].decode(errors="replace")
    if len(text) != 2 * KEY_BYTES + 1 or text[-1:] != b"\n" or not is_name(digits):
        raise CorruptError(f"{path}: corrupt: {KEY} is damaged")
    return bytes.fromhex(digits)


def describe(key: bytes) -> bytes:
    """Return the description that belongs to a key: the layout's version, and a proof that no bit has changed."""
    document = {"kvpack_store": VERSION}
    return canonical({**document, "mac": _mac(key, document)}) + b"\n"


def _mac(key: bytes, document: dict[str, int]) -> str:
    return tag(key, "store", canonical(document))


def proven_kind(key: bytes, file: Path) -> dict[str, Any] | None:
    """Return the document of a kind, or None if the file is missing or not what its name says."""
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        return None
    document = parse_value(raw.decode(errors="replace"))
    if not isinstance(document, dict) or tag(key, "kind", raw) != file.stem:
        return None
    return document


def publish(
    store: Path,
    target: Path,
    data: bytes | Callable[[BinaryIO], Any],
    *,
    replace: bool = False,
    mode: int | None = None,
) -> bool:
    """Write a file so that it appears whole or not at all, even if the machine stops; return whether it was new.

    ``data`` are its bytes or what writes them. The file is written in the store's ``tmp``, flushed to the disk and then
    linked to its name. A file that has that name already stays, unless ``replace`` is set. It has the permissions
    ``mode``, by default those of any new file.
    """
    handle, temporary = create_beside(store / TEMPORARY / target.name, 0o666 if mode is None else 0o600)
    file = os.fdopen(handle, "wb")
    try:
        with writing(target, handle):
            if mode is not None:
                with contextlib.suppress(OSError):  # The file system has no permissions.
                    os.fchmod(handle, mode & 0o777)
            if isinstance(data, bytes):
                file.write(data)
            else:
                data(cast(BinaryIO, file))
            file.flush()
            os.fsync(file.fileno())
        _make_folder(target.parent)
        if replace:
            temporary.replace(target)
        else:
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
        _flush_folder(target.parent)
    finally:
        settle(temporary)
        with contextlib.suppress(OSError):  # Everything is on the disk already, or there is another error.
            file.close()
    return True


def _make_folder(path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        path.mkdir()
        _flush_folder(path.parent)


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def touch(path: Path) -> None:
    """Note that an object was used now, for the order in which ``gc`` removes. A store that cannot be written stays."""
    with contextlib.suppress(OSError):
        os.utime(path)

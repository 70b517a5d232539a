"""Remove objects from a store by age and by size: leaves first, and the least recently used first."""

from __future__ import annotations

import contextlib
import heapq
import os
import time
from dataclasses import dataclass
from pathlib import Path

from kvpack.store.keys import is_name
from kvpack.store.place import KINDS, OBJECTS, TEMPORARY, Store


@dataclass(frozen=True)
class Collected:
    """What was removed and what is left: objects, their bytes, and files that dead writers had left behind."""

    removed: int
    removed_bytes: int
    kept: int
    kept_bytes: int
    leftovers: int


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    used: float

    @property
    def parent(self) -> str:
        return self.path.parent.name


def collect(
    store: Store, *, max_bytes: int | None = None, max_age: float | None = None, now: float | None = None
) -> Collected:
    """Remove leaves that were last used more than ``max_age`` seconds ago, then leaves until ``max_bytes`` are left.

    An object is a leaf if no other has it as its parent. Nobody reads or puts meanwhile, so nothing that another
    process has just found can be removed. What a killed writer left in ``tmp`` is removed too.
    """
    now = time.time() if now is None else now
    with store.locked(alone=True):
        leftovers = _clear(store.path / TEMPORARY)
        files = _files(store)
        behind: dict[str, int] = {}
        for file in files.values():
            behind[file.parent] = behind.get(file.parent, 0) + 1
        leaves = [(file.used, name) for name, file in files.items() if not behind.get(name)]
        heapq.heapify(leaves)
        total = held = sum(file.size for file in files.values())
        removed = 0
        while leaves:
            used, name = heapq.heappop(leaves)
            old = max_age is not None and now - used > max_age
            if not old and (max_bytes is None or held <= max_bytes):
                break
            file = files[name]
            file.path.unlink()
            removed, held = removed + 1, held - file.size
            behind[file.parent] -= 1
            if not behind[file.parent]:
                with contextlib.suppress(OSError):  # The directory may hold files that are no objects.
                    file.path.parent.rmdir()
                if file.parent in files:
                    heapq.heappush(leaves, (files[file.parent].used, file.parent))
                else:
                    (store.path / KINDS / f"{file.parent}.json").unlink(missing_ok=True)
    return Collected(removed, total - held, len(files) - removed, held, leftovers)


def _files(store: Store) -> dict[str, _File]:
    """Return the objects by name."""
    found = {}
    for path in (store.path / OBJECTS).glob("*/*.kvp"):
        if is_name(path.stem):
            state = path.stat()
            found[path.stem] = _File(path, state.st_size, state.st_mtime)
    return found


def _clear(folder: Path) -> int:
    names = os.listdir(folder)
    for name in names:
        (folder / name).unlink()
    return len(names)

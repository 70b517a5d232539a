"""What a calibration has found so far, in a folder beside the profile: an interrupted one goes on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


class Work:
    """Arrays by name in ``folder``, or in memory where that is None; of one ``key``, the settings they depend on."""

    def __init__(self, folder: Path | None = None, key: object = None) -> None:
        """Open the folder; what another key left there is removed."""
        self._folder = folder
        if folder is None:
            return
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        note = folder / "key"
        if folder.exists() and not (note.exists() and note.read_text() == digest):
            self.remove()
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(digest)

    def growing(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array that keeps what is written to it, zeros at first: on disk, and so not in main memory as a whole."""
        if self._folder is None:
            return np.zeros(shape, dtype)
        path = self._folder / f"{name}.npy"
        mode = "r+" if path.exists() else "w+"
        found: NDArray[Any] = np.lib.format.open_memmap(path, mode, dtype, shape)
        return found

    def once(self, name: str, find: Callable[[], Arrays]) -> Arrays:
        """What ``find`` gives, or gave before an interruption."""
        if self._folder is None:
            return find()
        path = self._folder / f"{name}.npz"
        if path.exists():
            with np.load(path) as kept:
                return dict(kept)
        found, part = find(), path.with_name("part.npz")
        np.savez(part, **found)  # type: ignore[arg-type]
        part.rename(path)
        return found

    def remove(self) -> None:
        """Nothing more is to be found: remove the folder, if it is one of these."""
        if self._folder is not None and (self._folder / "key").exists():
            shutil.rmtree(self._folder)

"""Keeps intermediate results of a calibration in a folder beside the profile, so that it can be resumed."""

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
    """Named arrays in ``folder``, or in memory if ``folder`` is None.

    ``key`` holds the settings that the arrays depend on.
    """

    def __init__(self, folder: Path | None = None, key: object = None) -> None:
        """Open the folder; results of another key in it are removed."""
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
        """Return an array whose contents persist; it is zero at first.

        With a folder, the array is mapped from disk and need not fit in main memory.
        """
        if self._folder is None:
            return np.zeros(shape, dtype)
        path = self._folder / f"{name}.npy"
        mode = "r+" if path.exists() else "w+"
        found: NDArray[Any] = np.lib.format.open_memmap(path, mode, dtype, shape)
        return found

    def once(self, name: str, find: Callable[[], Arrays]) -> Arrays:
        """Return the result of ``find``, or its stored result from before an interruption."""
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
        """Remove the folder, if it was made by this class."""
        if self._folder is not None and (self._folder / "key").exists():
            shutil.rmtree(self._folder)

"""Keeps intermediate results of a calibration in a folder beside the profile, so that it can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from kvpack.formats.output import no_space, writing

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
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with writing(note):
            note.write_text(digest)

    def growing(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return an array whose contents persist; it is zero at first.

        With a folder, the array is mapped from disk and need not fit in main memory. An array that a process was killed
        while making is made anew.

        Raises:
            OSError: The disk has no room for it.

        """
        if self._folder is None:
            return np.zeros(shape, dtype)
        path = self._folder / f"{name}.npy"
        with suppress(OSError, ValueError, EOFError):
            kept: NDArray[Any] = np.lib.format.open_memmap(path, "r+")
            if (kept.shape, kept.dtype) == (shape, dtype):
                return kept
        with writing(path):
            found: NDArray[Any] = np.lib.format.open_memmap(path, "w+", dtype, shape)
            _allocate(path)
        return found

    def once(self, name: str, find: Callable[[], Arrays]) -> Arrays:
        """Return the result of ``find``, or its stored result from before an interruption."""
        if self._folder is None:
            return find()
        path = self._folder / f"{name}.npz"
        with suppress(OSError, ValueError, EOFError, BadZipFile), np.load(path) as kept:
            return dict(kept)
        found, part = find(), path.with_name("part.npz")
        with writing(part):
            np.savez(part, **found)  # type: ignore[arg-type]
        part.rename(path)
        return found

    def remove(self) -> None:
        """Remove the folder, if it was made by this class."""
        if self._folder is not None and (self._folder / "key").exists():
            shutil.rmtree(self._folder)


def _allocate(path: Path) -> None:
    """Give a file the room on the disk that it will need: a full disk is no error for what is mapped, but a signal."""
    if hasattr(os, "posix_fallocate"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                path.unlink()
                raise no_space(error, file.fileno(), str(size)) from None

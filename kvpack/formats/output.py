"""Write output files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from kvpack.errors import KvpackError


def check_output(path: Path, *, force: bool = False) -> None:
    """Refuse a ``path`` that cannot be written. Callers do this before they begin any work.

    Raises:
        KvpackError: The directory is missing, ``path`` is not a regular file, or it exists and ``force`` is not set.

    """
    if not path.parent.is_dir():
        raise KvpackError(f"{path}: there is no directory {path.parent}")
    if path.exists() and not path.is_file():
        raise KvpackError(f"{path}: is not a regular file")
    if path.exists() and not force:
        raise KvpackError(f"{path}: exists already; use -f to overwrite it")


@contextmanager
def atomic_output(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes ``path`` if the ``with`` block succeeds, and is deleted if it fails.

    The file is written under a temporary name in the same directory, flushed to disk, then renamed. It gets the mode
    that any new file has there, even if it replaces a file with another mode.

    Raises:
        KvpackError: :func:`check_output` refuses the path.

    """
    check_output(path, force=force)
    handle, temporary = _create_beside(path)
    try:
        with os.fdopen(handle, "wb") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        if force:
            temporary.replace(path)
        else:
            _rename_new(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Write the entry of the file ``path`` in its folder to the disk, so that it is there after a loss of power."""
    try:
        handle = os.open(path.parent, os.O_RDONLY)
    except OSError:  # Folders cannot be opened on this system.
        return
    try:
        os.fsync(handle)
    except OSError:  # The file system does not know this.
        pass
    finally:
        os.close(handle)


def _create_beside(path: Path) -> tuple[int, Path]:
    """Create an empty file with an unused name in the directory of ``path``, and open it for writing.

    The kernel gives it the mode of a new file. ``tempfile.mkstemp`` would make it private, and to undo that one has to
    know the umask, which can be read only by changing it for all threads of the process.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            return os.open(temporary, flags, 0o666), temporary
        except FileExistsError:
            continue


def _rename_new(source: Path, target: Path) -> None:
    """Rename a file, but never replace one that has appeared under the new name meanwhile."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise KvpackError(f"{target}: exists already; use -f to overwrite it") from None
    except OSError:  # The file system has no hard links.
        source.replace(target)
        return
    source.unlink()

"""Write output files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from kvpack.errors import KvpackError
from kvpack.formats.temporary import create_beside, settle

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_output(path: Path, *, force: bool = False) -> None:
    """Refuse a ``path`` that cannot be written. Callers do this before they begin any work.

    Raises:
        KvpackError: The directory is missing or cannot be written, ``path`` is not a regular file, or it exists and
            ``force`` is not set.

    """
    if not path.parent.is_dir():
        raise KvpackError(f"{path}: there is no directory {path.parent}")
    if path.exists() and not path.is_file():
        raise KvpackError(f"{path}: is not a regular file")
    if path.exists() and not force:
        raise KvpackError(f"{path}: exists already; use -f to overwrite it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise KvpackError(f"{path}: the directory {path.parent} cannot be written")


@contextmanager
def atomic_output(path: Path, *, force: bool = False, mode: int | None = None) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes ``path`` if the ``with`` block succeeds, and is deleted if it fails.

    The file is written under a temporary name in the same directory, flushed to disk, then renamed. It gets the
    permissions ``mode``, or without one those of any new file there. If it replaces a file, it gets no permission that
    the file did not give.

    Raises:
        KvpackError: :func:`check_output` refuses the path.
        OSError: The system cannot write. Its ``filename`` is ``path``, and if the disk is full, its text says how many
            bytes are needed and how many are free.

    """
    check_output(path, force=force)
    handle, temporary = create_beside(path, 0o666 if mode is None else 0o600)
    file = os.fdopen(handle, "wb")
    try:
        with writing(path, handle):
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(handle)
            _permit(handle, path, mode)
            if os.name == "nt":  # There an open file cannot be renamed; elsewhere its lock is held until it is.
                file.close()
            if force:
                temporary.replace(path)
            else:
                _rename_new(temporary, path)
    finally:
        settle(temporary)
        with suppress(OSError):  # Everything is on the disk already, or there is another error.
            file.close()


@contextmanager
def writing(path: Path, handle: int | None = None) -> Iterator[None]:
    """Let errors of the system that name no file name ``path``.

    If the disk is full, they say how many bytes of the open file ``handle`` have been written and how many are free.
    """
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        told = error if handle is None else _explained(error, handle)
        raise OSError(error.errno, told.strerror, str(path)) from None


def no_space(error: OSError, handle: int, needed: str) -> OSError:
    """Return an error that says how many bytes are ``needed`` and free, if ``error`` is that the disk is full."""
    if error.errno not in _FULL or error.filename or error.strerror != os.strerror(error.errno):
        return error
    free = ""
    if hasattr(os, "fstatvfs"):
        state = os.fstatvfs(handle)
        free = f", {state.f_bavail * state.f_frsize} are free"
    return OSError(error.errno, f"{error.strerror}: {needed} bytes needed{free}")


def _explained(error: OSError, handle: int) -> OSError:
    state = os.fstat(handle)
    written = min(state.st_size, 512 * state.st_blocks) if hasattr(state, "st_blocks") else state.st_size
    return no_space(error, handle, f"more than {written}")


def _permit(handle: int, path: Path, mode: int | None) -> None:
    """Give a file its permissions: ``mode``, or those it has, but none that the file ``path`` does not give."""
    if not hasattr(os, "fchmod"):
        return
    wanted = own = stat.S_IMODE(os.fstat(handle).st_mode)
    if mode is not None:
        wanted = mode & 0o777
    if path.exists():
        wanted &= stat.S_IMODE(path.stat().st_mode)
    if wanted != own:
        with suppress(OSError):  # The file system has no permissions; what is created is no wider than it may be.
            os.fchmod(handle, wanted)


def restrict(file: BinaryIO, mode: int) -> None:
    """Take from a file that :func:`atomic_output` gave the permissions that ``mode`` does not have."""
    if hasattr(os, "fchmod"):
        os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & mode)


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


def _rename_new(source: Path, target: Path) -> None:
    """Rename a file, but never replace one that has appeared under the new name meanwhile."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise KvpackError(f"{target}: exists already; use -f to overwrite it") from None
    except OSError:  # The file system has no hard links.
        source.replace(target)

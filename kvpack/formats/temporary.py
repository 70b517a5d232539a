"""Temporary files: their names, who holds them, and what processes that were killed have left behind.

There are two kinds. What becomes an output is ``.NAME.XXXXXXXX.tmp`` beside it, and the process that writes it holds
its lock (``flock``), which the system releases when the process ends, however it ends. So a file of such a name that
nobody holds was left behind. Everything else is a file without a name, of which nothing can be left.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

if sys.platform != "win32":
    import fcntl

_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)
_LONGEST = 100
"""The most bytes of an output's name that its temporary file's name holds; a file system takes 255 or fewer in all."""

_live: set[Path] = set()
"""Temporary files of this process that have a name."""


def create_beside(path: Path, mode: int = 0o666) -> tuple[int, Path]:
    """Create an empty file with an unused name in the folder of ``path``, lock it, and open it for writing.

    Errors of the system name ``path``. The kernel gives the file ``mode`` without the bits of the umask.
    ``tempfile.mkstemp`` would make it private, and to undo that one has to know the umask, which can be read only by
    changing it for all threads of the process.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    stem = os.fsencode(path.name)[:_LONGEST].decode(errors="ignore")
    while True:
        temporary = path.with_name(f".{stem}.{secrets.token_hex(4)}.tmp")
        _live.add(temporary)  # before it is there, so that a signal finds it whenever it comes
        try:
            handle = os.open(temporary, flags, mode)
        except FileExistsError:
            _live.discard(temporary)
            continue
        except OSError as error:
            _live.discard(temporary)
            raise OSError(error.errno, error.strerror, str(path)) from None
        if _locked(handle):
            return handle, temporary
        os.close(handle)  # somebody took it for a leftover before it was locked, and removed it


def _locked(handle: int) -> bool:
    """Lock a new file, and return whether it still has its name. Where nothing can be locked, that is not an error."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
    return os.fstat(handle).st_nlink > 0


def settle(temporary: Path) -> None:
    """Forget a temporary file, because it has become an output or is removed; remove it if it is still there."""
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    _live.discard(temporary)


def discard_all() -> None:
    """Remove all temporary files of this process: for a process that must end at once."""
    for temporary in tuple(_live):
        with contextlib.suppress(OSError):
            temporary.unlink()


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary files in ``folder`` that nobody holds, because the process that wrote them was killed."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if _NAME.fullmatch(entry.name))
    except OSError:
        return []
    return [folder / name for name in names if folder / name not in _live and _held(folder / name) is False]


def remove_leftover(path: Path) -> bool:
    """Remove a leftover, unless a process holds it now, and return whether it was removed."""
    return _held(path, remove=True) is False


def _held(path: Path, *, remove: bool = False) -> bool | None:
    """Return whether a process holds a temporary file; None if that cannot be told. ``remove`` it if none does."""
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if remove:
            path.unlink()
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


@contextmanager
def scratch() -> Iterator[tuple[BinaryIO, Path]]:
    """Yield an empty file in the folder for temporary files, and a path by which this process can open it.

    It has no name of its own, so nothing is left of it, however the process ends. An error of the system while it is
    written names the folder.
    """
    folder = tempfile.gettempdir()
    try:
        with _nameless() as (file, path):
            yield file, path
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        advice = f"{error.strerror}, for a temporary file; TMPDIR names another folder"
        raise OSError(error.errno, advice, folder) from None


@contextmanager
def _nameless() -> Iterator[tuple[BinaryIO, Path]]:
    if os.path.exists("/dev/fd"):
        with tempfile.TemporaryFile(prefix="kvpack-") as file:
            yield cast(BinaryIO, file), Path(f"/dev/fd/{file.fileno()}")
    else:
        with tempfile.NamedTemporaryFile(prefix="kvpack-") as named:
            yield cast(BinaryIO, named), Path(named.name)

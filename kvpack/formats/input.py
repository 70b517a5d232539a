"""Read input files by position, so that a file that shrinks or fails meanwhile is an error and not a signal.

A mapped file that another process truncates ends the process that reads it (SIGBUS). So files are read by ``pread``,
range by range, into memory of their own. This module uses only the standard library.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
import weakref
from pathlib import Path
from typing import Any, Protocol

from kvpack.errors import KvpackError, TruncatedError

ONCE = 1 << 30
"""The most bytes that the system is asked for at a time."""


_HASHED = 1 << 20


class Source(Protocol):
    """Bytes that are read by position: of a file, or in memory. Any number of threads may read.

    ``size`` is their number. ``mode`` are the permissions of the file, or None if there is none.
    """

    size: int
    mode: int | None

    def read(self, start: int, stop: int) -> memoryview:
        """Return the bytes ``[start, stop)``.

        Raises:
            OSError: The system cannot read them; its ``filename`` is the file's name.
            TruncatedError: The file has become shorter since it was opened.

        """

    def read_into(self, start: int, target: Any) -> None:
        """Fill ``target``, a contiguous buffer that can be written, with the bytes from ``start``. See :meth:`read`."""


class Memory:
    """Bytes in memory. What :meth:`read` returns are views of them."""

    mode: int | None = None

    def __init__(self, view: memoryview) -> None:
        """Wrap ``view``, a row of bytes."""
        self.view, self.size = view, len(view)

    def read(self, start: int, stop: int) -> memoryview:
        """Return a view of the bytes ``[start, stop)``."""
        return self.view[start:stop]

    def read_into(self, start: int, target: Any) -> None:
        """Copy the bytes from ``start`` to ``target``."""
        room = memoryview(target).cast("B")
        room[:] = self.view[start : start + len(room)]


class InputFile:
    """A regular file that is open for reading. It is closed when nobody uses it any more."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Open ``path``. Messages call it ``name`` if that is given.

        Raises:
            OSError: The file cannot be opened.
            KvpackError: It is not a regular file. A named pipe or a device is not even opened, since that may block.

        """
        self.name = name or str(path)
        require_regular(path.stat().st_mode, self.name)
        # Without O_NONBLOCK a named pipe that has taken the file's place just now would block.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        self._file = os.open(path, flags)
        weakref.finalize(self, os.close, self._file)
        state = os.fstat(self._file)
        require_regular(state.st_mode, self.name)
        self.size = state.st_size
        self.mode: int | None = stat.S_IMODE(state.st_mode)

    def read(self, start: int, stop: int) -> memoryview:
        """Return the bytes ``[start, stop)``. See :meth:`Source.read`."""
        first = self._some(stop - start, start)
        if len(first) == stop - start:
            return memoryview(first)
        whole = bytearray(stop - start)
        whole[: len(first)] = first
        self.read_into(start + len(first), memoryview(whole)[len(first) :])
        return memoryview(whole).toreadonly()

    def read_into(self, start: int, target: Any) -> None:
        """Fill ``target`` with the bytes from ``start``. See :meth:`Source.read_into`."""
        room = memoryview(target).cast("B")
        while len(room):
            count = self._fill(room[:ONCE], start)
            start, room = start + count, room[count:]

    def sha256(self) -> str:
        """Return the SHA-256 of the whole file in hexadecimal digits. The errors are those of :meth:`read`."""
        digest = hashlib.sha256()
        for at in range(0, self.size, _HASHED):
            digest.update(self.read(at, min(at + _HASHED, self.size)))
        return digest.hexdigest()

    def _some(self, count: int, at: int) -> bytes:
        """Read at most ``count`` bytes, and at least one if ``count`` is not 0."""
        try:
            found = _pread(self._file, min(count, ONCE), at)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None
        if count and not found:
            raise self._shorter(at)
        return found

    def _fill(self, room: memoryview, at: int) -> int:
        """Read at least one byte to ``room``, and return how many were read."""
        if not hasattr(os, "preadv"):
            found = self._some(len(room), at)
            room[: len(found)] = found
            return len(found)
        try:
            count = os.preadv(self._file, [room], at)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None
        if not count:
            raise self._shorter(at)
        return count

    def _shorter(self, at: int) -> TruncatedError:
        size = f"{self.size} bytes when it was opened, {os.fstat(self._file).st_size} now"
        return TruncatedError(f"{self.name}: has become shorter while it was read ({size}; nothing at byte {at})")


if hasattr(os, "pread"):
    _pread = os.pread
else:  # This system has one position for each open file, which threads take turns to move.
    _LOCK = threading.Lock()

    def _pread(file: int, count: int, at: int, /) -> bytes:
        with _LOCK:
            os.lseek(file, at, os.SEEK_SET)
            return os.read(file, count)


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular(mode: int, name: str) -> None:
    """Check by ``mode``, as ``stat`` gives it, that something is a regular file. The message calls it ``name``.

    Raises:
        KvpackError: It is something else; the message says what and how to give its contents all the same.

    """
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a directory, not a file", name)
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise KvpackError(f"{name}: is {kind}, not a regular file: give - and its contents on standard input")


def source_of(data: Source | memoryview | bytes) -> Source:
    """Return bytes in memory as a source, and a source as it is."""
    return Memory(memoryview(data).cast("B")) if isinstance(data, bytes | bytearray | memoryview) else data


def read_file(path: Path) -> bytes:
    """Return the contents of a small regular file. The errors are those of :class:`InputFile`."""
    file = InputFile(path)
    return bytes(file.read(0, file.size))

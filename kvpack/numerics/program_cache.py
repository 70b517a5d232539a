"""Compiled code on disk, so that a kernel or loop is compiled once on a machine and not once in every process.

Every program is one file, named by the SHA-256 of everything that its machine code depends on. Whatever is wrong with a
file or a folder, the program is compiled as if there were no cache; no function of this module raises an ``OSError``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 256 << 20
"""Total size of a cache's files in bytes; the files that were not used for the longest time are deleted above it."""

ABANDONED_SECONDS = 3600
"""Age at which an unfinished file must have been left behind by a process that was killed."""

_MAGIC = b"kvpack-cubin-1\n\0"
_DIGEST_BYTES = hashlib.sha256().digest_size
_UNFINISHED = ".tmp"


def default_folder(environment: Mapping[str, str] = os.environ, name: str = "kernels") -> Path | None:
    """Return the folder of the cache, which need not exist; None if there is no place for one.

    It is ``$KVPACK_CACHE_DIR``, else ``$XDG_CACHE_HOME/kvpack/NAME``, else ``~/.cache/kvpack/NAME``. An empty
    variable counts as not set, and so does a relative ``$XDG_CACHE_HOME``, as the XDG specification demands.
    """
    own, shared = environment.get("KVPACK_CACHE_DIR", ""), environment.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own)
    if os.path.isabs(shared):
        return Path(shared) / "kvpack" / name
    try:
        return Path.home() / ".cache" / "kvpack" / name
    except RuntimeError:  # the user has no home folder
        return None


def program_key(source: str, options: tuple[str, ...], compiler: str, driver: str) -> str:
    """Return the name of a program: the SHA-256, in hexadecimal, of everything that its machine code depends on.

    Args:
        source: the complete source text.
        options: the compiler's options, among them all ``-D`` and the architecture; their order counts.
        compiler: the compiler's name and version.
        driver: the driver's version.

    """
    return hashlib.sha256(json.dumps([source, options, compiler, driver]).encode()).hexdigest()


@dataclass(frozen=True)
class ProgramCache:
    """Programs in the files of a folder; with the folder None nothing is kept.

    A program is machine code that runs with this user's rights. A folder that its group or other users may write to is
    therefore not used at all, and a file is only loaded if it belongs to this user and nobody else may write to it.
    ``suffix`` tells this cache's files from those of others in the folder.
    """

    folder: Path | None
    suffix: str = ".cubin"
    max_bytes: int = MAX_BYTES

    def get(self, key: str, build: Callable[[], bytes]) -> bytes:
        """Return the program with this :func:`program_key`: from its file, else from ``build``, which is then kept.

        Several threads and processes may do this at once. Each then has a complete program, which may have been built
        more than once. What ``build`` raises is not caught.
        """
        found = self.find(key)
        if found is None:
            found = build()
            self.keep(key, found)
        return found

    def find(self, key: str) -> bytes | None:
        """Return the program with this key from its file; None if there is none that is sound and can be trusted."""
        if self.folder is None or not _is_trusted_folder(self.folder):
            return None
        path = self.folder / f"{key}{self.suffix}"
        try:
            # O_NONBLOCK keeps a named pipe from blocking. The rights of the file that is open are those that count.
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                if not _is_trusted_file(os.fstat(file.fileno())):
                    return None
                program = _unwrapped(file.read(), key)
                if program is not None:
                    with contextlib.suppress(OSError):  # a folder that is only read is fine, too
                        os.utime(file.fileno())  # this program was used just now
                return program
        except OSError:
            return None

    def keep(self, key: str, program: bytes) -> None:
        """Write a program to its file, if that is possible."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_trusted_folder(self.folder):
                return
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=_UNFINISHED)  # only this user may read or write it
            try:
                with open(handle, "wb") as file:
                    file.write(_wrapped(program, key))
                os.replace(name, self.folder / f"{key}{self.suffix}")
            except BaseException:
                os.unlink(name)
                raise
            self._shrink()

    def _shrink(self) -> None:
        """Delete the files that were not used for the longest time, and unfinished files that were left behind."""
        assert self.folder is not None
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process may delete files, too
                status = path.lstat()
                if path.suffix == self.suffix:
                    files.append((status.st_mtime_ns, status.st_size, path))
                elif path.suffix == _UNFINISHED and status.st_mtime < time.time() - ABANDONED_SECONDS:
                    path.unlink()
        excess = sum(size for _, size, _ in files) - self.max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            excess -= size


def _is_trusted_folder(folder: Path) -> bool:
    """Whether the folder belongs to this user and neither its group nor other users may write to it."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and _is_only_ours(status)


def _is_trusted_file(status: os.stat_result) -> bool:
    """Whether this is a regular file of this user that neither its group nor other users may write to."""
    return stat.S_ISREG(status.st_mode) and _is_only_ours(status)


def _is_only_ours(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _digest(program: bytes, key: str) -> bytes:
    return hashlib.sha256(key.encode() + program).digest()


def _wrapped(program: bytes, key: str) -> bytes:
    """Return a file's contents: a magic number, a hash by which damage is noticed, and the program."""
    return _MAGIC + _digest(program, key) + program


def _unwrapped(content: bytes, key: str) -> bytes | None:
    """Return the program in a file's contents; None if they are damaged, cut off or of another program."""
    head = len(_MAGIC) + _DIGEST_BYTES
    program = content[head:]
    sound = content[:head] == _MAGIC + _digest(program, key)
    return program if sound and program else None

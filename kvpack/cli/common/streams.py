"""Standard input and output, which commands take as ``-``, and files that appear whole."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from kvpack.cli.common.targets import STDIO, Read, permissions, remark_leftovers
from kvpack.errors import UsageError
from kvpack.formats.input import read_file
from kvpack.formats.output import atomic_output
from kvpack.formats.temporary import scratch


@contextmanager
def readable(path: Path) -> Iterator[Path]:
    """Yield ``path`` itself, or a temporary file with the contents of standard input."""
    if path != STDIO:
        remark_leftovers(path.parent)
        yield path
        return
    with scratch() as (file, place):
        while piece := _received():
            file.write(piece)
        file.flush()
        yield place


def _received() -> bytes:
    """Return some more bytes of standard input, or none at its end."""
    with naming_system("standard input"):
        return sys.stdin.buffer.read(1 << 20)


def read_bytes(path: Path) -> bytes:
    """Return the contents of a file, or of standard input for ``-``."""
    return sys.stdin.buffer.read() if path == STDIO else read_file(path)


@contextmanager
def writable(path: Path, force: bool, read: Read = ()) -> Iterator[BinaryIO]:
    """Yield a file that appears whole or not at all, or standard output if that is not a terminal.

    The file has the permissions of what is ``read`` to make it.
    """
    if path != STDIO:
        with atomic_output(path, force=force, mode=permissions(read)) as file:
            yield file
        return
    if sys.stdout.isatty():
        raise UsageError("refusing to write binary data to a terminal: use -o FILE or a pipe")
    with naming_system("standard output"):
        yield cast(BinaryIO, _Pipe(sys.stdout.buffer))
        sys.stdout.buffer.flush()


@contextmanager
def naming_system(name: str) -> Iterator[None]:
    """Let errors of the system that name no file say ``name``. A pipe that nobody reads any more stays what it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, name) from None


class _Pipe(io.RawIOBase):
    """Standard output, written in order even if it is a file, because other programs may append to that file."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._output.write(data)

"""Turn exceptions into messages of one line and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress

from kvpack.cache.untrusted import printable
from kvpack.errors import KvpackError


def describe(error: Exception, name: str | None = None) -> tuple[str, int]:
    """Return the message and the exit code for an error. ``name`` is the file that was worked on, if it was one.

    With ``KVPACK_DEBUG`` in the environment, its traceback is printed on stderr.
    """
    if os.environ.get("KVPACK_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, KvpackError):
        return _named(str(error), name), error.exit_code
    if isinstance(error, MemoryError):
        return _named("out of memory", name), 1
    if isinstance(error, OSError):
        if error.filename:
            return f"{error.filename}: {error.strerror}", 1
        return f"{name or _unnamed(error)}: {error.strerror or error}", 1
    text = _named(f"internal error: {error!r}", name)
    return f"{text}; please report it, with what kvpack prints when KVPACK_DEBUG=1 is set", 1


def _named(text: str, name: str | None) -> str:
    return text if name is None or name in text else f"{name}: {text}"


def complain(message: str) -> None:
    """Print a message as one line on stderr, with control characters escaped."""
    sys.stderr.write(f"kvpack: {printable(' '.join(message.split()))}\n")


def _unnamed(error: OSError) -> str:
    """Return what an error is about that names no file: standard output, if what prints there has raised it."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    printing = bool(frames) and frames[-1].split(".")[0] in ("click", "rich", "typer")
    if printing:
        let_go_of_output()
    return "standard output" if printing else "the system"


def let_go_of_output() -> None:
    """Let nothing that could not be written to standard output be tried again when Python ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Turn exceptions into messages of one line and exit codes."""

from __future__ import annotations

import os
import sys

from kvpack.cache.untrusted import printable
from kvpack.errors import KvpackError


def describe(error: Exception, name: str | None = None) -> tuple[str, int]:
    """Return the message and the exit code for an error. ``name`` is the file that was worked on, if it was one.

    With ``KVPACK_DEBUG`` in the environment, an error that is a bug is raised again instead, with its traceback.
    """
    if isinstance(error, KvpackError):
        return _named(str(error), name), error.exit_code
    if isinstance(error, MemoryError):
        return _named("out of memory", name), 1
    if isinstance(error, OSError):
        if error.filename:
            return f"{error.filename}: {error.strerror}", 1
        return _named(str(error.strerror or error), name), 1
    if os.environ.get("KVPACK_DEBUG"):
        raise error
    text = _named(f"internal error: {error!r}", name)
    return f"{text}; set KVPACK_DEBUG=1 to see where, and please report it", 1


def _named(text: str, name: str | None) -> str:
    return text if name is None or name in text else f"{name}: {text}"


def complain(message: str) -> None:
    """Print a message as one line on stderr, with control characters escaped."""
    sys.stderr.write(f"kvpack: {printable(' '.join(message.split()))}\n")

"""Errors by what the user should do, each with its own exit code, and the table of exit codes.

::

    KvpackError                 1   something failed; the message says what
    |-- UsageError              2   wrong options or arguments
    |-- QualityError            3   quality below the asked threshold
    |-- FormatError             4   not a file of the expected kind, or its contents break the format
    |   |-- CorruptError        4   a checksum or digest does not match
    |   `-- TruncatedError      4   the file ends early
    |-- MismatchError           5   wrong model, profile, or original for this file, or a malformed profile
    |-- UnsupportedError        6   made by a newer kvpack, or by a model with layers kvpack cannot represent
    `-- NotStoredError          7   the store has no prefix of the prompt

Exit code 0 is success, and :data:`EXIT_CODES` has all. Library callers catch :class:`KvpackError`; the command line
prints its text as one line on stderr and exits with ``exit_code``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

EXIT_CODES = {
    0: "success",
    1: "a failure: a file is missing, exists already, or cannot be read or written; no space; no memory",
    2: "wrong usage",
    3: "quality below a threshold that was set",
    4: "an input that is corrupt, truncated, or not such a file",
    5: "wrong model, profile or original, or a malformed profile",
    6: "needs a newer kvpack, or a kind of model that kvpack cannot represent",
    7: "the store has no prefix of the prompt",
    129: "ended by SIGHUP",
    130: "ended by SIGINT",
    143: "ended by SIGTERM",
}
"""What each exit code of the command line means. README.md and ``kvpack --help`` have the same table."""


class KvpackError(Exception):
    """Base of every error kvpack raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(KvpackError):
    """Wrong options or arguments; the message says which are right."""

    exit_code: ClassVar[int] = 2


class QualityError(KvpackError):
    """The measured quality is below a threshold the caller set."""

    exit_code: ClassVar[int] = 3


class FormatError(KvpackError):
    """Not a file of the expected kind, or its contents break the format's rules."""

    exit_code: ClassVar[int] = 4


class CorruptError(FormatError):
    """A checksum or a digest does not match the bytes it covers."""


class TruncatedError(FormatError):
    """The file ends before its contents do."""


class MismatchError(KvpackError):
    """The model, profile or original given is not the one this file was made with."""

    exit_code: ClassVar[int] = 5


class UnsupportedError(KvpackError):
    """Needs a newer kvpack, or holds a kind of layer that kvpack cannot represent yet."""

    exit_code: ClassVar[int] = 6


class NotStoredError(KvpackError):
    """The store holds no prefix of the prompt that was asked for."""

    exit_code: ClassVar[int] = 7


@contextmanager
def naming(name: str | None) -> Iterator[None]:
    """Put the name of the file that is worked on before the messages of errors, if there is a name."""
    try:
        yield
    except KvpackError as error:
        if name is None:
            raise
        if str(error).startswith(f"{name}: "):
            raise
        raise type(error)(f"{name}: {error}") from None

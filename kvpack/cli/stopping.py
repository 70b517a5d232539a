"""SIGINT, SIGTERM and SIGHUP end a command as an error does: temporary files are removed, then the command exits."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kvpack.formats.temporary import discard_all

GRACE = 3.0
"""Seconds that a command has to end by itself after a signal, even if its work cannot be interrupted."""

NAMES = tuple(name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """A signal asks the command to end. ``code`` is the exit code for it, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        """Take the signal's number."""
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Let the signals raise :class:`Stopped`. Those that were ignored when the command began, as by ``nohup``, stay so.

    If the command has not ended :data:`GRACE` seconds later, or another signal comes, its temporary files are removed
    and it ends at once.
    """
    stopped: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        if stopped:
            _end(stopped[0])
        stopped.append(128 + number)
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, GRACE)
        raise Stopped(number)

    every = [getattr(signal, name) for name in NAMES]
    before = {number: signal.getsignal(number) for number in every}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
    except ValueError:  # This is not the main thread, as where the command is called by another program.
        yield
        return
    try:
        yield
    except BaseException as error:
        # What a signal raises may come out as another error, as an ImportError out of a module's initialisation in C++.
        if stopped and not (isinstance(error, SystemExit) and not error.code):
            raise Stopped(stopped[0] - 128) from None
        raise
    finally:
        if not stopped:  # Otherwise the process is about to end, and until then a signal ends it at once.
            for number, handler in before.items():
                signal.signal(number, handler)


def _end(code: int) -> None:
    discard_all()
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # a progress bar may have hidden the cursor
    os._exit(code)

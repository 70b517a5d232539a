"""What people see: lines, JSON documents and progress."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from kvpack.cache.untrusted import printable

SOME = 3
"""The number of names in a message that is not to be long."""


FIRST, AGAIN = 10.0, 30.0
"""Seconds until progress is first said in a line, where there is no terminal, and from then on."""


@contextmanager
def progress_bar(title: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback ``(done, total)`` that shows progress on stderr, or None if the command is to be quiet.

    On a terminal it draws a bar. Elsewhere it prints a line now and then, if the work takes longer than some seconds.
    """
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield _Lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Progress in lines, as for a log: after :data:`FIRST` seconds, then every :data:`AGAIN` seconds."""

    def __init__(self, title: str) -> None:
        self._title, self._begin = title, time.monotonic()
        self._due = self._begin + FIRST

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._due or not 0 < done < total:
            return
        self._due = now + AGAIN
        left = (now - self._begin) * (total - done) / done
        how_long = f"{left:.0f} seconds" if left < 100 else f"{left / 60:.0f} minutes"
        say(f"kvpack: {self._title}: {done / total:.0%}, about {how_long} left", to_stderr=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print a table on stdout, the first column to the left. Nothing is cut, however narrow the terminal is."""
    lines = [list(columns), *([printable(cell) for cell in row] for row in rows)]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    if title:
        typer.echo(title)
    for number, line in enumerate(lines):
        cells = [line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))]
        text = "  ".join(cells).rstrip()
        typer.echo(text if number else typer.style(text, bold=True))


def command_line() -> list[str]:
    """Return the words of the command that runs."""
    return ["kvpack", *sys.argv[1:]]


def counted(number: int, what: str) -> str:
    """Return a number with its noun: ``1 part``, ``2 parts``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def listed(names: Sequence[str], every: bool = False) -> str:
    """Return names with commas between them, of more than three only the first three and their number."""
    if every or len(names) <= SOME:
        return ", ".join(names)
    return f"{', '.join(names[:SOME])}, ... ({len(names)} in all)"


def say(message: str, *, quiet: bool = False, to_stderr: bool = False) -> None:
    """Print a result line on stdout, or a remark on stderr, with control characters escaped."""
    if not quiet:
        typer.echo(printable(message), err=to_stderr)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout, and refuse NaN and infinities."""
    typer.echo(json.dumps(document, indent=2, allow_nan=False))

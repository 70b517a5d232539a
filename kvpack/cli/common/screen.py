"""What people see: lines, JSON documents and progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from kvpack.cache.untrusted import printable


@contextmanager
def progress_bar(title: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback ``(done, total)`` that draws a bar on stderr, or None if stderr is not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def counted(number: int, what: str) -> str:
    """Return a number with its noun: ``1 part``, ``2 parts``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def say(message: str, *, quiet: bool = False, to_stderr: bool = False) -> None:
    """Print a result line on stdout, or a remark on stderr, with control characters escaped."""
    if not quiet:
        typer.echo(printable(message), err=to_stderr)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout, and refuse NaN and infinities."""
    typer.echo(json.dumps(document, indent=2, allow_nan=False))

"""Many files in one command: find them, name their outputs, go on after a bad one, and report each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack.cli import common
from kvpack.cli.failures import complain, describe
from kvpack.errors import KvpackError, UsageError

SCHEMA_VERSION = 2
"""The version of the JSON that commands for many files print: one line for each file."""

Inputs = Annotated[
    list[Path] | None,
    typer.Argument(
        help="The files to read. With -r, also folders. - is standard input.", show_default=False, metavar="[FILE]..."
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        help="Write to this file. DIR/ writes all outputs to a folder. - is standard output.",
        show_default=False,
        metavar="FILE",
        rich_help_panel=common.FILES,
    ),
]
FilesFrom = Annotated[
    Path | None,
    typer.Option(
        "--files-from",
        help="Also read the files that LIST names, one on each line. - is standard input.",
        metavar="LIST",
        rich_help_panel=common.FILES,
    ),
]
Recursive = Annotated[
    bool,
    typer.Option(
        "-r",
        "--recursive",
        help="Read all files of the right kind in folders and in the folders below them.",
        rich_help_panel=common.FILES,
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        "-j",
        "--jobs",
        min=1,
        help="Work on this many files at a time, each in a process of its own.",
        metavar="N",
        rich_help_panel=common.RUN,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Skip each input whose output is there already and holds the same data.",
        rich_help_panel=common.FILES,
    ),
]


@dataclass(frozen=True)
class FileOptions:
    """What ``compress`` and ``decompress`` have in common. The names are those of the commands' options."""

    profile: Path | None
    model: str | None
    output: str | None
    resume: bool
    force: bool
    remove: bool
    threads: int | None
    device: str
    quiet: bool


@dataclass(frozen=True)
class Item:
    """An input file, and its output: None for commands without one.

    ``name`` is the path that outputs keep below the folder of ``-o DIR/``. ``problem`` is what is wrong with the item
    before it is opened.
    """

    path: Path
    name: Path
    target: Path | None = None
    problem: KvpackError | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a file: a row for the report, an error with its exit code, or both.

    Both is the case for damaged files of which a part was saved.
    """

    path: str
    row: dict[str, Any] | None = None
    error: str | None = None
    exit_code: int = 0

    @classmethod
    def failed(cls, item: Item, error: Exception) -> Outcome:
        """Return the outcome of an item that ended with an error."""
        of_output = item.target is not None and str(error).startswith(f"{item.target}: ")
        message, code = describe(error, None if of_output else str(item.path))
        return cls(str(item.path), None, message, code)

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON types."""
        found = {"schema_version": SCHEMA_VERSION, **(self.row or {"input": self.path})}
        return found if self.error is None else {**found, "error": self.error, "exit_code": self.exit_code}


def each(items: Iterable[Item], work: Callable[[Item], Outcome]) -> Iterator[Outcome]:
    """Yield what ``work`` makes of each item, in order. An error is the outcome of its item and stops no other."""
    for item in items:
        try:
            if item.problem is not None:
                raise item.problem
            outcome = work(item)
        except BrokenPipeError:
            raise
        except Exception as error:
            outcome = Outcome.failed(item, error)
        yield outcome


def gather(
    inputs: Sequence[Path] | None, listed: Path | None, recursive: bool, suffixes: tuple[str, ...]
) -> list[Item]:
    """Return the input files in order, each once: those named, those of a list, and those in folders.

    Raises:
        UsageError: There are no files.
        OSError: The list cannot be read.

    """
    given = list(inputs or ())
    if listed == common.STDIO and common.STDIO in given:
        raise UsageError("standard input cannot be both the list of files and a file")
    if listed is not None:
        given += _names_in(listed)
    if not given:
        raise UsageError("no input files: name some, or give --files-from LIST")
    found: dict[Path, Item] = {}
    for path in given:
        for item in _below(path, suffixes) if recursive and path.is_dir() else [_item(path)]:
            found.setdefault(item.path, item)
    if not found:
        raise UsageError(f"no {' or '.join(suffixes)} files in {', '.join(map(str, given))}")
    return list(found.values())


def _item(path: Path) -> Item:
    problem = KvpackError(f"{path}: is a folder; give -r to take the files in it") if path.is_dir() else None
    return Item(path, Path(path.name), problem=problem)


def _below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Item]:
    """Yield the files in a folder and in the folders in it, sorted, and an item for each that cannot be read."""
    unreadable: list[OSError] = []
    for place, folders, names in os.walk(folder, onerror=unreadable.append):
        folders.sort()
        for name in sorted(names):
            path = Path(place, name)
            if name.endswith(suffixes):
                yield Item(path, path.relative_to(folder))
    for error in unreadable:
        path = Path(error.filename)
        yield Item(path, Path(path.name), problem=KvpackError(f"{path}: {error.strerror}"))


def _names_in(listed: Path) -> list[Path]:
    data = sys.stdin.buffer.read() if listed == common.STDIO else listed.read_bytes()
    return [Path(os.fsdecode(line)) for line in data.splitlines() if line.strip()]


def folder_of(output: str | None) -> Path | None:
    """Return the folder that the value of ``-o`` names: with a slash at its end, or a folder that is there."""
    return Path(output) if output is not None and (output.endswith("/") or Path(output).is_dir()) else None


def with_targets(items: Iterable[Item], output: str | None, name_of: Callable[[Path], Path]) -> list[Item]:
    """Give each item its output: ``output``, in the folder ``output``, or beside the input by the name of ``name_of``.

    Raises:
        UsageError: Two inputs have the same output, an output is an input, or one output is given for several inputs.

    """
    items = list(items)
    folder = folder_of(output)
    if output is not None and folder is None and len(items) > 1:
        raise UsageError(f"-o {output}: there are {len(items)} inputs; name a folder for their outputs: -o DIR/")
    placed = [_placed(item, output, folder, name_of) for item in items]
    inputs = common.Known(item.path for item in items)
    taken: dict[str, Item] = {}
    for item in placed:
        if item.target is None or item.target == common.STDIO:
            continue
        real = os.path.realpath(item.target)
        other = taken.setdefault(real, item)
        if other is not item:
            raise UsageError(f"{other.path} and {item.path} would both become {item.target}")
        common.require_unread(item.target, inputs)
    return placed


def _placed(item: Item, output: str | None, folder: Path | None, name_of: Callable[[Path], Path]) -> Item:
    if item.problem is not None:
        return item
    if output is not None and folder is None:
        return replace(item, target=Path(output))
    if item.path == common.STDIO:
        if folder is not None:
            raise UsageError("standard input has no name: give its output one with -o FILE")
        return replace(item, target=common.STDIO)
    try:
        return replace(item, target=folder / name_of(item.name) if folder else name_of(item.path))
    except KvpackError as error:
        return replace(item, problem=error)


def prepare_output(target: Path, options: FileOptions, read: common.Read) -> bool:
    """Check an output before any work, and make its folder below ``-o DIR/``. Return whether --resume may skip it.

    ``read`` is what the command reads besides its inputs, with which :func:`with_targets` compares all outputs.
    """
    if folder_of(options.output) is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    there = options.resume and target != common.STDIO and target.is_file()
    common.check_target(target, read, force=options.force or there)
    return there


def other_output(target: Path, error: KvpackError) -> KvpackError:
    """Return the error for an output that --resume finds, and that is not what the command would write."""
    return KvpackError(
        f"{target}: exists already, and is not what this command would write ({error}); use -f to overwrite it"
    )


def report(outcomes: Iterable[Outcome], show: Callable[[Outcome], None], *, as_json: bool, total: int) -> None:
    """Show each outcome that has a row when it is known, and print its error.

    After the last, exit with the largest exit code, if there were errors. With ``as_json``, one line of JSON is printed
    for each file, with ``error`` and ``exit_code`` where there is one.
    """
    failed, code = 0, 0
    for outcome in outcomes:
        if as_json:
            typer.echo(json.dumps(outcome.to_json(), allow_nan=False))
        elif outcome.row is not None:
            show(outcome)
        if outcome.error is not None:
            complain(outcome.error)
            failed, code = failed + 1, max(code, outcome.exit_code)
    if failed and total > 1:
        complain(f"{failed} of {total} files failed")
    if code:
        raise typer.Exit(code)

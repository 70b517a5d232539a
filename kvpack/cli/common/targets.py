"""What is checked of outputs before any work begins, and what killed commands have left in their folders."""

from __future__ import annotations

import functools
import operator
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvpack.cli.common.screen import say
from kvpack.errors import UsageError
from kvpack.formats.output import check_output
from kvpack.formats.temporary import leftovers

STDIO = Path("-")
"""Standard input or output, where a command takes a path."""

Read = Iterable[Path | str | None]
"""What a command reads besides standard input: files, folders of models, and values of options that may be neither."""
_remarked: set[Path] = set()
"""The folders whose leftovers were named."""


def check_streams(pairs: Sequence[tuple[Path, Path | None]], *, keep: bool, remove: bool, as_json: bool) -> None:
    """Refuse options that contradict each other. ``pairs`` are inputs with their outputs, which may be ``-``."""
    to_stdout = any(target == STDIO for _, target in pairs)
    if as_json and to_stdout:
        raise UsageError("--json and the file itself cannot both go to standard output")
    if keep and remove:
        raise UsageError("--keep and --rm contradict each other")
    if remove and (to_stdout or any(path == STDIO for path, _ in pairs)):
        raise UsageError("--rm needs files, not standard input or output")


class Known:
    """Files and folders that a command reads, found by what they are and not by their names."""

    def __init__(self, read: Read) -> None:
        """Take what is there of ``read``."""
        self.paths: dict[tuple[int, int], Path] = {}
        for path in _paths(read):
            self.paths.setdefault(_identity(path), path)
        self.folders = {path.resolve(): path for path in self.paths.values() if path.is_dir()}


def require_unread(target: Path, known: Known) -> None:
    """Refuse an output that the command reads, or that lies in a folder that it reads.

    Raises:
        UsageError: It is one.

    """
    if target == STDIO or not target.exists():
        return
    path = known.paths.get(_identity(target))
    if path is not None:
        raise UsageError(f"{target}: the command reads this file ({path}); name another output")
    for folder in target.resolve().parents if known.folders else ():
        if folder in known.folders:
            raise UsageError(f"{target}: is a file of {known.folders[folder]}, which the command reads; name another")


def _identity(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def check_target(target: Path, read: Read, *, force: bool) -> None:
    """Refuse an output that cannot be written, or that is something the command reads; name what kills have left there.

    Every command calls this for each of its outputs before it begins any work. Standard output is never refused.

    Raises:
        UsageError: The output is an input, the profile, or a file of the model.
        KvpackError: :func:`kvpack.formats.output.check_output` refuses it.

    """
    if target == STDIO:
        return
    require_unread(target, Known(read))
    check_output(target, force=force)
    remark_leftovers(target.parent)


def check_different(target: Path, others: Iterable[Path | None]) -> None:
    """Refuse an output that is another output of the same command.

    Raises:
        UsageError: It is.

    """
    if any(other is not None and target.absolute() == other.absolute() for other in others):
        raise UsageError(f"{target}: two outputs cannot have one name")


def remark_leftovers(folder: Path) -> None:
    """Name on stderr what killed commands have left in a folder, once in a command."""
    process = sys.modules.get("multiprocessing.process")  # importing it would only delay commands without workers
    if folder in _remarked or (process is not None and process.parent_process() is not None):
        return
    _remarked.add(folder)
    found = [path for place in places(folder) for path in leftovers(place)]
    if found:
        names = ", ".join(str(path) for path in found[:3]) + (", ..." if len(found) > 3 else "")
        what = "is a temporary file" if len(found) == 1 else f"are {len(found)} temporary files"
        line = f"kvpack: {names}: {what} of a command that was killed; kvpack clean {folder} removes such files"
        say(line, to_stderr=True)


def places(folder: Path) -> list[Path]:
    """Return where in a folder temporary files may lie: in the folder itself, or in a store's own place for them."""
    return [folder, folder / "tmp"] if (folder / "store.json").is_file() else [folder]


def _paths(read: Read) -> list[Path]:
    """Return what is there of what a command reads."""
    return [Path(one) for one in read if one is not None and str(one) != str(STDIO) and Path(one).exists()]


def permissions(read: Read) -> int | None:
    """Return the permissions that all these files have, None if none is there: outputs get those of their inputs."""
    modes = [stat.S_IMODE(path.stat().st_mode) for path in _paths(read) if path.is_file()]
    return functools.reduce(operator.and_, modes) if modes else None

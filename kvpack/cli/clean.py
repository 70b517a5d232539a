"""The command ``kvpack clean``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpack.cli import common
from kvpack.errors import KvpackError
from kvpack.formats.temporary import leftovers, remove_leftover


def clean(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="The folders to look in, which may be stores (default: the current one).",
            show_default=False,
            metavar="[DIR]...",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing: list what would be removed.")] = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Remove temporary files that killed commands left behind.

    A command writes to a temporary file beside its output, named .NAME.XXXXXXXX.tmp, and removes it even when it fails.
    Only a command that is killed cannot. Files that a running command is writing are not touched.
    """
    rows = []
    for folder in folders or [Path()]:
        if not folder.is_dir():
            raise KvpackError(f"{folder}: is not a folder")
        for path in (path for place in common.places(folder) for path in leftovers(place)):
            size = path.stat().st_size
            if dry_run or remove_leftover(path):
                rows.append({"path": str(path), "size": size})
                if not as_json:
                    common.say(f"{'left behind' if dry_run else 'removed'}: {path}, {size} bytes", quiet=quiet)
    if as_json:
        common.print_json({"schema_version": 1, "removed": not dry_run, "files": rows})
    elif not rows:
        common.say("nothing was left behind", quiet=quiet)

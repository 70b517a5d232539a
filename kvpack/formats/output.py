"""Output files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from kvpack.errors import KvpackError


def check_output(path: Path, *, force: bool = False) -> None:
    """Say now, before any work, that ``path`` cannot be written.

    Raises:
        KvpackError: its directory is missing, it is not a regular file, or it exists and ``force`` is not set.

    """
    if not path.parent.is_dir():
        raise KvpackError(f"{path}: there is no directory {path.parent}")
    if path.exists() and not path.is_file():
        raise KvpackError(f"{path}: is not a regular file")
    if path.exists() and not force:
        raise KvpackError(f"{path}: exists already; use -f to overwrite it")


@contextmanager
def atomic_output(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """A binary file that becomes ``path`` when the block ends well, and vanishes when it does not.

    Written as a temporary sibling, flushed to disk, then renamed.

    Raises:
        KvpackError: as :func:`check_output`.

    """
    check_output(path, force=force)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        if force:
            Path(name).replace(path)
        else:
            _rename_new(Path(name), path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _rename_new(source: Path, target: Path) -> None:
    """Rename without ever replacing a file that appeared meanwhile."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise KvpackError(f"{target}: exists already; use -f to overwrite it") from None
    except OSError:  # a file system without hard links
        source.replace(target)
        return
    source.unlink()

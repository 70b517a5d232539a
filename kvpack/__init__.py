"""kvpack: a compressor for saved KV caches of language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from kvpack.codecs.model import LanguageModel
    from kvpack.jobs.opened import Opened
    from kvpack.profiles import Profile

__all__ = ["__version__", "open"]

__version__ = "0.1.0"


def open(path: str | Path, profile: str | Path | Profile | None = None, model: LanguageModel | None = None) -> Opened:
    """Open a capture or a ``.kvp`` file, with the calibration profile or the model that it needs.

    This is :func:`kvpack.jobs.opened.open_file`, which is imported only when it is called.

    Raises:
        FormatError: The file is neither a capture nor a ``.kvp`` file, or it is damaged.
        MismatchError: The file needs another profile.

    """
    from kvpack.jobs.opened import open_file

    return open_file(path, profile, model)

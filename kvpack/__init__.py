"""kvpack: a compressor for saved KV caches of language models."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def open(path: Any, profile: Any = None) -> Any:
    """A capture or a ``.kvp`` file: :func:`kvpack.jobs.opened.open_file`, imported when it is called."""
    return import_module("kvpack.jobs.opened").open_file(path, profile)

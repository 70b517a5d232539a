"""Puts the modules that fuzzing shares with other tests on the path, and knows whether atheris is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent, HERE.parent / "attacks", HERE.parent.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def guided() -> bool:
    """Return whether libFuzzer can choose inputs."""
    return importlib.util.find_spec("atheris") is not None

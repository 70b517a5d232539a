"""CUDA sources as one text, because the run-time compiler reads no files: included files are put in their place."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from kvpack.gpu.kernels.constants import constants_of

KERNELS = Path(__file__).parent.parent / "kernels"
_INCLUDE = re.compile(r'^#include "([a-z_]+\.cuh)"$', re.MULTILINE)


@cache
def source_of(name: str) -> str:
    """Return the complete text of one CUDA source.

    The text begins with a ``#define`` for each constant that the folder shares with Python
    (``kvpack/gpu/kernels/constants.py``) and with ``common.cuh``. An included file is looked for in the source's own
    folder first, then in ``kernels/common``.

    Args:
        name: folder and file below ``kvpack/gpu/kernels``, without the suffix, such as ``rans/encode``.

    Raises:
        FileNotFoundError: there is no such source, or it includes a file that does not exist.

    """
    path = KERNELS / f"{name}.cu"

    def included(match: re.Match[str]) -> str:
        own, shared = path.parent / match[1], KERNELS / "common" / match[1]
        return _INCLUDE.sub(included, (own if own.exists() else shared).read_text())

    defines = "".join(f"#define {key} {value}\n" for key, value in constants_of(path.parent.name).items())
    return defines + (KERNELS / "common/common.cuh").read_text() + _INCLUDE.sub(included, path.read_text())

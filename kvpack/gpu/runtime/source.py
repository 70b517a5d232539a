"""CUDA sources as one text: what they include is put in its place, as the run-time compiler reads no files."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "kernels"
_INCLUDE = re.compile(r'^#include "([a-z_]+\.cuh)"$', re.MULTILINE)


@cache
def source_of(name: str) -> str:
    """The source ``name`` (``rans/encode``, below ``kvpack/gpu/kernels``) behind what every kernel shares.

    What it includes lies beside it or in ``kernels/common``.
    """
    path = KERNELS / f"{name}.cu"

    def included(match: re.Match[str]) -> str:
        own, shared = path.parent / match[1], KERNELS / "common" / match[1]
        return _INCLUDE.sub(included, (own if own.exists() else shared).read_text())

    return (KERNELS / "common/common.cuh").read_text() + _INCLUDE.sub(included, path.read_text())

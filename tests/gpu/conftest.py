"""The GPU that kernel tests run on, or what stands in for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import simt
import torch


@pytest.fixture(scope="session")
def gpu() -> Iterator[Any]:
    """A GPU where there is one; else the kernels run on the CPU, compiled by g++ (``simt.py``)."""
    if torch.cuda.is_available():
        from kvpack.stages.device.launch import Gpu

        yield Gpu()
    elif simt.COMPILER:
        yield simt.Emulator()
    else:
        pytest.skip("neither a GPU nor g++")

"""Stands in for a GPU: kvpack's CUDA sources compiled by g++ against ``simt.h``, launched on tensors in main memory."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from kvpack.gpu.runtime.source import source_of

COMPILER = shutil.which("g++")
HERE = Path(__file__).parent
FOLDER = Path(tempfile.gettempdir()) / "kvpack-simt"


@cache
def library(name: str, defines: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    text = source_of(name)
    text = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1 *\2 = (\1 *)simt::dynamic;", text)
    text = f'#include "{HERE / "simt.h"}"\n' + text
    digest = hashlib.sha256((text + (HERE / "simt.h").read_text() + repr(defines)).encode()).hexdigest()[:16]
    FOLDER.mkdir(exist_ok=True)
    built = FOLDER / f"{digest}.so"
    if not built.exists():
        code = FOLDER / f"{digest}.cpp"
        code.write_text(text)
        flags = [f"-D{key}={value}" for key, value in defines]
        subprocess.run(
            [
                str(COMPILER),
                "-O1",
                "-U_FORTIFY_SOURCE",  # it takes switching fibers for a fault
                "-fno-strict-aliasing",
                "-w",
                "-shared",
                "-fPIC",
                *flags,
                "-o",
                str(built),
                str(code),
            ],
            check=True,
        )
    return ctypes.CDLL(str(built))


class Emulator:
    """Launches kernels as ``kvpack.gpu.runtime.launch.Gpu`` does."""

    def __init__(self) -> None:
        self.device = "cpu"

    def side_stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def join(self) -> None:
        pass

    def launch(
        self, name: str, defines: dict[str, int], grid: tuple[int, int], block: int, shared: int, *arguments: Any
    ) -> None:
        unit, entry = name.rsplit(":", 1)
        built = library(unit, tuple(sorted(defines.items())))
        words = [a if isinstance(a, int) else a.data_ptr() if a is not None else 0 for a in arguments]
        values = (ctypes.c_uint64 * 24)(*(word & (1 << 64) - 1 for word in words))
        built.simt_launch(
            ctypes.cast(built[entry], ctypes.c_void_p),
            (ctypes.c_uint * 3)(*grid, 1),
            (ctypes.c_uint * 3)(block, 1, 1),
            values,
        )

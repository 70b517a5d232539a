"""Stands in for a GPU: kvpack's CUDA sources compiled by g++ against ``simt.h``, launched on tensors in main memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from kvpack.gpu.runtime.launch import checked_words
from kvpack.gpu.runtime.signature import signature_of
from kvpack.gpu.runtime.source import source_of

COMPILER = shutil.which("g++")
HERE = Path(__file__).parent
FOLDER = Path(tempfile.gettempdir()) / "kvpack-simt"
MAX_SHARED = 227 << 10
"""Bytes of shared memory that a block may ask for, as on an H100; ``simt.h`` has room for more."""

SANITIZE = os.environ.get("KVPACK_SIMT_SANITIZE", "").split()
"""Flags of g++ that make it check what the kernels do, such as ``-fsanitize=undefined -fno-sanitize-recover=all``."""

MAX_ARGUMENTS = 24
"""Arguments that ``simt.h`` hands to a kernel."""


@cache
def library(name: str, defines: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """Return the source ``folder/file`` as a shared library, compiled unless this was done before."""
    text = source_of(name)
    text = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1 *\2 = (\1 *)simt::dynamic;", text)
    text = f'#include "{HERE / "simt.h"}"\n' + text
    every = text + (HERE / "simt.h").read_text() + repr((defines, SANITIZE))
    digest = hashlib.sha256(every.encode()).hexdigest()[:16]
    FOLDER.mkdir(exist_ok=True)
    built = FOLDER / f"{digest}.so"
    if not built.exists():
        code = FOLDER / f"{digest}.cpp"
        code.write_text(text)
        flags = [*SANITIZE, *(f"-D{key}={value}" for key, value in defines)]
        subprocess.run(
            [
                str(COMPILER),
                "-O1",
                "-U_FORTIFY_SOURCE",  # its check of longjmp takes a switch of fibers for a fault
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
    """Launches kernels as :class:`kvpack.gpu.runtime.launch.Gpu` does, on the CPU and one thread after another."""

    def __init__(self, max_shared: int = MAX_SHARED) -> None:
        """Stand in for a GPU whose blocks may ask for ``max_shared`` bytes of dynamic shared memory."""
        self.device, self.max_shared = "cpu", max_shared

    def side_stream(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: there are no streams."""
        return nullcontext()

    def join(self) -> None:
        """Do nothing: whatever was launched is done."""

    def launch(
        self, name: str, defines: dict[str, int], grid: tuple[int, int], block: int, shared: int, *arguments: Any
    ) -> None:
        """Run a kernel, with the checks that a launch on a GPU has.

        Raises:
            RuntimeError: a block asks for more shared memory than there is.
            TypeError: the kernel takes another number of arguments, or arguments of other kinds.
            ValueError: there is no such kernel, or it is made for another number of threads.

        """
        words = checked_words(signature_of(name), block, arguments)
        if shared > self.max_shared:
            raise RuntimeError(f"{name} asks for {shared} bytes of shared memory, and there are {self.max_shared}")
        unit, entry = name.rsplit(":", 1)
        built = library(unit, tuple(sorted(defines.items())))
        built.simt_launch(
            ctypes.cast(built[entry], ctypes.c_void_p),
            (ctypes.c_uint * 3)(*grid, 1),
            (ctypes.c_uint * 3)(block, 1, 1),
            (ctypes.c_uint64 * MAX_ARGUMENTS)(*words),
        )

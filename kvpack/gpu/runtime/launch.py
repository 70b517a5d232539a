"""Compiles kvpack's CUDA sources with NVRTC and launches them by the driver, on torch's current stream.

NVRTC and the driver are called through ctypes: both come with torch's CUDA builds and NVIDIA's driver, and kvpack
needs five functions of each. torch gives the device memory, the stream and the context.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

from kvpack.errors import UnsupportedError
from kvpack.gpu.runtime.source import source_of

MAX_SHARED = 227 << 10
"""Bytes of shared memory that a block may have on compute capability 9.0; less on older ones."""

_SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_UNASKED_SHARED = 48 << 10


class Launcher(Protocol):
    """Launches kernels: on a GPU, or in tests on something that stands in for one."""

    device: str

    def launch(
        self, name: str, defines: dict[str, int], grid: tuple[int, int], block: int, shared: int, *arguments: Any
    ) -> None:
        """Run ``folder/file:function`` on ``grid`` blocks of ``block`` threads; arguments are tensors or integers."""

    def side_stream(self) -> AbstractContextManager[Any]:
        """What is launched within runs beside what the current stream is given next, until :meth:`join`."""

    def join(self) -> None:
        """The current stream waits for all that was launched within :meth:`side_stream`."""


def _nvrtc_candidates() -> Iterator[str]:
    """Names and paths of NVRTC, those of the CUDA version that torch was built for first."""
    import torch

    major = (torch.version.cuda or "").split(".")[0]
    yield f"libnvrtc.so.{major}"
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        yield from map(str, sorted(Path(folder).glob(f"*/lib/libnvrtc.so.{major}*")))
    yield "libnvrtc.so"


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    for name in _nvrtc_candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UnsupportedError("NVRTC was not found: it comes with torch's CUDA builds (libnvrtc)")


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UnsupportedError("NVIDIA's driver (libcuda) was not found") from None


def _checked(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what} failed with CUDA error {code}")


def compile_source(text: str, name: str, options: tuple[str, ...]) -> bytes:
    """Machine code of a CUDA source.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.

    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    _checked(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None), "NVRTC")
    flags = [option.encode() for option in options]
    failed = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
    size = ctypes.c_size_t()
    if failed:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{name} does not compile:\n{log.value.decode()}")
    _checked(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "NVRTC")
    image = ctypes.create_string_buffer(size.value)
    _checked(nvrtc.nvrtcGetCUBIN(program, image), "NVRTC")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


class Gpu:
    """One CUDA device: its compiled kernels, launched on torch's current stream."""

    def __init__(self, index: int = 0) -> None:
        """Of the ``index``-th device."""
        import torch

        self.index, self.device = index, f"cuda:{index}"
        self._torch = torch
        self._functions: dict[tuple[str, tuple[tuple[str, int], ...]], ctypes.c_void_p] = {}
        self._granted: dict[int, int] = {}
        self._sides: dict[int, Any] = {}
        torch.zeros(1, device=self.device)  # makes the device's context

    def side_stream(self) -> AbstractContextManager[Any]:
        """See :class:`Launcher`: a second stream that first waits for the current one."""
        side = self._side()
        side.wait_stream(self._torch.cuda.current_stream(self.index))
        context: AbstractContextManager[Any] = self._torch.cuda.stream(side)
        return context

    def join(self) -> None:
        """See :class:`Launcher`."""
        self._torch.cuda.current_stream(self.index).wait_stream(self._side())

    def _side(self) -> Any:
        current = self._torch.cuda.current_stream(self.index).cuda_stream
        if current not in self._sides:
            cuda: Any = self._torch.cuda
            self._sides[current] = cuda.Stream(self.device)
        return self._sides[current]

    @cached_property
    def _architecture(self) -> str:
        major, minor = self._torch.cuda.get_device_capability(self.index)
        return f"--gpu-architecture=sm_{major}{minor}"

    def function(self, name: str, defines: tuple[tuple[str, int], ...]) -> ctypes.c_void_p:
        """The compiled kernel ``folder/file:function``."""
        key = (name, defines)
        if key not in self._functions:
            unit, entry = name.rsplit(":", 1)
            options = (self._architecture, "-default-device", *(f"-D{k}={v}" for k, v in defines))
            image = compile_source(source_of(unit), unit, options)
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            _checked(_driver().cuModuleLoadData(ctypes.byref(module), image), f"loading {unit}")
            found = _driver().cuModuleGetFunction(ctypes.byref(function), module, entry.encode())
            _checked(found, f"finding {entry} in {unit}")
            self._functions[key] = function
        return self._functions[key]

    def launch(
        self, name: str, defines: dict[str, int], grid: tuple[int, int], block: int, shared: int, *arguments: Any
    ) -> None:
        """Run a kernel; a zero-sized grid runs nothing."""
        if not all(grid):
            return
        elsewhere = self._torch.cuda.current_device() != self.index  # asked, because setting it takes longer
        with self._torch.cuda.device(self.index) if elsewhere else nullcontext():
            function = self.function(name, tuple(sorted(defines.items())))
            if shared > max(_UNASKED_SHARED, self._granted.get(function.value or 0, 0)):
                _checked(_driver().cuFuncSetAttribute(function, _SHARED_ATTRIBUTE, shared), "asking for shared memory")
                self._granted[function.value or 0] = shared
            words = [a if isinstance(a, int) else 0 if a is None else a.data_ptr() for a in arguments]
            values = [ctypes.c_uint64(word & (1 << 64) - 1) for word in words]
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            stream = ctypes.c_void_p(self._torch.cuda.current_stream(self.index).cuda_stream)
            size = (ctypes.c_uint(n) for n in (*grid, 1, block, 1, 1, shared))
            _checked(_driver().cuLaunchKernel(function, *size, stream, pointers, None), f"launching {name}")

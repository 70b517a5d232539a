"""Launches kvpack's CUDA kernels on torch's current stream.

torch gives the device memory, the streams and the device's context; kernels are loaded and launched by NVIDIA's driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from kvpack.errors import UnsupportedError
from kvpack.gpu.runtime.compiler import check, driver, nvrtc_architectures, nvrtc_version, program
from kvpack.gpu.runtime.requirements import shared_memory_of, shortcoming_of
from kvpack.gpu.runtime.signature import Signature, signature_of

_SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_UNASKED_SHARED = 48 << 10
"""Bytes of shared memory that every kernel may use without asking the driver for more."""


class Launcher(Protocol):
    """Launches kernels: on a GPU, or in tests on something that stands in for one."""

    @property
    def device(self) -> str:
        """The name by which torch knows the device, such as ``cuda:0``."""

    @property
    def max_shared(self) -> int:
        """Bytes of shared memory that a block may ask for, static and dynamic memory together."""

    def launch(
        self, name: str, defines: dict[str, int], grid: tuple[int, int], block: int, shared: int, *arguments: Any
    ) -> None:
        """Run a kernel after everything that the current stream was given before; return without waiting for it.

        Args:
            name: the kernel, as ``folder/file:function``.
            defines: macros that its source is compiled with, besides the constants of ``kernels/constants.py``.
            grid: number of blocks in x and y; nothing runs if one is 0.
            block: number of threads of a block.
            shared: bytes of dynamic shared memory of a block.
            *arguments: tensors on this device, None for the address 0, or integers.

        Raises:
            TypeError: the kernel takes another number of arguments, or arguments of other kinds.
            ValueError: there is no such kernel, or it is made for another number of threads.

        """

    def side_stream(self) -> AbstractContextManager[Any]:
        """Return a context in which launches go to a second stream, until :meth:`join`.

        That stream first waits for what the current stream was given so far, and then runs at the same time as it.
        """

    def join(self) -> None:
        """Let the current stream wait for everything that was launched within :meth:`side_stream`."""


def checked_words(signature: Signature, block: int, arguments: tuple[Any, ...]) -> list[int]:
    """Return the words that a kernel is handed for these arguments, if the launch fits its signature.

    Raises:
        TypeError: see :meth:`Signature.words`.
        ValueError: the kernel is made for another number of threads.

    """
    if signature.threads is not None and block != signature.threads:
        raise ValueError(f"{signature.kernel} is made for blocks of {signature.threads} threads, not {block}")
    return signature.words(arguments)


class Gpu:
    """One CUDA device and its compiled kernels, which are launched on torch's current stream."""

    def __init__(self, index: int = 0) -> None:
        """Prepare the device with this number, which torch must see.

        Raises:
            UnsupportedError: the device lacks something that the kernels need, or NVRTC or the driver was not found,
                or NVRTC does not know the device.
            RuntimeError: torch cannot use the device.

        """
        import torch

        reason = shortcoming_of(index)
        if reason is not None:
            raise UnsupportedError(reason)
        self.index, self.device = index, f"cuda:{index}"
        self.max_shared = shared_memory_of(index)
        self._torch = torch
        self._architecture = _architecture_option(torch.cuda.get_device_capability(index))
        self._driver = driver()
        self._functions: dict[tuple[str, tuple[tuple[str, int], ...]], ctypes.c_void_p] = {}
        self._granted: dict[int, int] = {}
        self._sides: dict[int, Any] = {}
        torch.zeros(1, device=self.device)  # makes the device's context

    def side_stream(self) -> AbstractContextManager[Any]:
        """See :class:`Launcher`; each current stream has one side stream of its own."""
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

    def function(self, name: str, defines: tuple[tuple[str, int], ...]) -> ctypes.c_void_p:
        """Return the driver's handle of the kernel ``folder/file:function``, compiled and loaded on first use.

        Raises:
            RuntimeError: the source does not compile, or the driver cannot load it.

        """
        key = (name, defines)
        if key not in self._functions:
            unit, entry = name.rsplit(":", 1)
            options = (self._architecture, "-default-device", *(f"-D{k}={v}" for k, v in defines))
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            check(self._driver.cuModuleLoadData(ctypes.byref(module), program(unit, options)), f"loading {unit}")
            found = self._driver.cuModuleGetFunction(ctypes.byref(function), module, entry.encode())
            check(found, f"finding {entry} in {unit}")
            self._functions[key] = function
        return self._functions[key]

    def launch(
        self, name: str, defines: dict[str, int], grid: tuple[int, int], block: int, shared: int, *arguments: Any
    ) -> None:
        """See :class:`Launcher`."""
        words = checked_words(signature_of(name), block, arguments)
        if not all(grid):
            return
        elsewhere = self._torch.cuda.current_device() != self.index  # asked, because setting it takes longer
        with self._torch.cuda.device(self.index) if elsewhere else nullcontext():
            function = self.function(name, tuple(sorted(defines.items())))
            self._grant(function, shared, name)
            self._start(function, grid, block, shared, words, name)

    def _grant(self, function: ctypes.c_void_p, shared: int, name: str) -> None:
        """Ask the driver for more dynamic shared memory than a kernel has without asking."""
        if shared > max(_UNASKED_SHARED, self._granted.get(function.value or 0, 0)):
            code = self._driver.cuFuncSetAttribute(function, _SHARED_ATTRIBUTE, shared)
            check(code, f"asking for {shared} bytes of shared memory for {name}")
            self._granted[function.value or 0] = shared

    def _start(
        self, function: ctypes.c_void_p, grid: tuple[int, int], block: int, shared: int, words: Sequence[int], name: str
    ) -> None:
        values = [ctypes.c_uint64(word) for word in words]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(self._torch.cuda.current_stream(self.index).cuda_stream)
        size = (ctypes.c_uint(n) for n in (*grid, 1, block, 1, 1, shared))
        check(self._driver.cuLaunchKernel(function, *size, stream, pointers, None), f"launching {name}")


def _architecture_option(capability: tuple[int, int]) -> str:
    """Return NVRTC's option that compiles for a GPU of this compute capability.

    Raises:
        UnsupportedError: NVRTC was not found, or it does not know such GPUs.

    """
    major, minor = capability
    if 10 * major + minor not in nvrtc_architectures():
        raise UnsupportedError(f"{nvrtc_version()} does not know GPUs of compute capability {major}.{minor}")
    return f"--gpu-architecture=sm_{major}{minor}"

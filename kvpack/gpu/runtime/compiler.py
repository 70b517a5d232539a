"""Machine code of kvpack's CUDA sources, compiled by NVRTC at run time and kept on disk.

NVRTC and NVIDIA's driver are called through ctypes: NVRTC comes with torch's CUDA builds, and kvpack needs only a few
functions of each.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from kvpack.errors import UnsupportedError
from kvpack.gpu.runtime.source import source_of
from kvpack.numerics.program_cache import ProgramCache, default_folder, program_key


def program(unit: str, options: tuple[str, ...], cache: ProgramCache | None = None) -> bytes:
    """Return the machine code (cubin) of the source ``folder/file``: from the cache on disk, else compiled.

    Args:
        unit: the source below ``kvpack/gpu/kernels``, without the suffix.
        options: NVRTC's options, among them the architecture.
        cache: where programs are kept; by default in :func:`kvpack.numerics.program_cache.default_folder`.

    Raises:
        RuntimeError: the source does not compile; the message is the compiler's.
        UnsupportedError: NVRTC or NVIDIA's driver was not found.

    """
    text = source_of(unit)
    cache = ProgramCache(default_folder()) if cache is None else cache
    key = program_key(text, options, nvrtc_version(), driver_version())
    return cache.get(key, lambda: compile_source(text, unit, options))


def compile_source(text: str, name: str, options: tuple[str, ...]) -> bytes:
    """Return the machine code (cubin) of a CUDA source.

    Args:
        text: the complete source, which includes no files.
        name: what the compiler calls the source in its messages.
        options: NVRTC's options, among them the architecture.

    Raises:
        RuntimeError: the source does not compile; the message is the compiler's.
        UnsupportedError: NVRTC was not found.

    """
    library, handle = nvrtc(), ctypes.c_void_p()
    check(library.nvrtcCreateProgram(ctypes.byref(handle), text.encode(), name.encode(), 0, None, None), "NVRTC")
    try:
        flags = [option.encode() for option in options]
        failed = library.nvrtcCompileProgram(handle, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        size = ctypes.c_size_t()
        if failed:
            library.nvrtcGetProgramLogSize(handle, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(handle, log)
            raise RuntimeError(f"{name} does not compile:\n{log.value.decode()}")
        check(library.nvrtcGetCUBINSize(handle, ctypes.byref(size)), "NVRTC")
        image = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(handle, image), "NVRTC")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(handle))
    return image.raw


@lru_cache(maxsize=1)
def nvrtc() -> ctypes.CDLL:
    """Return the NVRTC library.

    Raises:
        UnsupportedError: it was not found.

    """
    for name in _nvrtc_candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UnsupportedError("NVRTC was not found: it comes with torch's CUDA builds (libnvrtc)")


def _nvrtc_candidates() -> Iterator[str]:
    """Yield names and paths of NVRTC, those of the CUDA version that torch was built for first."""
    import torch

    major = (torch.version.cuda or "").split(".")[0]
    yield f"libnvrtc.so.{major}"
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        yield from map(str, sorted(Path(folder).glob(f"*/lib/libnvrtc.so.{major}*")))
    yield "libnvrtc.so"


@lru_cache(maxsize=1)
def nvrtc_version() -> str:
    """Return NVRTC's version, such as ``NVRTC 13.0``.

    Raises:
        UnsupportedError: NVRTC was not found.

    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    check(nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "NVRTC")
    return f"NVRTC {major.value}.{minor.value}"


@lru_cache(maxsize=1)
def nvrtc_architectures() -> frozenset[int]:
    """Return the architectures that NVRTC compiles for, as numbers such as 90 for compute capability 9.0.

    Raises:
        UnsupportedError: NVRTC was not found.

    """
    count = ctypes.c_int()
    check(nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count)), "NVRTC")
    found = (ctypes.c_int * count.value)()
    check(nvrtc().nvrtcGetSupportedArchs(found), "NVRTC")
    return frozenset(found)


@lru_cache(maxsize=1)
def driver() -> ctypes.CDLL:
    """Return the library of NVIDIA's driver.

    Raises:
        UnsupportedError: it was not found.

    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UnsupportedError("NVIDIA's driver (libcuda) was not found") from None


@lru_cache(maxsize=1)
def driver_version() -> str:
    """Return the version of CUDA that the driver is made for, such as ``13000`` for CUDA 13.0.

    Raises:
        UnsupportedError: the driver was not found.

    """
    version = ctypes.c_int()
    check(driver().cuDriverGetVersion(ctypes.byref(version)), "asking for the driver's version")
    return str(version.value)


def check(code: int, what: str) -> None:
    """Raise a RuntimeError that says ``what`` failed, if a function of NVRTC or of the driver returned an error."""
    if code:
        raise RuntimeError(f"{what} failed with CUDA error {code}")

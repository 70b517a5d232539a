"""Numba's ``njit`` with kvpack's settings and type hints, and a cache on disk that can do no harm.

Numba's own cache trusts its files: one that is empty fails the command, one that is damaged may end the process, and
one that somebody else has written is code that runs. So compiled loops are kept as compiled kernels are, by
:class:`kvpack.numerics.program_cache.ProgramCache`, and whatever is wrong there, a loop is compiled again.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, cached_property
from importlib.metadata import version
from types import FunctionType, ModuleType
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps

from kvpack.numerics.program_cache import ProgramCache, default_folder, program_key

F = TypeVar("F", bound=Callable[..., Any])


def njit(function: F) -> F:
    """Compile ``function`` on its first call, or load it from the cache on disk; it runs without the GIL."""
    dispatcher: Any = numba.njit(function, nogil=True)
    dispatcher._cache = _Kept(cast(FunctionType, function))
    return cast(F, dispatcher)


@cache
def _programs() -> ProgramCache:
    return ProgramCache(default_folder(name="loops"), suffix=".loop")


class _Kept(_Cache):  # type: ignore[misc]
    """What numba asks for a function's compiled code, and gives it to. Nothing is raised here."""

    def __init__(self, function: FunctionType) -> None:
        self._function = function

    @property
    def cache_path(self) -> str:
        return str(_programs().folder)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled function for these types of arguments; None if it must be compiled."""
        with suppress(Exception):
            _let_blas_wait()
        target_context.refresh()
        with suppress(Exception):
            program = _programs().find(self._key(sig, target_context.codegen()))
            if program is not None:
                return CompileResult._rebuild(target_context, *pickle.loads(program))
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled for these types of arguments, if it does not depend on this process."""
        if not data.lifted and not data.library.has_dynamic_globals and self._function.__closure__ is None:
            with suppress(Exception):
                _programs().keep(self._key(sig, data.codegen), dumps(data._reduce()))

    def _key(self, sig: Any, codegen: Any) -> str:
        options = (repr(sig), repr(codegen.magic_tuple()), *_settings())
        return program_key(self._source, options, f"numba {numba.__version__}", f"llvmlite {version('llvmlite')}")

    @cached_property
    def _source(self) -> str:
        """Everything of the sources that the code may depend on."""
        return "\n".join(_parts(self._function, set()))

    def enable(self) -> None:
        """Do nothing: the cache is always used."""

    def disable(self) -> None:
        """Do nothing: the cache is always used."""

    def flush(self) -> None:
        """Do nothing: files whose sources have changed are never found, and are removed when others need the room."""


class _Blas:
    """Whether there is a BLAS, which is found out when somebody asks."""

    def __bool__(self) -> bool:
        return bool(_arraymath()._check_blas())


def _arraymath() -> Any:
    return importlib.import_module("numba.np.arraymath")


def _let_blas_wait() -> None:
    """Keep numba from importing ``scipy.linalg``, which takes half a second, to find out whether there is a BLAS.

    It does so before it compiles or loads the first function, and nothing but ``np.convolve`` and ``np.correlate`` in
    the loops of other programs depends on the answer.
    """
    if "numba.np.arraymath" in sys.modules:
        return
    linalg: Any = importlib.import_module("numba.np.linalg")
    ensure = linalg.ensure_blas

    def absent() -> None:
        raise ImportError

    linalg.ensure_blas = absent
    try:
        arraymath = _arraymath()
        arraymath.ensure_blas = ensure
        arraymath._HAVE_BLAS = _Blas()
    finally:
        linalg.ensure_blas = ensure


@cache
def _settings() -> tuple[str, ...]:
    """Return Python's version and numba's settings."""
    own = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
    return (sys.version, *own)


def _parts(function: FunctionType, seen: set[str]) -> Iterator[str]:
    """Yield digests of the files of a function and of what it calls, and the values of constants that it uses."""
    name = f"{function.__module__}.{function.__qualname__}"
    if name in seen:
        return
    seen.add(name)
    yield f"{name} {_digest(function.__code__.co_filename)}"
    for used in sorted(set(function.__code__.co_names) & set(function.__globals__)):
        value = function.__globals__[used]
        if isinstance(value, Dispatcher):
            yield from _parts(value.py_func, seen)
        elif isinstance(value, ModuleType):
            yield (
                f"{used} {_digest(value.__file__)}" if value.__name__.startswith("kvpack") and value.__file__ else used
            )
        else:
            yield f"{used} {value!r}" if not hasattr(value, "tobytes") else f"{used} {value!r} {value.tobytes().hex()}"


@cache
def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

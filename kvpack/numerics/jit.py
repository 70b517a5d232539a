"""Numba's ``njit`` with kvpack's settings and a type: cached on disk, without the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def njit(function: F) -> F:
    """Compile on the first call (then from numba's cache on disk); runs without the GIL."""
    try:
        return cast(F, numba.njit(function, cache=True, nogil=True))
    except RuntimeError:  # nowhere to write a cache: compile every time
        return cast(F, numba.njit(function, nogil=True))

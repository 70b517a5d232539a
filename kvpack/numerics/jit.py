"""Numba's ``njit`` with kvpack's settings and type hints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def njit(function: F) -> F:
    """Compile ``function`` on its first call, or load it from numba's cache on disk; it runs without the GIL."""
    try:
        return cast(F, numba.njit(function, cache=True, nogil=True))
    except RuntimeError:  # Numba has no folder for its cache, so it compiles in every process.
        return cast(F, numba.njit(function, nogil=True))

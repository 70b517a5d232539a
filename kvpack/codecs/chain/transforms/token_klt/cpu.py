"""A stack's tensors to one row a token and back, compiled by numba: its keys, the first half, are turned on the way."""

from __future__ import annotations

from kvpack.codecs.chain.base import Floats
from kvpack.numerics.jit import njit

TILE = 8
"""Tokens of a head that are moved at once: 2 KiB where a head has 64 dimensions."""


@njit
def gather(values: Floats, cosines: Floats, sines: Floats, rows: Floats) -> None:
    """``values`` ``[H, T, D]`` into ``rows`` ``[T, H, D]``.

    Keys are turned back: pairs (i, i + N), by the angles whose ``cosines`` and ``sines`` are ``[T, N]``.
    """
    heads, tokens, _ = values.shape
    half = cosines.shape[1]
    for begin in range(0, tokens, TILE):
        for h in range(heads):
            turned = half if 2 * h < heads else 0
            for t in range(begin, min(begin + TILE, tokens)):
                for i in range(turned):
                    left, right, cos, sin = values[h, t, i], values[h, t, half + i], cosines[t, i], sines[t, i]
                    rows[t, h, i] = left * cos + right * sin
                    rows[t, h, half + i] = right * cos - left * sin
                rows[t, h, 2 * turned :] = values[h, t, 2 * turned :]


@njit
def scatter(rows: Floats, cosines: Floats, sines: Floats, values: Floats) -> None:
    """The inverse of :func:`gather`."""
    heads, tokens, _ = values.shape
    half = cosines.shape[1]
    for begin in range(0, tokens, TILE):
        for h in range(heads):
            turned = half if 2 * h < heads else 0
            for t in range(begin, min(begin + TILE, tokens)):
                for i in range(turned):
                    left, right, cos, sin = rows[t, h, i], rows[t, h, half + i], cosines[t, i], sines[t, i]
                    values[h, t, i] = left * cos - right * sin
                    values[h, t, half + i] = right * cos + left * sin
                values[h, t, 2 * turned :] = rows[t, h, 2 * turned :]

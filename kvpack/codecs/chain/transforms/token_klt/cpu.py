"""Rearranges a stack into one row per token and back, compiled by numba.

Keys, the first half of the stack, have RoPE undone or applied on the way.
"""

from __future__ import annotations

from kvpack.codecs.chain.base import Floats
from kvpack.numerics.jit import njit

TILE = 8
"""Number of tokens of a head that are moved at once; they take 2 KiB if a head has 64 dimensions."""


@njit
def gather(values: Floats, cosines: Floats, sines: Floats, rows: Floats) -> None:
    """Copy ``values`` ``[H, T, D]`` into ``rows`` ``[T, H, D]`` and undo RoPE of the keys.

    The pairs (i, i + N) of keys are rotated back by the angles whose ``cosines`` and ``sines`` are ``[T, N]``.
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
    """Undo :func:`gather`: copy ``rows`` ``[T, H, D]`` into ``values`` ``[H, T, D]`` and apply RoPE to the keys."""
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

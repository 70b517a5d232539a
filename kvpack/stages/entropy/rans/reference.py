"""rANS lanes in plain numpy, in the words of ``docs/format.md``: all lanes step together.

Duda, "Asymmetric numeral systems", arXiv 1311.2540; interleaving after Giesen, arXiv 1402.3392. A state lies
in [2**15, 2**31) and is renormalised by 16-bit words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LOW = 1 << 15


def _lanes(codes_shape: tuple[int, int, int], per_lane: int) -> tuple[Array, Array]:
    """Flat position ``[S, N]`` of each lane's symbols in decoding order (-1: none) and their channels."""
    heads, tokens, dims = codes_shape
    channels = heads * dims
    lanes = -(-channels // per_lane)
    channel = np.arange(lanes)[None, :] * per_lane + np.repeat(np.arange(per_lane), tokens)[:, None]
    token = np.tile(np.arange(tokens), per_lane)[:, None]
    position = (channel // dims) * tokens * dims + token * dims + channel % dims
    return np.where(channel < channels, position, -1), np.minimum(channel, channels - 1)


def encode(codes: Array, per_lane: int, tables: Array, frequencies: Array) -> tuple[Array, Array, Array]:
    """``codes`` are symbol indices ``[H, T, D]``; returns words, words a lane ``[N]``, final states ``[N]``."""
    position, channel = _lanes(codes.shape, per_lane)
    starts = np.cumsum(frequencies, 1) - frequencies
    lanes = position.shape[1]
    states = np.full(lanes, LOW, np.int64)
    words: list[list[int]] = [[] for _ in range(lanes)]
    for where, which in zip(position[::-1], channel[::-1], strict=True):
        for lane in np.flatnonzero(where >= 0):
            symbol, table = codes.reshape(-1)[where[lane]], tables[which[lane]]
            frequency, start = int(frequencies[table, symbol]), int(starts[table, symbol])
            x = int(states[lane])
            if x >= frequency << 19:
                words[lane].append(x & 0xFFFF)
                x >>= 16
            states[lane] = (x // frequency << 12) + start + x % frequency
    lengths = np.array([len(w) for w in words], np.int64)
    return np.array([v for w in words for v in reversed(w)], np.uint16), lengths, states


def decode(shape: tuple[int, int, int], per_lane: int, tables: Array, frequencies: Array,
           words: Array, starts: Array, states: Array) -> Array:  # fmt: skip
    """The symbol indices ``[H, T, D]``.

    Raises:
        ValueError: a lane does not end where and as it must.

    """
    position, channel = _lanes(shape, per_lane)
    symbols = np.zeros(int(np.prod(shape)), np.int64)
    bounds = np.cumsum(frequencies, 1)
    x, at = states.astype(np.int64), starts[:-1].astype(np.int64)
    padded = np.concatenate([words.astype(np.int64), np.zeros(len(position) + 1, np.int64)])
    for where, which in zip(position, channel, strict=True):
        slot, table = x & 0xFFF, tables[which]
        symbol = (bounds[table] <= slot[:, None]).sum(1)
        frequency = frequencies[table, symbol]
        y = frequency * (x >> 12) + slot - (bounds[table, symbol] - frequency)
        due = y < LOW
        y = np.where(due, (y << 16) | padded[at], y)
        live = where >= 0
        symbols[where[live]] = symbol[live]
        x, at = np.where(live, y, x), at + (due & live)
    if (x != LOW).any() or (at != starts[1:]).any():
        raise ValueError("a lane does not end where and as it must")
    return symbols.reshape(shape)

"""rANS lanes in plain numpy, in the words of ``docs/format.md``: the lanes of a group step together.

Duda, "Asymmetric numeral systems", arXiv 1311.2540; interleaving after Giesen, arXiv 1402.3392; 32 lanes to a
stream of words as in DietGPU, https://github.com/facebookresearch/dietgpu. A state lies in [2**15, 2**31) and is
renormalised by 16-bit words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.entropy.rans.tables import starts_of

Array = NDArray[Any]
LOW = 1 << 15
GROUP = 32


def _steps(shape: tuple[int, int, int], per_lane: int, group: int) -> Iterator[tuple[Array, Array]]:
    """Of a group, step by step in decoding order: the channels of its live lanes, and their places in the plane."""
    heads, tokens, dims = shape
    for row in range(per_lane):
        first = (group * per_lane + row) * GROUP
        channel = np.arange(first, min(first + GROUP, heads * dims))
        for token in range(tokens):
            yield channel, (channel // dims) * tokens * dims + token * dims + channel % dims


def encode(codes: Array, per_lane: int, tables: Array, frequencies: Array) -> tuple[Array, Array, Array]:
    """``codes`` are symbol indices ``[H, T, D]``; returns words, words a group ``[G]``, final states ``[N]``."""
    heads, _, dims = codes.shape
    starts = starts_of(frequencies)
    words: list[int] = []
    lengths, states = [], []
    for group in range(-(-heads * dims // (GROUP * per_lane))):
        steps = list(_steps(codes.shape, per_lane, group))
        state = [LOW] * len(steps[0][0])
        mine: list[int] = []
        for channel, place in reversed(steps):
            for lane in reversed(range(len(channel))):
                symbol, table = codes.reshape(-1)[place[lane]], tables[channel[lane]]
                frequency, start, x = int(frequencies[table, symbol]), int(starts[table, symbol]), state[lane]
                if x >= frequency << 19:
                    mine.append(x & 0xFFFF)
                    x >>= 16
                state[lane] = (x // frequency << 12) + start + x % frequency
        words += reversed(mine)
        lengths.append(len(mine))
        states += state
    return np.array(words, np.uint16), np.array(lengths, np.int64), np.array(states, np.int64)


def decode(shape: tuple[int, int, int], per_lane: int, tables: Array, frequencies: Array,
           words: Array, starts: Array, states: Array) -> Array:  # fmt: skip
    """The symbol indices ``[H, T, D]``; ``starts`` ``[G + 1]`` is where each group's words begin.

    Raises:
        ValueError: a group does not end where and as it must.

    """
    symbols = np.zeros(int(np.prod(shape)), np.int64)
    begin = starts_of(frequencies)
    padded = np.concatenate([words.astype(np.int64), np.zeros(symbols.size + 1, np.int64)])
    for group in range(len(starts) - 1):
        at, x = int(starts[group]), states[group * GROUP : (group + 1) * GROUP].astype(np.int64)
        for channel, place in _steps(shape, per_lane, group):
            lanes = slice(0, len(channel))
            slot, table = x[lanes] & 0xFFF, tables[channel]
            inside = (begin[table] <= slot[:, None]) & (slot[:, None] < begin[table] + frequencies[table])
            symbol = inside.argmax(1)
            y = frequencies[table, symbol] * (x[lanes] >> 12) + slot - begin[table, symbol]
            due = y < LOW
            y[due] = (y[due] << 16) | padded[at : at + due.sum()]
            at += int(due.sum())
            x[lanes] = y
            symbols[place] = symbol
        if (x != LOW).any() or at != starts[group + 1]:
            raise ValueError("a group does not end where and as it must")
    return symbols.reshape(shape)

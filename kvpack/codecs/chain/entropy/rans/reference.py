"""rANS lanes in plain numpy, as ``docs/format.md`` describes them: the lanes of a group step together.

The coder is that of Duda, "Asymmetric numeral systems", arXiv 1311.2540. Interleaving follows Giesen, arXiv
1402.3392. As in DietGPU (https://github.com/facebookresearch/dietgpu), 32 lanes share a stream of words. A state lies
in [2**15, 2**31) and is renormalised by 16-bit words.
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
    """Yield for each step of a group, in decoding order, the channels of its active lanes and their code positions."""
    heads, tokens, dims = shape
    for row in range(per_lane):
        first = (group * per_lane + row) * GROUP
        channel = np.arange(first, min(first + GROUP, heads * dims))
        for token in range(tokens):
            yield channel, (channel // dims) * tokens * dims + token * dims + channel % dims


def encode(codes: Array, per_lane: int, tables: Array, frequencies: Array) -> tuple[Array, Array, Array]:
    """Encode ``codes``, which are symbol indices ``[H, T, D]``.

    Returns the words, the number of words of each group ``[G]`` and the final states ``[N]``.
    """
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
    """Return the symbol indices ``[H, T, D]``; ``starts`` ``[G + 1]`` is where each group's words begin.

    Raises:
        ValueError: A group does not use exactly its words, or does not end in the initial states.

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

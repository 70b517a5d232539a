"""The coder of ``reference.py`` compiled by numba: the 32 states of a group step together and share their words."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import uint32
from numpy.typing import NDArray

from kvpack.codecs.chain.entropy.scaled_rans.reference import GROUP, PRECISION
from kvpack.numerics.jit import njit

Array = NDArray[Any]
_MASK = (1 << PRECISION) - 1


@njit
def total(symbols: Array, columns: Array, rows: Array, costs: Array) -> int:
    """Return the total cost of ``symbols`` ``[T * D]``, given the ``costs`` ``[K, A]`` of each class's symbols."""
    dims, top, found = len(columns), len(costs) - 1, 0
    for row in range(len(rows)):
        for column in range(dims):
            k = min(max((columns[column] - rows[row]) >> 3, 0), top)
            found += costs[k, symbols[row * dims + column]]
    return found


@njit
def encode(symbols: Array, columns: Array, rows: Array, frequencies: Array, starts: Array, span: int,
           words: Array, lengths: Array, states: Array) -> int:  # fmt: skip
    """Encode ``symbols`` ``[T * D]`` into ``words``, ``lengths`` ``[G]`` and ``states`` ``[G, 32]``.

    A group codes ``span`` consecutive symbols. ``words`` has room for one word per symbol. Returns the number of words.
    """
    dims, top, used = len(columns), len(frequencies) - 1, 0
    x = np.empty(GROUP, np.uint32)
    for group in range(len(lengths)):
        first, last = group * span, min((group + 1) * span, len(symbols))
        begin = used
        x[:] = uint32(1 << 16)
        row, column = (last - 1) // dims, (last - 1) % dims
        for at in range(last - 1, first - 1, -1):
            lane = (at - first) & (GROUP - 1)
            k = min(max((columns[column] - rows[row]) >> 3, 0), top)
            frequency, state = uint32(frequencies[k, symbols[at]]), x[lane]
            if state >> uint32(32 - PRECISION) >= frequency:
                words[used] = state & uint32(0xFFFF)
                used += 1
                state >>= uint32(16)
            whole = state // frequency
            x[lane] = (whole << uint32(PRECISION)) + uint32(starts[k, symbols[at]]) + state - whole * frequency
            column -= 1
            if column < 0:
                column, row = dims - 1, row - 1
        states[group] = x
        lengths[group] = used - begin
        for i in range((used - begin) // 2):
            words[begin + i], words[used - 1 - i] = words[used - 1 - i], words[begin + i]
    return used


@njit
def slots(frequencies: Array) -> Array:
    """Return the symbol of every slot of each table, ``[K, 2**PRECISION]`` uint8."""
    table = np.empty((len(frequencies), 1 << PRECISION), np.uint8)
    for k in range(len(frequencies)):
        at = 0
        for s in range(frequencies.shape[1]):
            for _ in range(frequencies[k, s]):
                table[k, at] = s
                at += 1
    return table


@njit
def decode(symbols: Array, columns: Array, rows: Array, frequencies: Array, starts: Array, table: Array, span: int,
           words: Array, ends: Array, states: Array) -> bool:  # fmt: skip
    """Decode into ``symbols`` ``[T * D]``; return False if a group does not end correctly.

    A group must use exactly its words and end in the initial states. The words of group g end before ``ends[g]``,
    which ascend to the number of ``words`` at most. ``columns`` ``[D]`` and ``rows`` ``[T]`` are int32, and ``table``
    comes from :func:`slots`.
    """
    dims, top, start = len(columns), len(frequencies) - 1, 0
    x = np.empty(GROUP, np.uint32)
    for group in range(len(ends)):
        first, last = group * span, min((group + 1) * span, len(symbols))
        x[:] = states[group]
        word, end = start, ends[group]
        row, column = first // dims, first % dims
        for at in range(first, last):
            lane = (at - first) & (GROUP - 1)
            k = min(max((columns[column] - rows[row]) >> 3, 0), top)
            state = x[lane]
            slot = state & uint32(_MASK)
            symbol = table[k, slot]
            state = uint32(frequencies[k, symbol]) * (state >> uint32(PRECISION)) + slot - uint32(starts[k, symbol])
            if state < uint32(1 << 16):
                if word >= end:
                    return False
                state = (state << uint32(16)) | uint32(words[word])
                word += 1
            x[lane] = state
            symbols[at] = symbol
            column += 1
            if column == dims:
                column, row = 0, row + 1
        if word != end:
            return False
        for lane in range(GROUP):
            if x[lane] != uint32(1 << 16):
                return False
        start = end
    return True

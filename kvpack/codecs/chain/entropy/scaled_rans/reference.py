"""The coder in plain Python integers, as ``docs/format.md`` describes it.

It is rANS (Duda, arXiv 1311.2540), interleaved as by Giesen (arXiv 1402.3392): 32 states in [2**16, 2**32) step
together and share a stream of 16-bit words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PRECISION = 14
"""Frequencies of a table sum to ``2**PRECISION``."""

GROUP = 32
LOW = 1 << 16


def encode(symbols: Array, classes: Array, frequencies: Array, span: int) -> tuple[Array, Array, Array]:
    """Encode ``symbols`` ``[N]`` with ``classes`` ``[N]``; a group codes ``span`` consecutive symbols.

    Returns the words, the number of words of each group ``[G]`` and the final states ``[G, 32]``.
    """
    starts = np.cumsum(frequencies, 1) - frequencies
    words: list[int] = []
    lengths, states = [], []
    for first in range(0, len(symbols), span):
        x, mine = [LOW] * GROUP, []
        for at in reversed(range(first, min(first + span, len(symbols)))):
            lane, k, s = (at - first) % GROUP, classes[at], symbols[at]
            frequency, start = int(frequencies[k, s]), int(starts[k, s])
            if x[lane] >= frequency << (32 - PRECISION):
                mine.append(x[lane] & 0xFFFF)
                x[lane] >>= 16
            x[lane] = (x[lane] // frequency << PRECISION) + start + x[lane] % frequency
        words += reversed(mine)
        lengths.append(len(mine))
        states.append(x)
    return np.array(words, np.uint16), np.array(lengths, np.int64), np.array(states, np.uint32)


def decode(classes: Array, frequencies: Array, span: int, words: Array, ends: Array, states: Array) -> Array:
    """Return the symbols ``[N]``; the words of group g end before ``ends[g]``.

    Raises:
        ValueError: A group does not use exactly its words, or does not end in the initial states.

    """
    bounds = np.cumsum(frequencies, 1)
    symbols = np.zeros(len(classes), np.uint8)
    word = 0
    for group, first in enumerate(range(0, len(classes), span)):
        x = [int(state) for state in states[group]]
        for at in range(first, min(first + span, len(classes))):
            lane, k = (at - first) % GROUP, classes[at]
            slot = x[lane] & ((1 << PRECISION) - 1)
            s = int((bounds[k] <= slot).sum())
            frequency = int(frequencies[k, s])
            x[lane] = frequency * (x[lane] >> PRECISION) + slot - (int(bounds[k, s]) - frequency)
            if x[lane] < LOW:
                if word >= len(words):
                    raise ValueError("a group reads beyond the words")
                x[lane] = (x[lane] << 16) | int(words[word])
                word += 1
            symbols[at] = s
        if word != ends[group] or x != [LOW] * GROUP:
            raise ValueError("a group does not end where and as it must")
    return symbols

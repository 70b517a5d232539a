"""Frequency tables for codes of a known scale: a frequency of zero and a geometric distribution of magnitudes.

Table k is for codes whose standard deviation is about ``2 ** ((k - UNIT) / 4)``. Each table follows from two numbers,
which were measured on factors of SmolLM2-135M's caches and are part of the format. All arithmetic is in integers.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.symbols import ALPHABET, LARGEST, RAW_BITS, SMALLEST

Ints = NDArray[np.int32]

UNIT = 20
"""Index of the table for codes of standard deviation 1."""

# fmt: off
ZEROS = (
    16300, 16300, 16300, 16300, 16300, 16300, 16300, 16300, 16300, 16300, 16300, 16268, 16105, 15842, 15344, 14445,
    12943, 11957, 10810, 9536, 8192, 7254, 6341, 5473, 4669, 4020, 3434, 2914, 2458, 2123, 1828, 1569,
    1343, 1171, 1020, 887, 770, 665, 574, 495, 426, 365, 313, 268, 229, 196, 168, 144,
    123, 105, 90, 77, 66, 55, 46, 39, 33, 28, 23, 19, 16, 14, 13, 11,
)
"""Least frequency of code 0 in each table, out of 16,384."""

RATIOS = (
    262, 276, 290, 305, 321, 338, 355, 374, 393, 468, 556, 662, 786, 990, 1246, 1566,
    1966, 3149, 4989, 7769, 11796, 15376, 19645, 24520, 29819, 33637, 37432, 41104, 44564, 47298, 49801, 52059,
    54067, 55637, 57026, 58246, 59310, 60166, 60914, 61564, 62128, 62665, 63121, 63506, 63832, 64102, 64330, 64522,
    64684, 64819, 64933, 65029, 65110, 65176, 65232, 65280, 65320, 65353, 65381, 65404, 65425, 65441, 65455, 65467,
)
"""Ratio of the probabilities of successive magnitudes in each table, in 65,536ths."""
# fmt: on

PRECISION = 14
"""Frequencies of a table sum to ``2 ** PRECISION``."""


@lru_cache(maxsize=1)
def tables() -> Ints:
    """Return the frequencies of the symbols of :mod:`kvpack.codecs.chain.symbols`, ``[64, 63]``, read-only.

    Let t(0) = 2**30 and t(i + 1) = (t(i) * ratio) >> 16. The bucket of magnitudes a to b - 1 has the mass
    t(a - 1) - t(b - 1). The symbol of either sign has the frequency 1 + (mass * free >> 31). Here, free is 16,384
    minus the least frequency of 0 and minus 1 for every other symbol. The symbol 0 has the remaining frequency.
    """
    ratios, tail = np.array(RATIOS, np.int64), np.full(len(RATIOS), 1 << 30, np.int64)
    ends = SMALLEST + (1 << RAW_BITS) - 1
    at = {0: tail}
    for i in range(1, LARGEST + 1):
        tail = (tail * ratios) >> 16
        if i in ends:
            at[i] = tail
    free = (1 << PRECISION) - np.array(ZEROS, np.int64) - (ALPHABET - 1)
    found = np.empty((len(RATIOS), ALPHABET), np.int32)
    for bucket in range(1, len(ends)):
        mass = at[int(SMALLEST[bucket]) - 1] - at[int(ends[bucket])]
        found[:, 2 * bucket - 1] = found[:, 2 * bucket] = 1 + ((mass * free) >> 31)
    found[:, 0] = (1 << PRECISION) - found[:, 1:].sum(1)
    found.flags.writeable = False
    return found

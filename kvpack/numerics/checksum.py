"""The 64-bit checksum of streams and original tensors; it is a sum, so that threads can share the work.

The bytes are padded with zeros to 64-bit little-endian words w_0 … w_{n-1}. The checksum is
``sum(mix(w_i + (i + 1) * G)) + length`` modulo 2**64, where ``mix`` and ``G`` are SplitMix64's finaliser and
increment (Steele, Lea, Flood 2014). ``mix`` is a bijection, so a change within one word is always detected. Any other
change is missed with probability 2**-64. The checksum detects accidents, not forgery.

A CRC or SHA-256 would detect accidents as well. However, neither is a sum that threads can share, and SHA-256 would
take a large part of the decoding time on a CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import uint64
from numpy.typing import NDArray

from kvpack.numerics.jit import njit

PIECE = 1 << 20
"""Bytes of an array without memory of its own that are written out at a time."""


def checksum(data: bytes | memoryview | NDArray[Any]) -> int:
    """Return the checksum of bytes, or of an array's little-endian bytes in row-major order, below 2**64.

    An array that repeats one element (``np.broadcast_to``) takes no memory, however long it is.
    """
    if isinstance(data, np.ndarray):
        flat = data.reshape(-1)
        if flat.size and flat.strides[0] == 0 and flat.nbytes > PIECE:
            return _repeated(flat)
        data = np.ascontiguousarray(flat)
    octets = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data.reshape(-1).view(np.uint8)
    whole = len(octets) // 8 * 8
    words = octets[:whole]
    if words.ctypes.data % 8:
        words = words.copy()
    tail = np.zeros(8, np.uint8)
    tail[: len(octets) - whole] = octets[whole:]
    total = int(_sum(words.view(np.uint64), 0))
    if whole < len(octets):
        total += int(_sum(tail.view(np.uint64), whole // 8))
    return (total + len(octets)) % (1 << 64)


def _repeated(flat: NDArray[Any]) -> int:
    """Return the checksum of an array whose elements are all the same, piece by piece."""
    total, step = flat.nbytes, PIECE // flat.itemsize
    for at in range(0, flat.size, step):
        octets = np.ascontiguousarray(flat[at : at + step]).view(np.uint8)
        words = np.zeros(-(-octets.size // 8), np.uint64)
        words.view(np.uint8)[: octets.size] = octets
        total += int(_sum(words, at * flat.itemsize // 8))
    return total % (1 << 64)


@njit
def _sum(words: NDArray[np.uint64], first: int) -> Any:
    total = uint64(0)
    step = uint64(0x9E3779B97F4A7C15)
    key = uint64(first) * step
    for i in range(words.size):
        key += step
        z = words[i] + key
        z = (z ^ (z >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> uint64(27))) * uint64(0x94D049BB133111EB)
        total += z ^ (z >> uint64(31))
    return total

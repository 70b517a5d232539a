"""rANS lanes compiled for the CPU; the same words and states as ``reference.py``.

Four lanes run side by side in one loop: each lane is a chain of dependent steps, and four chains fill the
processor. Indices are unsigned, because numba checks signed ones for being negative. Division by a frequency is
a multiplication by its rounded-up reciprocal, exact for states below 2**31 (Alverson 1991; Giesen,
https://github.com/rygorous/ryg_rans).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import uint32, uint64
from numpy.typing import NDArray

from kvpack.stages.jit import njit

Array = NDArray[Any]
_SHIFT = np.array([max(f - 1, 0).bit_length() for f in range(4097)])


@njit
def histogram(codes: Array, counts: Array, totals: Array) -> None:
    """Count the codes ``[H, T, D]`` by channel ``[H, D, 2**width]`` and in all ``[2**width]``; zeros before."""
    heads, tokens, dims = codes.shape
    for h in range(heads):
        for block in range(0, dims, 16):  # counts of 16 channels stay in the first-level cache
            for t in range(tokens):
                for d in range(block, min(block + 16, dims)):
                    counts[h, d, codes[h, t, d]] += 1
            for d in range(block, min(block + 16, dims)):
                for code in range(totals.size):
                    totals[code] += counts[h, d, code]


def encode_entries(frequencies: Array, symbols: Array, width: int) -> Array:
    """Per table and code: reciprocal (32 bits), start (12), frequency (13), shift (4) in one uint64."""
    f = np.maximum(frequencies, 1).astype(np.int64)
    starts = (np.cumsum(frequencies, 1) - frequencies).astype(np.uint64)
    shift = _SHIFT[f]
    reciprocal = ((np.int64(1) << (31 + shift)) + f - 1) // f
    packed = reciprocal.astype(np.uint64) | (starts << np.uint64(32)) | (f.astype(np.uint64) << np.uint64(44))
    entries = np.zeros((len(f), 1 << width), np.uint64)
    entries[:, symbols] = packed | (shift.astype(np.uint64) << np.uint64(57))
    return entries


def decode_tables(frequencies: Array, codes: Array) -> tuple[Array, Array]:
    """Per table: the symbol of each slot ``[K, 4096]``, and of each symbol code << 32 | frequency << 16 | start.

    Two small tables, not one of slots that holds all: both stay in the first-level cache (measured: 1.8 times
    as fast).
    """
    slots = np.empty((len(frequencies), 4096), np.uint8)
    entries = np.zeros((len(frequencies), 256), np.uint64)
    _fill_tables(frequencies, codes, slots, entries)
    return slots, entries


@njit
def _fill_tables(frequencies: Array, codes: Array, slots: Array, entries: Array) -> None:
    for table in range(frequencies.shape[0]):
        start = 0
        for symbol in range(frequencies.shape[1]):
            frequency = frequencies[table, symbol]
            entries[table, symbol] = (codes[symbol] << 32) | (frequency << 16) | start
            slots[table, start : start + frequency] = symbol
            start += frequency


@njit
def _lane_span(lane: int, channels: int, per_lane: int) -> tuple[int, int]:
    """How many lanes to run from ``lane`` on (4, or 1 near the end), and the channels of each."""
    if (lane + 4) * per_lane <= channels:
        return 4, per_lane
    return 1, min(per_lane, channels - lane * per_lane)


@njit
def _put(state: Any, entry: Any, words: Array, at: Any) -> Any:
    """One symbol: renormalise (the word is written always, kept only if due), then encode."""
    frequency = (entry >> uint64(44)) & uint64(0x1FFF)
    words[at] = state & uint64(0xFFFF)
    full = state >= (frequency << uint64(19))
    at -= uint64(full)
    state = state >> uint64(16) if full else state
    quotient = (state * (entry & uint64(0xFFFFFFFF))) >> (uint64(31) + (entry >> uint64(57)))
    start = (entry >> uint64(32)) & uint64(0xFFF)
    return state + start + quotient * (uint64(4096) - frequency), at


@njit
def _encode_four(flat: Array, tokens: int, dims: int, first: Array, count: int, tables: Array,
                 entries: Array, words: Array, ends: Array, states: Array) -> None:  # fmt: skip
    """Four lanes of ``count`` channels each, last symbol first, words from the end of ``words[lane]``."""
    x0 = x1 = x2 = x3 = uint64(1 << 15)
    p0 = p1 = p2 = p3 = uint64(words.shape[1] - 1)
    w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
    for j in range(count - 1, -1, -1):
        c0, c1, c2, c3 = first[0] + j, first[1] + j, first[2] + j, first[3] + j
        e0, e1, e2, e3 = entries[tables[c0]], entries[tables[c1]], entries[tables[c2]], entries[tables[c3]]
        o0 = (c0 // dims) * tokens * dims + c0 % dims
        o1 = (c1 // dims) * tokens * dims + c1 % dims
        o2 = (c2 // dims) * tokens * dims + c2 % dims
        o3 = (c3 // dims) * tokens * dims + c3 % dims
        for t in range((tokens - 1) * dims, -1, -dims):
            x0, p0 = _put(x0, e0[flat[uint64(o0 + t)]], w0, p0)
            x1, p1 = _put(x1, e1[flat[uint64(o1 + t)]], w1, p1)
            x2, p2 = _put(x2, e2[flat[uint64(o2 + t)]], w2, p2)
            x3, p3 = _put(x3, e3[flat[uint64(o3 + t)]], w3, p3)
    ends[0], ends[1], ends[2], ends[3] = p0, p1, p2, p3
    states[0], states[1], states[2], states[3] = x0, x1, x2, x3


@njit
def encode(codes: Array, per_lane: int, tables: Array, entries: Array,
           words: Array, lengths: Array, states: Array) -> int:  # fmt: skip
    """Encode ``codes`` ``[H, T, D]``; fills ``words``, ``lengths`` ``[N]``, ``states`` ``[N]``.

    ``words`` has room for one word a symbol. Returns the number of words.
    """
    heads, tokens, dims = codes.shape
    channels = heads * dims
    flat = codes.reshape(-1)
    first = np.zeros(4, np.int64)
    ends = np.zeros(4, np.int64)
    last = np.zeros(4, np.uint64)
    scratch = np.empty((4, per_lane * tokens + 2), np.uint16)
    size = scratch.shape[1]
    lane = 0
    used = 0
    while lane < lengths.size:
        span, count = _lane_span(lane, channels, per_lane)
        for i in range(4):
            first[i] = (lane + min(i, span - 1)) * per_lane
        _encode_four(flat, tokens, dims, first, count, tables, entries, scratch, ends, last)
        for i in range(span):
            length = size - 1 - ends[i]
            words[used : used + length] = scratch[i, ends[i] + 1 :]
            used += length
            lengths[lane + i] = length
            states[lane + i] = last[i]
        lane += span
    return used


@njit
def _get(state: Any, slots: Array, entries: Array, words: Array, at: Any) -> Any:
    """One code: decode, then renormalise (the word is read always, used only if due)."""
    slot = state & uint32(0xFFF)
    entry = entries[slots[slot]]
    range_ = uint32(entry)
    state = (range_ >> uint32(16)) * (state >> uint32(12)) + slot - (range_ & uint32(0xFFFF))
    empty = state < uint32(1 << 15)
    filled = (state << uint32(16)) | uint32(words[at])
    return uint32(entry >> uint64(32)), uint32(filled if empty else state), at + uint64(empty)


@njit
def _decode_four(flat: Array, tokens: int, dims: int, first: Array, count: int, tables: Array,
                 slots: Array, entries: Array, words: Array, at: Array, states: Array) -> None:  # fmt: skip
    """Four lanes of ``count`` channels each; ``at`` and ``states`` are advanced to the lanes' ends."""
    x0, x1, x2, x3 = states[0], states[1], states[2], states[3]
    p0, p1, p2, p3 = uint64(at[0]), uint64(at[1]), uint64(at[2]), uint64(at[3])
    for j in range(count):
        c0, c1, c2, c3 = first[0] + j, first[1] + j, first[2] + j, first[3] + j
        s0, s1, s2, s3 = slots[tables[c0]], slots[tables[c1]], slots[tables[c2]], slots[tables[c3]]
        e0, e1, e2, e3 = entries[tables[c0]], entries[tables[c1]], entries[tables[c2]], entries[tables[c3]]
        o0 = (c0 // dims) * tokens * dims + c0 % dims
        o1 = (c1 // dims) * tokens * dims + c1 % dims
        o2 = (c2 // dims) * tokens * dims + c2 % dims
        o3 = (c3 // dims) * tokens * dims + c3 % dims
        for t in range(0, tokens * dims, dims):
            v0, x0, p0 = _get(x0, s0, e0, words, p0)
            v1, x1, p1 = _get(x1, s1, e1, words, p1)
            v2, x2, p2 = _get(x2, s2, e2, words, p2)
            v3, x3, p3 = _get(x3, s3, e3, words, p3)
            flat[uint64(o0 + t)] = v0
            flat[uint64(o1 + t)] = v1
            flat[uint64(o2 + t)] = v2
            flat[uint64(o3 + t)] = v3
    at[0], at[1], at[2], at[3] = p0, p1, p2, p3
    states[0], states[1], states[2], states[3] = x0, x1, x2, x3


@njit
def decode(codes: Array, per_lane: int, tables: Array, slots: Array, entries: Array,
           words: Array, starts: Array, states: Array) -> bool:  # fmt: skip
    """Decode into ``codes`` ``[H, T, D]``; False where a lane does not end where and as it must.

    ``slots`` and ``entries`` are :func:`decode_tables`.

    ``words`` is padded by one word a symbol of a lane, so that no lane can read beyond it; ``starts`` ``[N + 1]``.
    """
    heads, tokens, dims = codes.shape
    channels = heads * dims
    flat = codes.reshape(-1)
    first = np.zeros(4, np.int64)
    at = np.zeros(4, np.int64)
    state = np.zeros(4, np.uint32)
    lane = 0
    while lane < states.size:
        span, count = _lane_span(lane, channels, per_lane)
        for i in range(4):
            j = lane + min(i, span - 1)
            first[i], at[i], state[i] = j * per_lane, starts[j], states[j]
        _decode_four(flat, tokens, dims, first, count, tables, slots, entries, words, at, state)
        for i in range(span):
            if at[i] != starts[lane + i + 1] or state[i] != uint32(1 << 15):
                return False
        lane += span
    return True

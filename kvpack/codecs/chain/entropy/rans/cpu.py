"""rANS lanes compiled by numba; they give the same words and states as ``reference.py``.

The lanes of a group run in one loop. Each lane is a chain of dependent steps, and the 32 independent chains keep the
processor busy; only the position of the next word passes from lane to lane. Indices are unsigned, because numba checks
whether signed ones are negative. Division by a frequency is a multiplication by its rounded-up reciprocal, which is
exact for states below 2**31 (Alverson 1991; Giesen, https://github.com/rygorous/ryg_rans).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import uint32, uint64
from numpy.typing import NDArray

from kvpack.codecs.chain.entropy.rans.tables import starts_of
from kvpack.numerics.jit import njit

Array = NDArray[Any]

PADDING = 33
"""Words that must be readable behind those of a stream: each of 32 lanes reads one a step, even if it uses none."""

_SHIFT = np.array([max(f - 1, 0).bit_length() for f in range(4097)])


@njit
def histogram(codes: Array, counts: Array, totals: Array) -> None:
    """Count ``codes`` ``[H, T, D]`` in each channel and in the whole plane.

    ``counts`` ``[H, D, 2**width]`` and ``totals`` ``[2**width]`` must be zero at first.
    """
    heads, tokens, dims = codes.shape
    for h in range(heads):
        for block in range(0, dims, 16):  # The counts of 16 channels fit the first-level cache.
            for t in range(tokens):
                for d in range(block, min(block + 16, dims)):
                    counts[h, d, codes[h, t, d]] += 1
            for d in range(block, min(block + 16, dims)):
                for code in range(totals.size):
                    totals[code] += counts[h, d, code]


def encode_entries(frequencies: Array, symbols: Array, width: int) -> Array:
    """Return one uint64 for each table and code: reciprocal (32 bits), start (12), frequency (13) and shift (4)."""
    f = np.maximum(frequencies, 1).astype(np.int64)
    starts = starts_of(frequencies).astype(np.uint64)
    shift = _SHIFT[f]
    reciprocal = ((np.int64(1) << (31 + shift)) + f - 1) // f
    packed = reciprocal.astype(np.uint64) | (starts << np.uint64(32)) | (f.astype(np.uint64) << np.uint64(44))
    entries = np.zeros((len(f), 1 << width), np.uint64)
    entries[:, symbols] = packed | (shift.astype(np.uint64) << np.uint64(57))
    return entries


def decode_tables(frequencies: Array, codes: Array) -> tuple[Array, Array]:
    """Return the symbol of each slot ``[K, 4096]``, and code << 32 | frequency << 16 | start of each symbol.

    Two small tables fit the first-level cache. This was measured to be 1.8 times as fast as one table of slots with
    everything in it.
    """
    slots = np.empty((len(frequencies), 4096), np.uint8)
    entries = np.zeros((len(frequencies), 256), np.uint64)
    _fill_tables(frequencies, starts_of(frequencies), codes, slots, entries)
    return slots, entries


@njit
def _fill_tables(frequencies: Array, starts: Array, codes: Array, slots: Array, entries: Array) -> None:
    for table in range(frequencies.shape[0]):
        for symbol in range(frequencies.shape[1]):
            frequency, start = frequencies[table, symbol], starts[table, symbol]
            entries[table, symbol] = (codes[symbol] << 32) | (frequency << 16) | start
            slots[table, start : start + frequency] = symbol


@njit
def _put(state: Any, entry: Any, words: Array, at: Any) -> Any:
    """Renormalise a state and encode one symbol; the word is always written, but kept only if it is due."""
    frequency = (entry >> uint64(44)) & uint64(0x1FFF)
    words[at] = state & uint64(0xFFFF)
    full = state >= (frequency << uint64(19))
    at -= uint64(full)
    state = state >> uint64(16) if full else state
    quotient = (state * (entry & uint64(0xFFFFFFFF))) >> (uint64(31) + (entry >> uint64(57)))
    start = (entry >> uint64(32)) & uint64(0xFFF)
    return state + start + quotient * (uint64(4096) - frequency), at


@njit
def _places(first: int, count: int, tokens: int, dims: int, places: Array) -> None:
    """Write the positions of the first codes of ``count`` channels from ``first`` on into ``places``."""
    for i in range(count):
        places[i] = ((first + i) // dims) * tokens * dims + (first + i) % dims


@njit
def encode(codes: Array, per_lane: int, tables: Array, entries: Array,
           words: Array, lengths: Array, states: Array) -> int:  # fmt: skip
    """Encode ``codes`` ``[H, T, D]`` into ``words``, ``lengths`` ``[G]`` and ``states`` ``[N]``.

    ``words`` has room for one word per symbol. Codes are below the width of ``entries`` ``[K, 2**width]``, and
    ``tables`` ``[H * D]`` below K. Returns the number of words.
    """
    heads, tokens, dims = codes.shape
    channels = heads * dims
    flat = codes.reshape(-1)
    flat_entries, width = entries.reshape(-1), uint64(entries.shape[1])
    places, table, x = np.zeros(32, np.uint64), np.zeros(32, np.uint64), np.zeros(32, np.uint64)
    scratch = np.empty(min(32 * per_lane, channels) * tokens + 1, np.uint16)
    used = 0
    for group in range(lengths.size):
        x[:] = 1 << 15
        at = uint64(scratch.size - 1)
        for row in range(per_lane - 1, -1, -1):
            first = (group * per_lane + row) * 32
            count = max(0, min(32, channels - first))
            _places(first, count, tokens, dims, places)
            for i in range(count):
                table[i] = uint64(tables[first + i]) * width
            for t in range((tokens - 1) * dims, -1, -dims):
                for i in range(count):
                    lane = uint64(count - 1 - i)  # It is unsigned, because numba checks signed indices.
                    code = flat[places[lane] + uint64(t)]
                    x[lane], at = _put(x[lane], flat_entries[table[lane] + uint64(code)], scratch, at)
        length = scratch.size - 1 - int(at)
        words[used : used + length] = scratch[at + uint64(1) :]
        used += length
        lengths[group] = length
        live = min(32, channels - group * per_lane * 32)
        states[group * 32 : group * 32 + live] = x[:live]
    return used


@njit
def _get(state: Any, slots: Array, slot_at: Any, entries: Array, entry_at: Any, words: Array, at: Any) -> Any:
    """Decode one code and renormalise the state; the word is always read, but used only if it is due."""
    slot = state & uint32(0xFFF)
    entry = entries[entry_at + uint64(slots[slot_at + uint64(slot)])]
    range_ = uint32(entry)
    state = (range_ >> uint32(16)) * (state >> uint32(12)) + slot - (range_ & uint32(0xFFFF))
    empty = state < uint32(1 << 15)
    filled = (state << uint32(16)) | uint32(words[at])
    return uint32(entry >> uint64(32)), uint32(filled if empty else state), at + uint64(empty)


@njit
def decode(codes: Array, per_lane: int, tables: Array, slots: Array, entries: Array,
           words: Array, starts: Array, states: Array) -> bool:  # fmt: skip
    """Decode into ``codes`` ``[H, T, D]``; return False if a group does not end correctly.

    A group must use exactly its words and end in the initial states. ``slots`` and ``entries`` come from
    :func:`decode_tables`, and ``tables`` ``[H * D]`` are below their number. ``starts`` ``[G + 1]``, ascending, is
    where each group's words begin. ``words`` is padded by :data:`PADDING` words: a step of all lanes reads at most that
    many, and no step begins behind the group's end, so that no read goes beyond them.
    """
    heads, tokens, dims = codes.shape
    channels = heads * dims
    flat, flat_slots, flat_entries = codes.reshape(-1), slots.reshape(-1), entries.reshape(-1)
    places, x = np.zeros(32, np.uint64), np.zeros(32, np.uint32)
    slot_table, entry_table = np.zeros(32, np.uint64), np.zeros(32, np.uint64)
    for group in range(starts.size - 1):
        live = min(32, channels - group * per_lane * 32)
        x[:live] = states[group * 32 : group * 32 + live]
        at, end = uint64(starts[group]), uint64(starts[group + 1])
        for row in range(per_lane):
            first = (group * per_lane + row) * 32
            count = max(0, min(32, channels - first))
            _places(first, count, tokens, dims, places)
            for i in range(count):
                slot_table[i] = uint64(tables[first + i]) * uint64(slots.shape[1])
                entry_table[i] = uint64(tables[first + i]) * uint64(entries.shape[1])
            for t in range(0, tokens * dims, dims):
                if at > end:
                    return False
                for i in range(count):
                    lane = uint64(i)  # It is unsigned, because numba checks signed indices.
                    code, x[lane], at = _get(
                        x[lane], flat_slots, slot_table[lane], flat_entries, entry_table[lane], words, at
                    )
                    flat[places[lane] + uint64(t)] = code
        if at != end or (x[:live] != uint32(1 << 15)).any():
            return False
    return True

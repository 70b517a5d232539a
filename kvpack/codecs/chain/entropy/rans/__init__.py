"""``rans``: interleaved range asymmetric numeral systems (rANS) over a bank of 12-bit frequency tables.

A **channel** is one (head, dimension) of a plane over all its tokens. A **lane** is a rANS state that codes one channel
after another. A **group** is 32 lanes that step together and share one stream of words; on a GPU it is a warp. The
number of lanes depends on the size of the payload, so that the states take about one percent of it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Codes, EntropyCoder, PlaneSpec
from kvpack.codecs.chain.entropy.bitpack import pack, packed_size, unpack
from kvpack.codecs.chain.entropy.rans import cpu, tables
from kvpack.errors import CorruptError

Array = NDArray[Any]

PACKED, CODED = 0, 1
LANE_BYTES = 400
"""Target size of a lane's payload in bytes; its state takes 4 bytes more."""

GROUP = 32
"""Number of lanes that share a stream of words."""

MAX_WIDTH = 12
MAX_SYMBOLS = 256
_HEAD = struct.Struct("<BBBBIII")


@dataclass(frozen=True)
class Rans(EntropyCoder):
    """Codes planes with rANS, or with bit packing if that is smaller or the plane is not to be modelled."""

    name: ClassVar[str] = "rans"
    version: ClassVar[int] = 2

    def encode(self, codes: Codes, spec: PlaneSpec) -> bytes:
        """Return one mode byte, then packed codes or rANS lanes, whichever is smaller."""
        if spec.modelled and spec.size and spec.width <= MAX_WIDTH:
            coded = _encode(codes, spec)
            if coded is not None and len(coded) <= packed_size(spec.size, spec.width):
                return coded
        return bytes([PACKED]) + pack(codes, spec.width)

    def decode(self, data: memoryview, spec: PlaneSpec) -> Codes:
        """Undo :meth:`encode`."""
        if len(data) and data[0] == PACKED:
            return unpack(data[1:], spec.size, spec.width).reshape(spec.shape)
        if len(data) < _HEAD.size or data[0] != CODED or spec.width > MAX_WIDTH or not spec.size:
            raise CorruptError("rans stream: unknown mode or truncated")
        return _decode(data, spec)


def _encode(codes: Codes, spec: PlaneSpec) -> bytes | None:
    heads, _, dims = spec.shape
    codes = np.ascontiguousarray(codes, spec.code_dtype)
    if spec.width < 8 * codes.itemsize and int(codes.max()) >> spec.width:
        raise ValueError(f"codes of plane {spec.name!r} take more than {spec.width} bits")
    counts = np.zeros((heads, dims, 1 << spec.width), np.int32)
    totals = np.zeros(1 << spec.width, np.int64)
    cpu.histogram(codes, counts, totals)
    symbols = np.flatnonzero(totals)
    if len(symbols) > MAX_SYMBOLS:
        return None
    assigned, sums = tables.cluster(counts.reshape(heads * dims, -1)[:, symbols])
    levels = tables.quantize(sums)
    frequencies = tables.frequencies(levels)
    payload = max(tables.coded_size(sums, frequencies), 1)
    per_lane = min(len(assigned), max(1, -(-LANE_BYTES * len(assigned) // payload)))
    groups, lanes = _layout(len(assigned), per_lane)
    words = np.empty(spec.size, np.uint16)
    lengths, states = np.zeros(groups, np.int64), np.zeros(lanes, np.uint32)
    entries = cpu.encode_entries(frequencies, symbols, spec.width)
    used = cpu.encode(codes, per_lane, assigned, entries, words, lengths, states)
    shortest = int(lengths.min())
    spread = int(lengths.max() - shortest).bit_length()
    head = _HEAD.pack(CODED, len(levels) - 1, len(symbols) - 1, spread, per_lane, shortest, used)
    side = (
        pack(symbols.astype(np.uint16), spec.width),
        pack(levels.astype(np.uint8), 6),
        pack(assigned.astype(np.uint8), (len(levels) - 1).bit_length()),
        pack((lengths - shortest).astype(np.uint32), spread),
    )
    return b"".join((head, states.tobytes(), words[:used].tobytes(), *side))


def _layout(channels: int, per_lane: int) -> tuple[int, int]:
    """Return the numbers of groups and of lanes for this many channels, with ``per_lane`` channels per lane."""
    groups = -(-channels // (GROUP * per_lane))
    return groups, (groups - 1) * GROUP + min(GROUP, channels - (groups - 1) * GROUP * per_lane)


def _decode(data: memoryview, spec: PlaneSpec) -> Codes:
    heads, _, dims = spec.shape
    _, last_table, last_symbol, spread, per_lane, shortest, used = _HEAD.unpack_from(data)
    count, alphabet, channels = last_table + 1, last_symbol + 1, heads * dims
    if not 1 <= per_lane <= channels or spread > 32 or used > spec.size:
        raise CorruptError("rans stream: head out of range")
    groups, lanes = _layout(channels, per_lane)
    fields = _Fields(data)
    states = np.frombuffer(fields.take(4 * lanes), "<u4")
    words = np.frombuffer(fields.take(2 * used), "<u2")
    symbols = fields.codes(alphabet, spec.width)
    levels = fields.codes(count * alphabet, 6).reshape(count, alphabet)
    assigned = fields.codes(channels, last_table.bit_length())
    lengths = fields.codes(groups, spread) + shortest
    if fields.rest() or int(lengths.sum()) != used or (assigned >= count).any() or (np.diff(symbols) <= 0).any():
        raise CorruptError("rans stream: lengths, tables or symbols out of range")
    try:
        slots, entries = cpu.decode_tables(tables.frequencies(levels), symbols)
    except ValueError as error:
        raise CorruptError(f"rans stream: {error}") from None
    if alphabet == 1:  # a symbol of frequency 1 changes no state and takes no word
        if used or (states != 1 << 15).any():
            raise CorruptError("rans stream: a group does not end where it must")
        return np.broadcast_to(symbols.astype(spec.code_dtype), spec.shape)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    padded = np.concatenate([words, np.zeros(cpu.PADDING, np.uint16)])
    codes = np.zeros(spec.shape, spec.code_dtype)
    if not cpu.decode(codes, per_lane, assigned, slots, entries, padded, starts, states.astype(np.uint32)):
        raise CorruptError("rans stream: a group does not end where it must")
    return codes


class _Fields:
    """Reads the sections of a stream one after another and never beyond its end."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, _HEAD.size

    def take(self, size: int) -> memoryview:
        piece = self._data[self._at : self._at + size]
        if len(piece) != size:
            raise CorruptError("rans stream: truncated")
        self._at += size
        return piece

    def codes(self, count: int, width: int) -> Array:
        return unpack(self.take(packed_size(count, width)), count, width).astype(np.int64)

    def rest(self) -> int:
        return len(self._data) - self._at

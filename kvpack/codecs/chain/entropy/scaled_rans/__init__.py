"""``scaled_rans``: rANS whose frequency table for a code depends on the expected scales of its column and row.

The calibration profile holds the tables, so the file need not. The context of a code is side information and never a
neighbouring code, so that lanes can run in parallel. Planes without scales are coded by ``rans``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain import symbols
from kvpack.codecs.chain.base import Codes, EntropyCoder, PlaneSpec, Scales
from kvpack.codecs.chain.entropy.bitpack import packed_size, unpack
from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.codecs.chain.entropy.scaled_rans import cpu
from kvpack.codecs.chain.entropy.scaled_rans.reference import GROUP, PRECISION
from kvpack.errors import CorruptError, MismatchError

Array = NDArray[Any]

GROUP_BYTES = 12288
"""Target size of a group's payload in bytes; its states and its length take 132 bytes more."""

_HEAD = struct.Struct("<II")
_RANS = Rans()


@dataclass(frozen=True)
class ScaledRans(EntropyCoder):
    """Codes planes that have :class:`Scales` with their tables, and other planes with ``rans``."""

    name: ClassVar[str] = "scaled_rans"
    version: ClassVar[int] = 1

    def encode(self, codes: Codes, spec: PlaneSpec) -> bytes:
        """Return the bytes: span, number of raw bytes, each group's number of words, states, words and raw bits."""
        if spec.scales is None:
            return _RANS.encode(codes, spec)
        scales = checked(spec)
        coded, raw, widths = symbols.split(np.ascontiguousarray(codes).reshape(-1))
        span = _span(coded, scales)
        groups = -(-len(coded) // span)
        words = np.empty(len(coded), np.uint16)
        lengths, states = np.zeros(groups, np.uint32), np.zeros((groups, GROUP), np.uint32)
        starts = np.cumsum(scales.tables, 1) - scales.tables
        arrays = (scales.columns, scales.rows, scales.tables, starts)
        used = cpu.encode(coded, *arrays, span, words, lengths, states)
        tail = _pack_raw(raw, widths)
        head = _HEAD.pack(span, len(tail))
        return b"".join((head, lengths.tobytes(), states.tobytes(), words[:used].tobytes(), tail))

    def decode(self, data: memoryview, spec: PlaneSpec) -> Codes:
        """Undo :meth:`encode`."""
        if spec.scales is None:
            return _RANS.decode(data, spec)
        scales = checked(spec)
        if len(data) < _HEAD.size:
            raise CorruptError("scaled_rans stream: truncated")
        span, raw_bytes = _HEAD.unpack_from(data)
        groups = -(-spec.size // span) if span and span % GROUP == 0 else 0
        body = len(data) - _HEAD.size - 4 * groups * (1 + GROUP) - raw_bytes
        if not groups or body < 0 or body % 2:
            raise CorruptError("scaled_rans stream: head out of range")
        lengths = np.frombuffer(data, "<u4", groups, _HEAD.size)
        states = np.frombuffer(data, "<u4", groups * GROUP, _HEAD.size + 4 * groups).reshape(groups, GROUP)
        at = _HEAD.size + 4 * groups * (1 + GROUP)
        words = np.frombuffer(data, "<u2", body // 2, at).copy()  # aligned, as compiled code wants it
        ends = np.cumsum(lengths, dtype=np.int64)
        if ends[-1] != len(words):
            raise CorruptError("scaled_rans stream: lengths out of range")
        coded = np.zeros(spec.size, np.uint8)
        starts = np.cumsum(scales.tables, 1) - scales.tables
        arrays = (scales.columns, scales.rows, scales.tables, starts, cpu.slots(scales.tables))
        if not cpu.decode(coded, *arrays, span, words, ends, states.astype(np.uint32)):
            raise CorruptError("scaled_rans stream: a group does not end where it must")
        long, widths = symbols.raw_widths(coded)
        raw = _unpack_raw(data[at + body :], widths)
        return symbols.join(coded, long, raw).reshape(spec.shape)


def checked(spec: PlaneSpec) -> Scales:
    """Return the scales of a plane after checking them.

    Raises:
        MismatchError: The frequency tables are invalid, or the scales do not have the plane's shape.

    """
    scales = spec.scales
    assert scales is not None
    tables = scales.tables
    sound = tables.ndim == 2 and tables.shape[1] == symbols.ALPHABET and len(tables)
    if not sound or (tables < 1).any() or (tables.sum(1) != 1 << PRECISION).any():
        raise MismatchError("the profile's frequency tables are not sound: calibrate again")
    if spec.shape != (1, len(scales.rows), len(scales.columns)):
        raise MismatchError("the profile's scales are for another number of components")
    return scales


def costs(frequencies: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the cost of each symbol of each table in 64ths of a bit, ``[K, 63]``.

    The logarithm is interpolated linearly between powers of two.
    """
    octave = np.frexp(frequencies.astype(np.float64))[1].astype(np.int64) - 1
    found: NDArray[np.int64] = 64 * (PRECISION - octave) - ((64 * (frequencies - (1 << octave))) >> octave)
    return found


def _span(coded: Array, scales: Scales) -> int:
    """Return the number of symbols per group, from an estimate of the payload."""
    payload = cpu.total(coded, scales.columns, scales.rows, costs(scales.tables)) // (64 * 8)
    groups = max(1, payload // GROUP_BYTES)
    return -(-len(coded) // (groups * GROUP)) * GROUP


def _pack_raw(values: Array, widths: Array) -> bytes:
    """Pack values of varying widths one after another, least significant bit first."""
    ends = np.cumsum(widths)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for bit in range(int(widths.max(initial=0))):
        has = widths > bit
        bits[(ends - widths)[has] + bit] = (values[has] >> bit) & 1
    return np.packbits(bits, bitorder="little").tobytes()


def _unpack_raw(data: memoryview, widths: Array) -> Array:
    total = int(widths.sum())
    if len(data) != packed_size(total, 1):
        raise CorruptError("scaled_rans stream: raw bits are missing or too many")
    bits = unpack(data, total, 1)
    starts = np.cumsum(widths) - widths
    values = np.zeros(len(widths), np.int64)
    for bit in range(int(widths.max(initial=0))):
        has = widths > bit
        values[has] |= bits[starts[has] + bit].astype(np.int64) << bit
    return values

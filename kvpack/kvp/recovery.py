"""Open a ``.kvp`` file whose prologue or footer is damaged, or that has other bytes behind its end.

Both say where the header and the index are. Both of these are zlib streams, which say themselves where they end, so a
damaged prologue or footer can be made anew. A header or an index that is damaged itself cannot: they are stored once.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from kvpack.cache import count_parts
from kvpack.cache.untrusted import values_for
from kvpack.errors import CorruptError, FormatError, TruncatedError
from kvpack.formats.captures import cache_spec
from kvpack.formats.input import Source
from kvpack.kvp.features import critical_of
from kvpack.kvp.header import Header
from kvpack.kvp.layout import (
    FOOTER,
    INDEX,
    MAX_HEADER,
    PART_BYTES,
    PROLOGUE,
    STREAM_BYTES,
    inflate,
    inflate_index,
    pack_footer,
    pack_prologue,
    unpack_footer,
    unpack_prologue,
)

SEARCHED = 64 << 20
"""The index is searched in this many bytes at the end of a file."""

TRIES = 16
"""The most places that are inflated in search of the index, so that a file of many such places takes no longer."""

PIECE = 1 << 16
STARTS = (b"\x78\xda", b"\x78\x01")
"""What zlib streams begin with, of the two levels that writers use."""


class Ends(NamedTuple):
    """The prologue and the footer of a file, and the file's size in bytes up to the end of its footer."""

    prologue: bytes
    footer: bytes
    size: int


def own_ends(source: Source) -> Ends:
    """Return the ends of a file as they are."""
    size = source.size
    first, last = source.read(0, min(PROLOGUE.size, size)), source.read(max(size - FOOTER.size, 0), size)
    return Ends(bytes(first), bytes(last), size)


def recover(source: Source) -> tuple[Ends, list[str]]:
    """Return the ends of a file, made anew where they are damaged, and what was found damaged.

    Raises:
        CorruptError: The header is damaged, or the file is not a ``.kvp`` file.
        TruncatedError: There is no whole index.
        UnsupportedError: The file was written by a newer kvpack.

    """
    damage = []
    prologue, footer, size = own_ends(source)
    header = _header_of(source, prologue)
    if header is None:
        damage.append("prologue")
        raw = _stream_at(source, PROLOGUE.size, MAX_HEADER)
        if raw is None:
            raise CorruptError("its header is damaged, or it is not a .kvp file: nothing can be salvaged")
        header = Header.from_bytes(inflate(raw, MAX_HEADER, "header"), values_for(len(raw)))
        prologue = pack_prologue(raw, critical_of(header))
    start = PROLOGUE.size + unpack_prologue(prologue).header_size
    try:
        unpack_footer(footer, size, prologue)
    except FormatError:
        damage.append("footer")
    else:
        return Ends(prologue, footer, size), damage
    cache = cache_spec(header.source_header(values_for(start - PROLOGUE.size)), header.origin)
    count = count_parts(cache, header.chunk_tokens)
    for at in islice(_candidates(source, start, count), TRIES):
        found = _stream_at(source, at, SEARCHED)
        if found is not None and _fills(found, count, start, at):
            footer = pack_footer(found, at, prologue)
            return Ends(prologue, footer, at + len(found) + FOOTER.size), damage
    raise TruncatedError("the file has no whole index, which says where its parts are: nothing can be salvaged")


def _header_of(source: Source, prologue: bytes) -> Header | None:
    """Return the header that the prologue describes, or None if that is not what follows it."""
    try:
        _, _, length, crc = unpack_prologue(prologue)
        raw = bytes(source.read(PROLOGUE.size, min(PROLOGUE.size + length, source.size)))
        if zlib.crc32(raw) != crc:
            return None
        return Header.from_bytes(inflate(raw, MAX_HEADER, "header"), values_for(length))
    except FormatError:
        return None


def _stream_at(source: Source, start: int, limit: int) -> bytes | None:
    """Return the bytes of the zlib stream that begins at ``start``, of at most ``limit`` bytes, if it is whole."""
    engine = zlib.decompressobj()
    pieces: list[bytes] = []
    held = 0
    try:
        stop = min(start + limit, source.size)
        for at in range(start, stop, PIECE):
            piece = bytes(source.read(at, min(at + PIECE, stop)))
            rest: bytes = piece
            while rest and not engine.eof:
                held += len(engine.decompress(rest, PIECE))
                rest = engine.unconsumed_tail
                if held > MAX_HEADER:
                    return None
            if engine.eof:
                return b"".join([*pieces, piece[: len(piece) - len(engine.unused_data)]])
            pieces.append(piece)
    except zlib.error:
        return None
    return None


def _candidates(source: Source, start: int, count: int) -> Iterator[int]:
    """Yield the places where an index of ``count`` parts may begin, the last one first."""
    first = max(start, source.size - SEARCHED)
    tail = bytes(source.read(first, max(first, source.size)))
    places = (at for mark in STARTS for at in _places(tail, mark))
    for at in sorted(places, reverse=True):
        try:
            begin = zlib.decompressobj().decompress(tail[at : at + 64], INDEX.size)
        except zlib.error:
            continue
        if len(begin) == INDEX.size and INDEX.unpack(begin)[0] == count:
            yield first + at


def _places(data: bytes, mark: bytes) -> Iterator[int]:
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


def _fills(raw: bytes, count: int, start: int, stop: int) -> bool:
    """Return whether the streams of an index fill the bytes from ``start`` to ``stop``."""
    try:
        index = inflate_index(raw, count, stop - start)
    except FormatError:
        return False
    parts, streams = INDEX.unpack_from(index)
    if len(index) != INDEX.size + PART_BYTES * parts + STREAM_BYTES * streams:
        return False
    sizes = struct.unpack_from(f"<{streams}Q", index, INDEX.size + PART_BYTES * parts + streams)
    return bool(start + sum(sizes) == stop)

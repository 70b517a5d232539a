"""The byte tables of ``docs/format.md``: the prologue, the index, the footer, and the canonical order of parts."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvpack.cache import PartSpec
from kvpack.errors import CorruptError, FormatError, TruncatedError, UnsupportedError
from kvpack.formats.kinds import KVP, instead
from kvpack.kvp.features import KNOWN_CRITICAL, VERSION, written_version

MAGIC = KVP + b"\r\n\x1a\n"
END_MAGIC = b"\x89KVPEND\n"
INDEX = struct.Struct("<II")
PART_BYTES, STREAM_BYTES = 10, 17
"""Bytes of an inflated index for each part and for each stream, after its two counts."""

PROLOGUE = struct.Struct("<8sHHIIIII")
FOOTER = struct.Struct("<QIIQII8s")
MAX_HEADER = 1 << 27
"""The largest size of the header in bytes, both deflated and inflated."""
MAX_INDEX = 1 << 30
MAX_EXPANSION = 1 << 20
"""The largest ratio of the original's size to the file's, so that a tiny file cannot make a reader allocate terabytes.
"""


FREE_EXPANSION = 1 << 22
"""A header or an index of up to this many bytes may be deflated to any size."""

MAX_DEFLATION = 256
"""The largest ratio by which a longer header or index may be deflated. Writers store those that exceed it undeflated.

Digests and checksums do not deflate at all, and names and offsets by a factor of 10 to 20.
"""


class Record(NamedTuple):
    """A stream's entry in the index: its kind (a position in the header's names), size in bytes, and checksum."""

    kind: int
    size: int
    checksum: int


@dataclass(frozen=True, slots=True)
class PartEntry:
    """A part's entry in the index: its codec, its original's checksum, and its streams with absolute offsets."""

    spec: PartSpec
    codec: int
    digest: int
    streams: tuple[tuple[Record, int], ...]


class Prologue(NamedTuple):
    """The contents of the fixed first bytes of a file.

    These are the format's version, the bits of the critical features that the file uses, and the length and CRC-32 of
    its deflated header.
    """

    version: tuple[int, int]
    critical: int
    header_size: int
    header_crc: int


def pack_prologue(header: bytes, critical: int = 0) -> bytes:
    """Return a file's fixed first bytes, from its deflated header and the bits of the critical features it uses.

    The version is the oldest one that has these features, so a file without any of them has format 1.0.
    """
    version = written_version(critical)
    body = PROLOGUE.pack(MAGIC, *version, critical, 0, len(header), zlib.crc32(header), 0)[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def unpack_prologue(raw: bytes) -> Prologue:
    """Read and check the fixed first bytes of a file.

    Raises:
        FormatError: The file is not a ``.kvp`` file.
        TruncatedError: The file ends within its prologue.
        CorruptError: The prologue is damaged.
        UnsupportedError: The file was written by a newer kvpack, or before format 1.0.

    """
    if raw[:8] != MAGIC[: len(raw[:8])] or not raw:
        raise FormatError(f"not a .kvp file{'' if raw.startswith(KVP) else instead(raw[:9])}")
    if len(raw) < PROLOGUE.size:
        raise TruncatedError("truncated: the file ends within its prologue")
    _, major, minor, critical, _, length, crc, own = PROLOGUE.unpack(raw)
    if zlib.crc32(raw[:-4]) != own:
        raise CorruptError("corrupt: the prologue's checksum does not match")
    if major != VERSION[0]:
        older = "written by a kvpack before format 1.0: compress it again" if major == 0 else "upgrade kvpack"
        raise UnsupportedError(f"format {major}.{minor} is not {VERSION[0]}, which this reads: {older}")
    if critical & ~KNOWN_CRITICAL:
        unknown = critical & ~KNOWN_CRITICAL
        raise UnsupportedError(f"uses features this kvpack does not know (bits {unknown:#x}): upgrade kvpack")
    return Prologue((major, minor), critical, length, crc)


def deflate(data: bytes) -> bytes:
    """Return a header or an index as a zlib stream, which :func:`inflate` accepts whatever the data is."""
    small = zlib.compress(data, 9)
    return small if len(data) <= _inflated_limit(len(small)) else zlib.compress(data, 0)


def _inflated_limit(size: int) -> int:
    """Return how many bytes a zlib stream of ``size`` bytes may hold."""
    return max(FREE_EXPANSION, size * MAX_DEFLATION)


def inflate(raw: bytes, limit: int, what: str) -> bytes:
    """Inflate a zlib stream to at most ``limit`` bytes, and to no more than is in proportion to its own size.

    Raises:
        CorruptError: It is not a zlib stream.
        FormatError: It holds more than it may, or is followed by other data.

    """
    engine = zlib.decompressobj()
    try:
        data = engine.decompress(raw, min(limit, _inflated_limit(len(raw))))
    except zlib.error:
        raise CorruptError(f"corrupt: the {what} does not inflate") from None
    if not engine.eof or engine.unused_data:
        raise FormatError(f"the {what} is longer than it may be, or followed by unknown data")
    return data


def inflate_index(raw: bytes, parts: int, room: int) -> bytes:
    """Inflate an index of ``parts`` parts, whose streams lie in ``room`` bytes, after checking its counts.

    A stream has at least one byte, so there are no more streams than bytes. Nothing is inflated beyond the counts
    before they have been compared with the header's tensors and the file's size.

    Raises:
        CorruptError: It is not a zlib stream.
        FormatError: The counts are not those of the header, or they do not fit the file.

    """
    try:
        start = zlib.decompressobj().decompress(raw, INDEX.size)
    except zlib.error:
        raise CorruptError("corrupt: the index does not inflate") from None
    if len(start) < INDEX.size:
        raise FormatError("the index is too short")
    found, streams = INDEX.unpack(start)
    if found != parts or streams > room:
        raise FormatError(
            f"the index has {found} parts and {streams} streams, the header's tensors make {parts} parts, "
            f"and the streams lie in {room} bytes"
        )
    return inflate(raw, min(MAX_INDEX, INDEX.size + PART_BYTES * parts + STREAM_BYTES * streams), "index")


def pack_index(parts: Sequence[tuple[int, int, Sequence[Record]]]) -> bytes:
    """Return the deflated index, stored in columns, of parts given as (codec, digest, streams)."""
    records = [record for _, _, streams in parts for record in streams]
    columns = (
        struct.pack("<II", len(parts), len(records)),
        bytes(codec for codec, _, _ in parts),
        bytes(len(streams) for _, _, streams in parts),
        struct.pack(f"<{len(parts)}Q", *(digest for _, digest, _ in parts)),
        bytes(record.kind for record in records),
        struct.pack(f"<{len(records)}Q", *(record.size for record in records)),
        struct.pack(f"<{len(records)}Q", *(record.checksum for record in records)),
    )
    return deflate(b"".join(columns))


def unpack_index(raw: bytes, specs: Sequence[PartSpec], start: int, stop: int) -> list[PartEntry]:
    """Return the parts of an inflated index, whose streams must exactly fill the bytes ``start`` to ``stop``.

    Raises:
        FormatError: The index contradicts the header or itself.

    """
    if len(raw) < 8:
        raise FormatError("the index is too short")
    parts, streams = INDEX.unpack_from(raw)
    columns = struct.Struct(f"<{parts}s{parts}s{parts}Q{streams}s{streams}Q{streams}Q")
    if parts != len(specs) or len(raw) != 8 + columns.size:
        raise FormatError("the index does not match the header's tensors")
    codecs, counts, *numbers = columns.unpack_from(raw, 8)
    digests, kinds = numbers[:parts], numbers[parts]
    sizes, checksums = numbers[parts + 1 : parts + 1 + streams], numbers[parts + 1 + streams :]
    if sum(counts) != streams or start + sum(sizes) != stop:
        raise FormatError("the index's streams do not fill the file")
    records = iter(map(Record, kinds, sizes, checksums))
    offsets = _running(start, sizes)
    return [
        PartEntry(spec, codec, digest, tuple((next(records), next(offsets)) for _ in range(count)))
        for spec, codec, count, digest in zip(specs, codecs, counts, digests, strict=True)
    ]


def _running(start: int, sizes: Sequence[int]) -> Iterator[int]:
    for size in sizes:
        yield start
        start += size


def pack_footer(index: bytes, offset: int, prologue: bytes) -> bytes:
    """Return the file's fixed last bytes, for a deflated index at ``offset``."""
    total = offset + len(index) + FOOTER.size
    crcs = zlib.crc32(index), int.from_bytes(prologue[-4:], "little")
    body = FOOTER.pack(offset, len(index), crcs[0], total, crcs[1], 0, END_MAGIC)[: FOOTER.size - 12]
    return body + zlib.crc32(body).to_bytes(4, "little") + END_MAGIC


def unpack_footer(raw: bytes, size: int, prologue: bytes) -> tuple[int, int, int]:
    """Return the offset, length and CRC-32 of the deflated index, in a file of ``size`` bytes.

    Raises:
        TruncatedError, CorruptError: The footer is missing or damaged.

    """
    if len(raw) < FOOTER.size or raw[-8:] != END_MAGIC:
        raise TruncatedError("truncated: the file does not end with its footer")
    offset, length, crc, total, prologue_crc, own, _ = FOOTER.unpack(raw)
    if zlib.crc32(raw[:-12]) != own:
        raise CorruptError("corrupt: the footer's checksum does not match")
    if total != size or offset + length + FOOTER.size != total:
        raise TruncatedError(f"truncated or extended: {total} bytes expected, {size} found")
    if prologue_crc != int.from_bytes(prologue[-4:], "little"):
        raise CorruptError("corrupt: prologue and footer are of different files")
    return offset, length, crc

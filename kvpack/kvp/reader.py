"""Opens a ``.kvp`` file: prologue, header, footer and index checked, streams by range."""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path

from kvpack.errors import CorruptError, FormatError, TruncatedError, UnsupportedError
from kvpack.formats.safetensors import Header as SourceHeader
from kvpack.kvp.header import Header
from kvpack.kvp.layout import (
    FOOTER,
    MAX_EXPANSION,
    MAX_HEADER,
    MAX_INDEX,
    PROLOGUE,
    PartEntry,
    Record,
    inflate,
    plan_parts,
    unpack_footer,
    unpack_index,
    unpack_prologue,
)


class Container:
    """A ``.kvp`` file, memory-mapped read-only.

    ``header``, ``source`` (the safetensors header of what was compressed) and ``parts`` are checked on opening;
    a stream's checksum when it is read. ``view`` is the whole file.
    """

    def __init__(self, view: memoryview) -> None:
        """Check everything but the streams; ``view`` is the whole file.

        Raises:
            FormatError, TruncatedError, CorruptError: not a sound ``.kvp`` file.
            UnsupportedError: written by a newer kvpack.

        """
        self.view = view
        size = len(view)
        prologue = bytes(view[: PROLOGUE.size])
        self.version, length, crc = unpack_prologue(prologue)
        start = PROLOGUE.size + length
        if start + FOOTER.size > size:
            raise TruncatedError("truncated: the file ends within its header")
        offset, index_length, index_crc = unpack_footer(bytes(view[-FOOTER.size :]), size, prologue)
        if offset < start or length > MAX_HEADER:
            raise FormatError("header and index overlap, or the header is too long")
        raw_header = self._checked(PROLOGUE.size, length, crc, "header")
        raw_index = self._checked(offset, index_length, index_crc, "index")
        self.header = Header.from_bytes(inflate(raw_header, MAX_HEADER, "header"))
        self.source: SourceHeader = self.header.source_header()
        self.size, self.header_size, self.index_size = size, start, size - offset
        if self.source.file_size > size * MAX_EXPANSION:
            raise FormatError(f"claims to hold {self.source.file_size} bytes, more than {MAX_EXPANSION} times its size")
        plans = plan_parts(self.source, self.header.chunk_tokens)
        index = inflate(raw_index, MAX_INDEX, "index")
        self.parts: list[PartEntry] = unpack_index(index, plans, start, offset)
        for part in self.parts:
            self._check_part(part)

    @classmethod
    def open(cls, path: Path) -> Container:
        """Map ``path``; raises as the constructor, with the path in the message."""
        with path.open("rb") as file:
            empty = not file.seek(0, 2)
            view = memoryview(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        try:
            return cls(view)
        except (FormatError, UnsupportedError) as error:
            raise type(error)(f"{path}: {error}") from None

    def _checked(self, offset: int, length: int, crc: int, what: str) -> bytes:
        raw = bytes(self.view[offset : offset + length])
        if zlib.crc32(raw) != crc:
            raise CorruptError(f"corrupt: the checksum of the {what} does not match")
        return raw

    def _check_part(self, part: PartEntry) -> None:
        if part.codec >= len(self.header.codecs):
            raise FormatError(f"{part.plan.name}: codec {part.codec} is not in the header")
        if any(record.kind >= len(self.header.streams) for record, _ in part.streams):
            raise FormatError(f"{part.plan.name}: a stream's kind is not in the header")

    def stream_name(self, record: Record) -> str:
        """The name of a stream's kind."""
        return self.header.streams[record.kind]

    def places(self, part: PartEntry) -> list[tuple[int, int]]:
        """Offsets and sizes of a part's streams in the file."""
        return [(offset, record.size) for record, offset in part.streams]

    def streams(self, part: PartEntry) -> list[tuple[str, memoryview, int]]:
        """Names, bytes and checksums of a part's streams; nothing is verified."""
        every = [(record, self.view[offset : offset + record.size]) for record, offset in part.streams]
        return [(self.stream_name(record), data, record.checksum) for record, data in every]

    def read(self, part: PartEntry) -> list[tuple[str, memoryview]]:
        """Names and bytes of a part's streams, their checksums verified.

        Raises:
            CorruptError: a checksum does not match.

        """
        from kvpack.numerics.checksum import checksum  # here, because it takes numba and inspect reads no streams

        streams = []
        for name, data, expected in self.streams(part):
            if checksum(data) != expected:
                raise CorruptError(f"corrupt: the checksum of {part.plan.name}, stream {name!r}, does not match")
            streams.append((name, data))
        return streams

"""Opens a ``.kvp`` file: checks its prologue, header, footer and index, and reads single streams of it."""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path

from kvpack.errors import CorruptError, FormatError, TruncatedError, UnsupportedError
from kvpack.formats.safetensors import Header as SourceHeader
from kvpack.kvp.features import critical_of, names_of
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
    """A ``.kvp`` file, mapped into memory for reading.

    ``version`` and ``critical`` are the format's version and the bits of critical features, from the prologue.
    ``header``, ``source`` (the safetensors header of what was compressed) and ``parts`` are checked when the file is
    opened, a stream's checksum when the stream is read. ``view`` is the whole file.
    """

    def __init__(self, view: memoryview) -> None:
        """Check everything but the streams of a file, whose bytes ``view`` is.

        Raises:
            FormatError: The file is not a ``.kvp`` file, or it breaks the format.
            TruncatedError: The file ends early.
            CorruptError: A checksum does not match.
            UnsupportedError: The file was written by a newer kvpack.

        """
        self.view = view
        size = len(view)
        prologue = bytes(view[: PROLOGUE.size])
        self.version, self.critical, length, crc = unpack_prologue(prologue)
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
        if unsaid := critical_of(self.source) & ~self.critical:
            raise FormatError(f"uses {', '.join(names_of(unsaid))}, and its prologue does not say so")
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
        """Map ``path`` into memory and check it. Errors are those of the constructor, and name the path."""
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
        """The name of the kind that a stream is of."""
        return self.header.streams[record.kind]

    def places(self, part: PartEntry) -> list[tuple[int, int]]:
        """The offset and size of each of a part's streams in the file."""
        return [(offset, record.size) for record, offset in part.streams]

    def streams(self, part: PartEntry) -> list[tuple[str, memoryview, int]]:
        """The name, bytes and checksum of each of a part's streams. Nothing is verified."""
        every = [(record, self.view[offset : offset + record.size]) for record, offset in part.streams]
        return [(self.stream_name(record), data, record.checksum) for record, data in every]

    def read(self, part: PartEntry) -> list[tuple[str, memoryview]]:
        """The name and bytes of each of a part's streams, after their checksums were verified.

        Raises:
            CorruptError: A checksum does not match.

        """
        # This is imported here because it takes numba, which ``kvpack inspect`` does without.
        from kvpack.numerics.checksum import checksum

        streams = []
        for name, data, expected in self.streams(part):
            if checksum(data) != expected:
                raise CorruptError(f"corrupt: the checksum of {part.plan.name}, stream {name!r}, does not match")
            streams.append((name, data))
        return streams

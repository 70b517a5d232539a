"""Open a ``.kvp`` file: check its prologue, header, footer and index, and read single streams."""

from __future__ import annotations

import mmap
import zlib
from itertools import accumulate
from pathlib import Path

from kvpack.cache import count_parts, windows
from kvpack.cache.untrusted import values_for
from kvpack.errors import CorruptError, FormatError, TruncatedError, naming
from kvpack.formats.captures import cache_spec
from kvpack.formats.safetensors import Header as SourceHeader
from kvpack.kvp.features import critical_of, names_of
from kvpack.kvp.frame import Frame, FramePart, Stream
from kvpack.kvp.header import Header
from kvpack.kvp.layout import (
    FOOTER,
    MAX_EXPANSION,
    MAX_HEADER,
    PROLOGUE,
    PartEntry,
    Record,
    inflate,
    inflate_index,
    unpack_footer,
    unpack_index,
    unpack_prologue,
)
from kvpack.kvp.recovery import Ends, recover


class Container:
    """A ``.kvp`` file that is mapped into memory for reading.

    ``version`` and ``critical`` are the format's version and the bits of critical features, from the prologue.
    ``header``, ``source`` (the safetensors header of the original), ``cache`` (the cache that it describes),
    ``windows`` and ``parts`` are checked when the file is opened. Checksums of streams are verified by the decoder.
    ``view`` is the whole file.
    """

    def __init__(self, view: memoryview, ends: Ends | None = None) -> None:
        """Check everything in the file's bytes ``view`` except the streams.

        ``ends`` are a prologue and a footer to take instead of the file's own (:mod:`kvpack.kvp.recovery`).

        Raises:
            FormatError: The file is not a ``.kvp`` file, or it breaks the format.
            TruncatedError: The file ends early.
            CorruptError: A checksum does not match.
            UnsupportedError: The file was written by a newer kvpack.

        """
        self.view = view
        self.damage: list[str] = []
        prologue, footer, size = ends or Ends(bytes(view[: PROLOGUE.size]), bytes(view[-FOOTER.size :]), len(view))
        self.version, self.critical, length, crc = unpack_prologue(prologue)
        start = PROLOGUE.size + length
        if start + FOOTER.size > size:
            raise TruncatedError("truncated: the file ends within its header")
        offset, index_length, index_crc = unpack_footer(footer, size, prologue)
        if offset < start or length > MAX_HEADER:
            raise FormatError("header and index overlap, or the header is too long")
        raw_header = self._checked(PROLOGUE.size, length, crc, "header")
        raw_index = self._checked(offset, index_length, index_crc, "index")
        most = values_for(length)
        self.header = Header.from_bytes(inflate(raw_header, MAX_HEADER, "header"), most)
        self.source: SourceHeader = self.header.source_header(most)
        if unsaid := critical_of(self.header) & ~self.critical:
            raise FormatError(f"uses {', '.join(names_of(unsaid))}, and its prologue does not say so")
        self.size, self.header_size, self.index_size = size, start, size - offset
        if self.source.file_size > size * MAX_EXPANSION:
            raise FormatError(f"claims to hold {self.source.file_size} bytes, more than {MAX_EXPANSION} times its size")
        self.cache = cache_spec(self.source, self.header.origin)
        count = count_parts(self.cache, self.header.chunk_tokens)
        index = inflate_index(raw_index, count, offset - start)
        self.windows = list(windows(self.cache, self.header.chunk_tokens))
        specs = [part for window in self.windows for part in window.parts]
        self.parts: list[PartEntry] = unpack_index(index, specs, start, offset)
        self._starts = [0, *accumulate(len(window.parts) for window in self.windows)]
        for part in self.parts:
            self._check_part(part)

    @classmethod
    def open(cls, path: Path, name: str | None = None, *, damaged: bool = False) -> Container:
        """Map ``path`` into memory. Errors are those of the constructor, with ``name`` or the path in the message.

        With ``damaged``, a damaged prologue or footer is made anew if that is possible (:mod:`kvpack.kvp.recovery`).
        :attr:`damage` then names them.
        """
        with path.open("rb") as file:
            empty = not file.seek(0, 2)
            view = memoryview(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        with naming(name or str(path)):
            if not damaged:
                return cls(view)
            ends, damage = recover(view)
            found = cls(view, ends)
        found.damage = damage
        return found

    def _checked(self, offset: int, length: int, crc: int, what: str) -> bytes:
        raw = bytes(self.view[offset : offset + length])
        if zlib.crc32(raw) != crc:
            raise CorruptError(f"corrupt: the checksum of the {what} does not match")
        return raw

    def _check_part(self, part: PartEntry) -> None:
        if part.codec >= len(self.header.codecs):
            raise FormatError(f"{part.spec.label}: codec {part.codec} is not in the header")
        if any(record.kind >= len(self.header.streams) for record, _ in part.streams):
            raise FormatError(f"{part.spec.label}: a stream's kind is not in the header")

    def stream_name(self, record: Record) -> str:
        """Return the name of the stream's kind."""
        return self.header.streams[record.kind]

    def frame(self, window: int) -> Frame:
        """Return a window as the file stores it, without verifying anything."""
        entries = self.parts[self._starts[window] : self._starts[window + 1]]
        return Frame(self.windows[window], tuple(map(self.part, entries)))

    def one(self, window: int, at: int) -> Frame:
        """Return one part of a window as the file stores it, without verifying anything."""
        entry = self.parts[self._starts[window] + at]
        return Frame(self.windows[window].take(slice(at, at + 1)), (self.part(entry),))

    def part(self, entry: PartEntry) -> FramePart:
        """Return a part as the file stores it, without verifying anything."""
        names, view = self.header.streams, self.view
        streams = tuple([Stream(names[r.kind], view[at : at + r.size], r.checksum) for r, at in entry.streams])
        joined = None
        if streams:
            last, start = entry.streams[-1]
            joined = view[entry.streams[0][1] : start + last.size]
        return FramePart(entry.codec, entry.digest, streams, joined)

    def verify(self, entry: PartEntry) -> None:
        """Check the checksums of a part's streams.

        Raises:
            CorruptError: A checksum does not match.

        """
        # Imported here because it needs numba, which ``kvpack inspect`` does not load.
        from kvpack.numerics.checksum import checksum

        for name, data, expected in self.part(entry).streams:
            if checksum(data) != expected:
                raise CorruptError(f"corrupt: the checksum of {entry.spec.label}, stream {name!r}, does not match")

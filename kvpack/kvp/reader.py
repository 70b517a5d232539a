"""Open a ``.kvp`` file: check its prologue, header, footer and index, and read single streams."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from kvpack.cache import count_parts, windows
from kvpack.cache.untrusted import values_for
from kvpack.errors import CorruptError, FormatError, TruncatedError, naming
from kvpack.formats.captures import cache_spec
from kvpack.formats.input import InputFile, Source, source_of
from kvpack.formats.safetensors import Header as SourceHeader
from kvpack.kvp.features import critical_of, names_of
from kvpack.kvp.frame import FramePart, Stream
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
from kvpack.kvp.recovery import Ends, own_ends, recover


class Stored:
    """Neighbouring parts as they are stored in a file, whose streams lie in a row: bytes ``[start, stop)``.

    Calling it reads them. ``source`` is the file, and ``names`` are the names of its streams' kinds.
    """

    def __init__(self, source: Source, names: Sequence[str], entries: tuple[PartEntry, ...]) -> None:
        """Take the parts' entries in the index."""
        self.source, self._names, self._entries = source, names, entries
        streams = [stream for entry in entries for stream in entry.streams]
        self.start = streams[0][1] if streams else 0
        self.stop = streams[-1][1] + streams[-1][0].size if streams else 0

    def __call__(self) -> tuple[FramePart, ...]:
        """Read the parts. The errors are those of :meth:`kvpack.formats.input.Source.read`."""
        return self.within(self.source.read(self.start, self.stop), self.start)

    def within(self, data: memoryview, start: int) -> tuple[FramePart, ...]:
        """Return the parts as views of the file's bytes ``data``, which begin at ``start``."""
        return tuple(self._part(entry, data, start) for entry in self._entries)

    def _part(self, entry: PartEntry, data: memoryview, start: int) -> FramePart:
        if not entry.streams:
            return FramePart(entry.codec, entry.digest, ())
        streams = tuple(
            [Stream(self._names[r.kind], data[at - start : at - start + r.size], r.checksum) for r, at in entry.streams]
        )
        first, (last, at) = entry.streams[0][1], entry.streams[-1]
        return FramePart(entry.codec, entry.digest, streams, data[first - start : at + last.size - start])


class Container:
    """A ``.kvp`` file that is open for reading.

    ``version`` and ``critical`` are the format's version and the bits of critical features, from the prologue.
    ``header``, ``source`` (the safetensors header of the original), ``cache`` (the cache that it describes),
    ``windows`` and ``parts`` are checked when the file is opened. Checksums of streams are verified by the decoder.
    """

    def __init__(self, data: Source | memoryview, ends: Ends | None = None) -> None:
        """Check everything in the file's bytes ``data`` except the streams.

        ``ends`` are a prologue and a footer to take instead of the file's own (:mod:`kvpack.kvp.recovery`).

        Raises:
            FormatError: The file is not a ``.kvp`` file, or it breaks the format.
            TruncatedError: The file ends early.
            CorruptError: A checksum does not match.
            UnsupportedError: The file was written by a newer kvpack.

        """
        self._source = source_of(data)
        self.damage: list[str] = []
        prologue, footer, size = ends or own_ends(self._source)
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
        """Open ``path``. Errors are those of the constructor, with ``name`` or the path in the message.

        With ``damaged``, a damaged prologue or footer is made anew if that is possible (:mod:`kvpack.kvp.recovery`).
        :attr:`damage` then names them.
        """
        return cls.of(InputFile(path, name), damaged=damaged)

    @classmethod
    def of(cls, file: InputFile, *, damaged: bool = False) -> Container:
        """Check a file that is open already. Arguments and errors are those of :meth:`open`."""
        with naming(file.name):
            if not damaged:
                return cls(file)
            ends, damage = recover(file)
            found = cls(file, ends)
        found.damage = damage
        return found

    def _checked(self, offset: int, length: int, crc: int, what: str) -> bytes:
        raw = bytes(self._source.read(offset, offset + length))
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

    def entries(self, window: int) -> list[PartEntry]:
        """Return what the index says of a window's parts."""
        return self.parts[self._starts[window] : self._starts[window + 1]]

    def stored(self, window: int, which: slice = slice(None)) -> Stored:
        """Return a window, or a run of its parts, as something that can be read."""
        return Stored(self._source, self.header.streams, tuple(self.entries(window)[which]))

    def part(self, entry: PartEntry) -> FramePart:
        """Read a part as the file stores it, without verifying anything."""
        return Stored(self._source, self.header.streams, (entry,))()[0]

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

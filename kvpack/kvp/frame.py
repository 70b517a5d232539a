"""A frame: a window encoded, which is streams with their checksums and nothing of files."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvpack.cache import WindowSpec


class Stream(NamedTuple):
    """A stream: the name of its kind, its bytes, and their checksum. Whoever decodes the bytes verifies them first."""

    name: str
    data: Any
    checksum: int


class FramePart(NamedTuple):
    """A part encoded: which of the file's codecs has coded it, the checksum of its original, and its streams.

    ``joined`` are the bytes of all streams, one behind another, where they lie so in memory; else None.
    """

    codec: int
    digest: int
    streams: tuple[Stream, ...]
    joined: Any = None


class Frame(NamedTuple):
    """A window, or a block of it, encoded."""

    spec: WindowSpec
    parts: tuple[FramePart, ...]

    def take(self, which: slice) -> Frame:
        """Some neighbouring parts."""
        return Frame(self.spec.take(which), self.parts[which])

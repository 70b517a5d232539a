"""A frame is an encoded window: streams with their checksums. It does not depend on files."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvpack.cache import WindowSpec


class Stream(NamedTuple):
    """A stream: the name of its kind, its bytes, and their checksum. The decoder verifies the bytes first."""

    name: str
    data: Any
    checksum: int


class FramePart(NamedTuple):
    """An encoded part: the number of its codec in the file, its original's checksum, and its streams.

    ``joined`` holds the bytes of all streams if they are contiguous in memory, and is None otherwise.
    """

    codec: int
    digest: int
    streams: tuple[Stream, ...]
    joined: Any = None


class Frame(NamedTuple):
    """An encoded window, or an encoded block of one."""

    spec: WindowSpec
    parts: tuple[FramePart, ...]

    def take(self, which: slice) -> Frame:
        """Return a frame of a run of neighbouring parts."""
        return Frame(self.spec.take(which), self.parts[which])

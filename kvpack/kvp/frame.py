"""A frame is an encoded window: streams with their checksums. It does not depend on files."""

from __future__ import annotations

from typing import Any, NamedTuple


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

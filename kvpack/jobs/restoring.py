"""Find out whether a ``.kvp`` file gives its original back, by the very path that decompresses it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO, cast

from kvpack.engine import Engine
from kvpack.errors import KvpackError
from kvpack.formats.input import InputFile
from kvpack.jobs.decompression import Selection, decompress
from kvpack.jobs.reader import KvpFile


class _Comparison(io.RawIOBase):
    """An output that keeps nothing. It compares what is written with the same place of ``original``, if there is one.

    ``written`` is the number of bytes written, ``end`` the position behind the last one.
    """

    def __init__(self, original: InputFile | None) -> None:
        self._original = original
        self._at = self.written = self.end = 0

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset
        return offset

    def write(self, data: Any) -> int:
        piece = memoryview(data).cast("B")
        stop = self._at + len(piece)
        if self._original is not None and not self._same(piece, stop):
            raise KvpackError(f"decompressing it gives other bytes than the original's {self._at} to {stop}")
        self._at, self.written, self.end = stop, self.written + len(piece), max(self.end, stop)
        return len(piece)

    def _same(self, piece: memoryview, stop: int) -> bool:
        original = self._original
        return original is not None and stop <= original.size and original.read(self._at, stop) == piece


def require_restorable(
    file: KvpFile, original: Path | None, engine: Engine, selection: Selection | None = None
) -> None:
    """Decompress ``file`` without storing it, and compare the result with the bytes of ``original``.

    ``original`` is None if the file cannot give it back bit for bit, because its codec is lossy or tensors were left
    out. Then everything is decoded and checked, and only the size of the result is compared with what its header says.

    Raises:
        KvpackError: The result is not the original, or the file cannot be decompressed.

    """
    opened = None if original is None else InputFile(original)
    comparison = _Comparison(opened)
    decompress(file, cast(BinaryIO, comparison), selection, engine=engine)
    expected = file.container.source.file_size if opened is None else opened.size
    if not comparison.written == comparison.end == expected:
        raise KvpackError(f"decompressing it gives {comparison.written} bytes, not {expected}")

"""Write a ``.kvp`` file in one pass, so that the output may be a pipe."""

from __future__ import annotations

from typing import BinaryIO

from kvpack.errors import FormatError
from kvpack.kvp.features import critical_of
from kvpack.kvp.frame import FramePart
from kvpack.kvp.header import Header
from kvpack.kvp.layout import MAX_HEADER, Record, deflate, pack_footer, pack_index, pack_prologue


class ContainerWriter:
    """Writes a file's header, then its parts in canonical order, and with :meth:`finish` the index and the footer."""

    def __init__(self, output: BinaryIO, header: Header) -> None:
        """Write the prologue and the header. The header determines which critical features the prologue lists.

        Raises:
            FormatError: The header is longer than the format allows.

        """
        raw = header.to_bytes()
        if len(raw) > MAX_HEADER:
            raise FormatError(f"the header would take {len(raw)} bytes, more than {MAX_HEADER}")
        deflated = deflate(raw)
        self._output = output
        self._kinds = {name: i for i, name in enumerate(header.streams)}
        self._prologue = pack_prologue(deflated, critical_of(header))
        self._parts: list[tuple[int, int, list[Record]]] = []
        self._offset = 0
        self._write(self._prologue)
        self._write(deflated)

    def _write(self, data: bytes) -> None:
        self._output.write(data)
        self._offset += len(data)

    def add(self, part: FramePart) -> None:
        """Write the streams of the next part."""
        records = []
        for name, data, total in part.streams:
            records.append(Record(self._kinds[name], len(data), total))
            self._write(data)
        self._parts.append((part.codec, part.digest, records))

    def finish(self) -> int:
        """Write the index and the footer, and return the file's size in bytes."""
        index = pack_index(self._parts)
        footer = pack_footer(index, self._offset, self._prologue)
        self._write(index)
        self._write(footer)
        return self._offset

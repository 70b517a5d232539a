"""Every bit of a small file of every codec, and every length: whatever is changed is noticed."""

from __future__ import annotations

import paths  # noqa: F401
import pytest
from samples import NAMES, sample

from kvpack.engine.cpu import decode_block
from kvpack.errors import CorruptError, FormatError, UnsupportedError
from kvpack.kvp import Container

SHORT = {"lossless", "fisher-5", "replay-fast"}
EVERY = [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in NAMES]


@pytest.mark.parametrize("name", EVERY)
def test_every_bit(name: str) -> None:
    """Those of streams are noticed when their block is decoded, all others when the file is opened.

    The file is opened once for all streams, whose bytes opening does not look at.
    """
    data = bytearray(sample(name).data)
    found = sample(name).open(data)
    start, stop = found.container.header_size, len(data) - found.container.index_size
    seen = 0
    for task in found.tasks():
        for part in task.parts:
            for stream in part.streams:
                for at in range(len(stream.data)):
                    for bit in range(8):
                        stream.data[at] ^= 1 << bit
                        with pytest.raises(CorruptError):
                            decode_block(task)
                        stream.data[at] ^= 1 << bit
                    seen += 1
    assert seen == stop - start
    assert data == sample(name).data
    for at in (*range(start), *range(stop, len(data))):
        for bit in range(8):
            data[at] ^= 1 << bit
            with pytest.raises((FormatError, UnsupportedError)):
                Container(memoryview(data))
            data[at] ^= 1 << bit


@pytest.mark.parametrize("name", EVERY)
def test_every_length(name: str) -> None:
    data = memoryview(sample(name).data)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            Container(data[:length])

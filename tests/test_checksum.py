"""The 64-bit sum of streams and originals, against its definition in ``docs/format.md``."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvpack.numerics.checksum import checksum


@given(st.binary(max_size=100))
def test_checksum_is_its_definition(data: bytes) -> None:
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    total = sum(mix((w + (i + 1) * 0x9E3779B97F4A7C15) & mask) for i, w in enumerate(words)) + len(data)
    assert checksum(data) == total & mask
    assert checksum(memoryview(b"x" + data)[1:]) == total & mask

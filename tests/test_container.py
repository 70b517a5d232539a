"""Attacks on the container: whatever the bytes, one clear error and nothing else."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, write_tensors
from hypothesis import given
from hypothesis import strategies as st

from kvpack import jobs
from kvpack.codecs.recipes import CODECS
from kvpack.engine import CpuEngine
from kvpack.errors import CorruptError, FormatError, KvpackError, TruncatedError, UnsupportedError
from kvpack.jobs.reader import KvpFile, open_cache
from kvpack.kvp import Container, layout
from kvpack.kvp.header import Header
from kvpack.kvp.layout import FOOTER, MAGIC, PROLOGUE, pack_footer, pack_index, pack_prologue


@pytest.fixture(scope="module")
def blob() -> bytes:
    sink = io.BytesIO()
    jobs.compress(SMALL, sink, CODECS["lossless"], chunk_tokens=128)
    return sink.getvalue()


def read_all(data: bytes) -> bytes:
    sink = io.BytesIO()
    jobs.decompress(KvpFile(Container(memoryview(data))), sink, engine=CpuEngine(1))
    return sink.getvalue()


@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.long)])
def test_every_single_byte_change_is_noticed(blob: bytes, count: int) -> None:
    """So many random places, and every byte of prologue and footer."""
    rng = np.random.default_rng(0)
    places = [*rng.integers(0, len(blob), count), *range(PROLOGUE.size), *range(len(blob) - FOOTER.size, len(blob))]
    for place in places:
        broken = bytearray(blob)
        broken[place] ^= int(rng.integers(1, 256))
        with pytest.raises(FormatError) as caught:
            read_all(bytes(broken))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.long)])
def test_every_truncation_is_noticed(blob: bytes, count: int) -> None:
    """So many random lengths, and every length near both ends."""
    lengths = [*np.random.default_rng(1).integers(0, len(blob), count), *range(64), *range(len(blob) - 64, len(blob))]
    for length in lengths:
        with pytest.raises(FormatError):
            read_all(blob[:length])


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    for prefix in (b"", MAGIC):
        with pytest.raises(FormatError):
            Container(memoryview(prefix + data))


def test_appended_bytes_are_refused(blob: bytes) -> None:
    with pytest.raises(TruncatedError):
        Container(memoryview(blob + b"\0"))
    with pytest.raises(TruncatedError):
        Container(memoryview(blob + blob))


def test_header_of_one_file_and_index_of_another(blob: bytes) -> None:
    sink = io.BytesIO()
    jobs.compress(SMALL, sink, CODECS["zstd"])
    prologue = PROLOGUE.size
    with pytest.raises(FormatError):
        Container(memoryview(sink.getvalue()[:prologue] + blob[prologue:]))


def with_prologue(blob: bytes, **fields: int) -> bytes:
    """The file with a sound prologue that says something else, and a footer that agrees with it."""
    names = ("magic", "major", "minor", "critical", "optional", "length", "crc", "own")
    values = dict(zip(names, PROLOGUE.unpack(blob[: PROLOGUE.size]), strict=True)) | fields
    body = PROLOGUE.pack(*values.values())[:-4]
    prologue = body + zlib.crc32(body).to_bytes(4, "little")
    return prologue + blob[PROLOGUE.size :]


def test_newer_versions_and_unknown_critical_features_are_refused(blob: bytes) -> None:
    with pytest.raises(UnsupportedError, match="upgrade"):
        Container(memoryview(with_prologue(blob, major=7)))
    with pytest.raises(UnsupportedError, match="upgrade"):
        Container(memoryview(with_prologue(blob, critical=1 << 31)))
    with pytest.raises(UnsupportedError, match="compress it again"):
        Container(memoryview(with_prologue(blob, major=0, minor=4)))


def assemble(header: bytes, streams: bytes, index: bytes) -> bytes:
    """A file with sound checksums around whatever header (inflated), streams and index (inflated)."""
    deflated, packed = zlib.compress(header), zlib.compress(index)
    prologue = pack_prologue(deflated)
    start = prologue + deflated + streams
    return start + packed + pack_footer(packed, len(start), prologue)


def taken_apart(blob: bytes) -> tuple[Header, bytes, bytes]:
    container = Container(memoryview(blob))
    end = len(blob) - container.index_size
    return container.header, blob[container.header_size : end], zlib.decompress(blob[end : -FOOTER.size])


def test_assembling_gives_the_file_again(blob: bytes) -> None:
    header, streams, index = taken_apart(blob)
    assert read_all(assemble(header.to_bytes(), streams, index)) == SMALL.read_bytes()


def test_later_minor_versions_are_read(blob: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    header, streams, index = taken_apart(blob)
    monkeypatch.setattr(layout, "written_version", lambda _: (1, 7))
    later = assemble(header.to_bytes(), streams, index)
    monkeypatch.undo()
    assert Container(memoryview(later)).version == (1, 7)
    assert read_all(later) == read_all(blob)


@pytest.mark.parametrize(
    "change",
    [
        (b'"chunk_tokens":128', b'"chunk_tokens":0'),
        (b'"chunk_tokens":128', b'"chunk_tokens":-128'),
        (b'"chunk_tokens":128', b'"chunk_tokens":1e2'),
        (b'"chunk_tokens":128', b'"chunk_tokens":256'),
        (b'"chunk_tokens":128', b'"chunk_tokens":99999999999999999999'),
        (b'"codecs":[', b'"codecs":[3,'),
        (b'"lossless":true', b'"lossless":1'),
        (b'"streams":["byte.0"', b'"streams":["zzz"'),
        (b"float_split", b"floaty_split"),
        (b"[3,160,64]", b"[3,161,64]"),
        (b"[3,160,64]", b"[-3,160,64]"),
        (b'"shape":[160]', b'"shape":[99999999999999]'),
        (b"data_offsets", b"data_offzets"),
        (b'"BF16"', b'"BF17"'),
        (b"{", b"{{"),
        (b'"writer"', b'"wrider"'),
    ],
    ids=lambda c: c[1].decode(),
)
def test_lying_headers_are_refused(blob: bytes, change: tuple[bytes, bytes]) -> None:
    header, streams, index = taken_apart(blob)
    raw = header.to_bytes()
    old, new = (c.replace(b'"', b'\\"') if change[0] not in raw else c for c in change)
    assert old in raw
    with pytest.raises(KvpackError):
        read_all(assemble(raw.replace(old, new, 1), streams, index))


def test_unknown_header_fields_are_ignored(blob: bytes) -> None:
    header, streams, index = taken_apart(blob)
    raw = header.to_bytes().replace(b"{", b'{"aaa":1,', 1)
    assert read_all(assemble(raw, streams, index)) == SMALL.read_bytes()


@pytest.mark.parametrize("at", range(0, 60, 3))
def test_lying_indexes_are_refused(blob: bytes, at: int) -> None:
    header, streams, index = taken_apart(blob)
    broken = bytearray(index)
    broken[at] ^= 0x41
    with pytest.raises(FormatError):
        read_all(assemble(header.to_bytes(), streams, bytes(broken)))


def test_huge_stream_sizes_are_refused_before_reading(blob: bytes) -> None:
    header, streams, index = taken_apart(blob)
    parts, count = struct.unpack_from("<II", index)
    at = 8 + parts * 10 + count
    sizes = list(struct.unpack_from(f"<{count}Q", index, at))
    sizes[0], sizes[1] = sizes[0] + (1 << 63), sizes[1]
    lying = index[:at] + struct.pack(f"<{count}Q", *sizes) + index[at + 8 * count :]
    with pytest.raises(FormatError):
        Container(memoryview(assemble(header.to_bytes(), streams, lying)))


def test_a_small_file_cannot_claim_a_huge_cache() -> None:
    """Ten lines of header that promise terabytes are refused before anything is allocated."""
    entry = {"dtype": "BF16", "shape": [1 << 20, 1 << 20, 64], "data_offsets": [0, 1 << 47]}
    source = '{"layers.0.keys":' + str(entry).replace("'", '"') + "}"
    header = Header("x", [CODECS["lossless"].to_json()], 1 << 20, True, [], None, [], source)
    index = zlib.decompress(pack_index([(0, 0, [])]))
    with pytest.raises(FormatError, match="more than"):
        Container(memoryview(assemble(header.to_bytes(), b"", index)))


def test_inflation_is_capped(blob: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    header, streams, index = taken_apart(blob)
    monkeypatch.setattr("kvpack.kvp.reader.MAX_HEADER", 1 << 16)
    with pytest.raises(FormatError, match="longer than it may be"):
        Container(memoryview(assemble(header.to_bytes() + b" " * (1 << 17), streams, index)))


def test_a_wrong_digest_is_noticed(blob: bytes) -> None:
    """Streams intact, but not of this original: lossless is proven, not assumed."""
    header, streams, index = taken_apart(blob)
    parts, _ = struct.unpack_from("<II", index)
    broken = bytearray(index)
    broken[8 + 2 * parts] ^= 1
    with pytest.raises(CorruptError, match="digest of the original"):
        read_all(assemble(header.to_bytes(), streams, bytes(broken)))


def test_a_name_of_many_digits_is_no_layer(tmp_path: Path) -> None:
    name = f"layers.{'9' * 5000}.keys"
    path = write_tensors(tmp_path / "x", {name: ("F32", np.ones((1, 2, 2), np.float32))})
    sink = io.BytesIO()
    jobs.compress(path, sink, CODECS["lossless"])
    assert read_all(sink.getvalue()) == path.read_bytes()


def test_a_file_without_tensors_round_trips(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "x", {}, {"a": "b"})
    sink = io.BytesIO()
    jobs.compress(path, sink, CODECS["lossless"])
    assert read_all(sink.getvalue()) == path.read_bytes()
    with pytest.raises(FormatError, match="to compress lossily"):
        jobs.compress(path, io.BytesIO(), CODECS["kivi-2"])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32-le", "latin-1"])
def test_headers_that_are_not_utf8_are_refused(tmp_path: Path, encoding: str) -> None:
    raw = '{"__metadata__":{"a":"é"}}'.encode(encoding)
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(FormatError):
        open_cache(tmp_path / "x")


@given(st.binary(max_size=300))
def test_bad_captures_are_refused(data: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        for content in (data, struct.pack("<Q", len(data)) + b"{" + data):
            file.seek(0)
            file.truncate()
            file.write(content)
            file.flush()
            with pytest.raises(FormatError):
                open_cache(Path(file.name))

"""Format 1.1: dtypes that came later to safetensors, carried bit for bit behind a critical bit of the prologue."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_decoder
import safetensors
from conftest import FIXTURES, SMALL
from newer import TENSORS, contents, only, write_newer
from test_container import assemble, taken_apart, with_prologue

from kvpack import jobs
from kvpack.codecs.recipes import CODECS
from kvpack.errors import FormatError, UnsupportedError
from kvpack.formats.safetensors import ITEM_BITS, TensorFile, parse_header
from kvpack.formats.source import Capture
from kvpack.jobs.reader import KvpFile
from kvpack.kvp import Container, features
from kvpack.kvp.features import FEATURES, NEWER_DTYPES
from kvpack.kvp.layout import PROLOGUE, pack_prologue, unpack_prologue

Cli = Callable[..., Any]
GOLDENS = FIXTURES / "goldens" / "1.1"
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    return write_newer(tmp_path / "newer.safetensors")


def compress(path: Path, codec: str = "lossless") -> bytes:
    sink = io.BytesIO()
    jobs.compress(path, sink, CODECS[codec])
    return sink.getvalue()


def decompress(data: bytes) -> bytes:
    sink = io.BytesIO()
    jobs.decompress(KvpFile(Container(memoryview(data))), sink)
    return sink.getvalue()


def test_kvpack_knows_every_dtype_that_the_package_knows() -> None:
    """The package's own message lists them."""
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(only("BF17", (1,), b"x"))
    known = set(re.findall("`([A-Z0-9_]+)`", str(caught.value).split("expected")[1]))
    assert known == set(ITEM_BITS)


def test_the_package_opens_the_file_that_these_tests_compress(newer: Path) -> None:
    found = dict(safetensors.deserialize(newer.read_bytes()))
    header, data = contents()
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in found.items()} == TENSORS
    assert {spec.name: data[spec.start : spec.stop] for spec in header.tensors} == {
        name: bytes(entry["data"]) for name, entry in found.items()
    }
    assert {dtype for dtype, _ in TENSORS.values()} >= NEWER_DTYPES


@pytest.mark.parametrize("codec", ["lossless", "zstd"])
def test_every_newer_dtype_comes_back_bit_for_bit(newer: Path, codec: str) -> None:
    data = compress(newer, codec)
    assert decompress(data) == reference_decoder.decode(data) == newer.read_bytes()
    container = Container(memoryview(data))
    assert (container.version, container.critical) == ((1, 1), 1)
    for part in container.parts:
        assert (container.header.codecs[part.codec]["name"] == "zstd") >= (part.spec.tensor.dtype in NEWER_DTYPES)


def test_a_lossy_codec_carries_them_losslessly(newer: Path) -> None:
    data = compress(newer, "kivi-4")
    archive, capture = KvpFile(Container(memoryview(data))), Capture.open(newer)
    for name, (dtype, _) in TENSORS.items():
        if dtype in NEWER_DTYPES:
            assert archive.read(name).tobytes() == bytes(capture.file.data(capture.tensors[name]))


@pytest.mark.parametrize("dtype", sorted(NEWER_DTYPES))
def test_each_of_them_alone_takes_the_bit(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "x"
    size = 24 * ITEM_BITS[dtype] // 8
    path.write_bytes(only(dtype, (2, 3, 4), bytes(range(size))))
    data = compress(path)
    assert struct.unpack_from("<HHI", data, 8) == (1, 1, 1)
    assert decompress(data) == reference_decoder.decode(data) == path.read_bytes()


def test_elements_smaller_than_a_byte_are_folded_as_one_row_of_bytes(newer: Path) -> None:
    parts = {part.spec.tensor.name: part.spec for part in Container(memoryview(compress(newer))).parts}
    assert parts["four"].shape == (1, 45, 1)
    assert parts["six.e3m2"].shape == (1, 27, 1)
    assert parts["layers.1.keys"].shape == (1, 12, 1)
    assert parts["layers.0.scales"].shape == (2, 40, 1)
    assert "four.empty" not in parts


def test_other_files_stay_of_format_1_0() -> None:
    data = compress(SMALL)
    assert struct.unpack_from("<HHI", data, 8) == (1, 0, 0)
    assert pack_prologue(b"x") == pack_prologue(b"x", 0)


def test_a_reader_of_1_0_refuses_them_with_its_own_exit_code(newer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a reader knows no bit, and this is the only thing that tells it from the one of today."""
    prologue = compress(newer)[: PROLOGUE.size]
    assert unpack_prologue(prologue)[:2] == ((1, 1), 1)
    monkeypatch.setattr("kvpack.kvp.layout.KNOWN_CRITICAL", 0)
    with pytest.raises(UnsupportedError, match=r"bits 0x1\): upgrade kvpack") as caught:
        unpack_prologue(prologue)
    assert caught.value.exit_code == 6


def test_a_file_that_hides_its_newer_dtypes_is_refused(newer: Path) -> None:
    """By both decoders: here the prologue has no bit, in what is otherwise a sound file."""
    header, streams, index = taken_apart(compress(newer))
    lying = assemble(header.to_bytes(), streams, index)
    with pytest.raises(FormatError, match="newer dtypes"):
        Container(memoryview(lying))
    with pytest.raises(ValueError, match="newer dtypes"):
        reference_decoder.decode(lying)


def test_the_bit_may_be_set_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    header, streams, index = taken_apart(compress(SMALL))
    monkeypatch.setattr("test_container.pack_prologue", lambda deflated: pack_prologue(deflated, 1))
    data = assemble(header.to_bytes(), streams, index)
    assert decompress(data) == reference_decoder.decode(data) == SMALL.read_bytes()


def test_unknown_bits_are_named(newer: Path) -> None:
    with pytest.raises(UnsupportedError, match="bits 0x10"):
        Container(memoryview(with_prologue(compress(newer), critical=0x11)))


@pytest.mark.parametrize(
    ("dtype", "shape"), [("F4", (3,)), ("F4", ()), ("F6_E2M3", (2, 3)), ("F6_E3M2", (1, 1)), ("F4", (3, 3, 3))]
)
def test_elements_that_do_not_fill_bytes_are_malformed(dtype: str, shape: tuple[int, ...]) -> None:
    bits = ITEM_BITS[dtype] * math.prod(shape)
    for size in (bits // 8, bits // 8 + 1):  # rounded down and rounded up
        raw = only(dtype, shape, bytes(size))
        with pytest.raises(FormatError, match="data_offsets do not match"):
            parse_header(raw[8 : len(raw) - size])
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(raw)


def test_an_unknown_dtype_asks_for_an_upgrade(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "future.safetensors"
    path.write_bytes(only("F3_E1M1", (8,), bytes(3)))
    for command in (["compress", path], ["inspect", path]):
        result = cli(*command)
        assert result.code == 6
        assert (
            result.err == f"kvpack: {path}: tensor 'x': this kvpack does not know the dtype 'F3_E1M1': upgrade kvpack\n"
        )
    piped = cli("compress", "-", stdin=path.read_bytes())
    assert piped.code == 6
    assert piped.err.startswith("kvpack: -: tensor 'x'")


@pytest.mark.parametrize("dtype", ["3", "null", "[]", "{}", "true"])
def test_a_dtype_that_is_no_string_is_malformed(dtype: str) -> None:
    with pytest.raises(FormatError, match="not a string"):
        parse_header(f'{{"x":{{"dtype":{dtype},"shape":[1],"data_offsets":[0,1]}}}}'.encode())


def test_a_number_of_too_many_digits_is_malformed() -> None:
    with pytest.raises(FormatError):
        parse_header(f'{{"x":{{"dtype":"U8","shape":[{"9" * 5000}],"data_offsets":[0,1]}}}}'.encode())


def test_the_command_line_takes_them(cli: Cli, newer: Path, tmp_path: Path) -> None:
    packed, back = Path(f"{newer}.kvp"), tmp_path / "back"
    assert cli("compress", newer).code == 0
    assert cli("decompress", packed, "-o", back).code == 0
    assert back.read_bytes() == newer.read_bytes()
    assert cli("decompress", "-t", packed).code == 0
    assert cli("verify", newer, packed, "--bit-exact").code == 0
    part = tmp_path / "part"
    assert cli("decompress", packed, "--layers", "0", "-o", part).code == 0
    assert set(TensorFile.open(part).tensors) == {"layers.0.keys", "layers.0.values", "tokens"}


def test_inspect_shows_them(cli: Cli, newer: Path) -> None:
    packed = Path(f"{newer}.kvp")
    assert cli("compress", newer).code == 0
    for path in (newer, packed):
        shown = cli("inspect", path, "--check").out
        for text in ("F4[3, 5, 6]", "F6_E2M3[5, 4]", "F8_E4M3FNUZ[2, 40, 1]", "C64[]", "F4[2, 0]"):
            assert text in shown
    assert "1.1 (newer dtypes), written by kvpack" in cli("inspect", packed).out
    assert "F8_E4M3FNUZ[2, 40, 1] layers.0.scales" in " ".join(cli("inspect", packed).out.split())
    report = json.loads(cli("inspect", "--json", packed).out)
    assert (report["format"], report["features"]) == ("1.1", ["newer dtypes"])
    assert cli("compress", SMALL, "-o", packed, "-f").code == 0
    report = json.loads(cli("inspect", "--json", packed).out)
    assert (report["format"], report["features"]) == ("1.0", [])


def test_leaving_other_tensors_out(cli: Cli, newer: Path, tmp_path: Path) -> None:
    packed, back = Path(f"{newer}.kvp"), tmp_path / "back"
    assert cli("compress", newer, "--drop", "complex").code == 0
    assert cli("decompress", packed, "-o", back).code == 0
    kept = {name: entry for name, entry in TENSORS.items() if name != "complex"}
    assert {s.name: (s.dtype, s.declared_shape) for s in TensorFile.open(back).header.tensors} == kept


def test_the_golden_decodes_alike_by_both_decoders() -> None:
    path = GOLDENS / "newer-dtypes.kvp"
    data = path.read_bytes()
    digest = path.with_suffix(".sha256").read_text().strip()
    for decode in (decompress, reference_decoder.decode):
        assert hashlib.sha256(decode(data)).hexdigest() == digest
    assert unpack_prologue(data[: PROLOGUE.size])[:2] == ((1, 1), 1)


def test_a_golden_has_every_newer_dtype(newer: Path) -> None:
    data = (GOLDENS / "newer-dtypes.kvp").read_bytes()
    assert {spec.dtype for spec in Container(memoryview(data)).source.tensors} >= NEWER_DTYPES
    assert decompress(data) == newer.read_bytes()


def test_goldens_of_1_1_never_change() -> None:
    sums = dict(reversed(line.split()) for line in (GOLDENS / "SHA256SUMS").read_text().splitlines())
    files = {path.name: path for path in GOLDENS.iterdir() if path.name != "SHA256SUMS"}
    assert files.keys() == sums.keys()
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[name], name


def test_the_specification_lists_every_critical_bit() -> None:
    section = (DOCS / "format.md").read_text().split("\n## Format 1.1\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| (\d+)\.(\d+) \|", section, flags=re.M)
    assert rows == [(str(f.bit), f.name, *map(str, f.since)) for f in FEATURES]
    for dtype in NEWER_DTYPES:
        assert dtype in section
    assert len({feature.bit for feature in FEATURES}) == len(FEATURES)


def test_a_version_is_the_oldest_that_has_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    later = (*FEATURES, features.Feature(4, "more", (1, 3), lambda _: False))
    monkeypatch.setattr(features, "FEATURES", later)
    assert features.written_version(0) == (1, 0)
    assert features.written_version(1) == (1, 1)
    assert features.written_version(0x11) == (1, 3)
    assert zlib.crc32(pack_prologue(b"x", 0x10)[:-4]) == int.from_bytes(pack_prologue(b"x", 0x10)[-4:], "little")

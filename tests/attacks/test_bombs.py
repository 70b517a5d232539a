"""Small files that ask for a lot of memory or time: counts, headers, indices, streams and matrices that expand."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forge import LOSSLESS, Outcome, assembled, codec, entry, kvp, profile, run, safetensors, stage
from hypothesis import given
from hypothesis import strategies as st
from profiles import TINY, tiny_capture

from kvpack.cache import CacheSpec, Role, TensorInfo, count_parts, windows
from kvpack.cache.untrusted import MAX_DEPTH, MAX_DIGITS, parse_json
from kvpack.codecs.chain.base import PlaneSpec
from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.errors import FormatError
from kvpack.kvp import Container
from kvpack.kvp.compact import MAX_TENSORS
from kvpack.kvp.layout import FREE_EXPANSION, MAX_HEADER, deflate, inflate, pack_index
from kvpack.profiles import Profile

MOST_SECONDS, MOST_MEGABYTES = 20, 330
"""What a command may take here. It includes the start of Python and numba, on a machine that may be busy."""


def assert_refused(outcome: Outcome, code: int = 4) -> None:
    assert (outcome.code, outcome.err.count("\n")) == (code, 1), outcome
    assert outcome.seconds < MOST_SECONDS, outcome
    assert outcome.megabytes < MOST_MEGABYTES, outcome


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_more_parts_than_the_index_has(dtype: str, chunk: int, tmp_path: Path) -> None:
    """Parts are counted by arithmetic and compared with the index before one of them is made."""
    size = {"BF16": 2, "F32": 4}[dtype]
    source = {"layers.0.keys": entry(dtype, [1, 1 << 27, 1], 0, size << 27)}
    path = tmp_path / "bomb.kvp"
    path.write_bytes(kvp(source, [LOSSLESS], [(0, 0, ())], chunk_tokens=chunk, lossless=True, streams=["mantissa"]))
    assert_refused(run("inspect", path, folder=tmp_path))


@pytest.mark.parametrize(("parts", "streams"), [(1 << 26, 0), (1, 1 << 26), (0, 0), (2**32 - 1, 2**32 - 1)])
def test_counts_of_the_index_that_the_file_has_no_room_for(parts: int, streams: int) -> None:
    source = {"layers.0.keys": entry("BF16", [1, 1, 1], 0, 2)}
    header = json.loads(zlib.decompress(kvp(source, [LOSSLESS])[32:]).decode())
    raw = parts.to_bytes(4, "little") + streams.to_bytes(4, "little") + bytes(1 << 16)
    data = assembled(json.dumps(header).encode(), b"\0\0", zlib.compress(raw, 9))
    with pytest.raises(FormatError, match="the index has"):
        Container(memoryview(data))


def test_one_long_tensor_beside_many_short_ones_takes_work_in_proportion() -> None:
    """Windows cost what their parts cost, not windows times tensors."""
    layers = [TensorInfo(f"layers.{i}.keys", Role.KEYS, i, "BF16", (1, 1, 1), 2) for i in range(20_000)]
    layers[7] = TensorInfo("layers.7.keys", Role.KEYS, 7, "BF16", (1, 200_000, 1), 2)
    spec = CacheSpec(tuple(layers), (), {})
    assert sum(len(window.parts) for window in windows(spec, 1)) == count_parts(spec, 1) == 219_999


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=6), st.integers(1, 9))
def test_parts_are_counted_as_they_are_listed(tensors: list[tuple[int, bool]], chunk: int) -> None:
    infos = [
        TensorInfo(str(i), Role.KEYS if layer else Role.OTHER, i if layer else None, "F32", (1, rows + 1, 2), 4)
        for i, (rows, layer) in enumerate(tensors)
    ]
    spec = CacheSpec(
        tuple(one for one in infos if one.layer is not None), tuple(one for one in infos if one.layer is None), {}
    )
    assert count_parts(spec, chunk) == sum(len(window.parts) for window in windows(spec, chunk))


# ---- JSON ------------------------------------------------------------------------------------------------------------


JSON_BOMBS = {
    "lists in lists": "[" * 100_000 + "]" * 100_000,
    "lists in lists, with others beside them": "[[]," * 5_000 + "[]" + "]" * 5_000,
    "objects in objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "one level too many": "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    "brackets that do not match": "[}" * 1000,
    "a number of many digits": "[" + "1" * 5000 + "]",
    "one digit too many": '{"a":' + "1" * (MAX_DIGITS + 1) + "}",
    "a fraction of many digits": "[0." + "1" * 5000 + "]",
    "a number beyond float64": "[1e999]",
    "not a number": "[NaN]",
    "infinity": '{"a":-Infinity}',
    "a key twice": '{"a":1,"b":2,"a":3}',
    "a key twice, deeper": '{"x":[{"a":1,"a":1}]}',
    "half of a pair": '["\\ud800"]',
    "half of a pair as a key": '{"\\uDFFF":1}',
    "a string that does not end": '"' + "\\" * 99_999,
    "many strings that do not end": '"\\"a' * 50_000 + "\\",
    "nothing": "",
    "two documents": "{}{}",
}


@pytest.mark.parametrize("text", JSON_BOMBS.values(), ids=JSON_BOMBS)
def test_json_that_is_hard_to_parse(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_json(text.encode(), "header")
    assert len(str(caught.value)) < 200


def test_more_values_than_a_file_of_its_size_may_have() -> None:
    assert parse_json(b"[" + b"0," * 98 + b"0]", "header", 100) == [0] * 99
    for text in (b"[" + b"0," * 200 + b"0]", b"[" + b"{}," * 99 + b"{}]", b'{"":{' + b'"a":[],' * 99 + b"}}"):
        with pytest.raises(FormatError, match="values"):
            parse_json(text, "header", 100)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    ),
    st.booleans(),
)  # fmt: skip
def test_what_json_is_sound_is_read_as_by_the_standard_library(document: Any, ascii_only: bool) -> None:
    assert parse_json(json.dumps(document, ensure_ascii=ascii_only).encode(), "header") == document


@given(st.text(st.sampled_from('[]{},:"\\0a \n')))
def test_whatever_the_text_json_is_read_or_refused(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(FormatError):
            parse_json(text.encode(), "header")
        return
    try:
        found = parse_json(text.encode(), "header")
    except FormatError as error:
        if "twice" not in str(error):  # nothing else is refused that the standard library reads
            raise
    else:
        assert found == expected


def test_a_header_that_expands_without_end(tmp_path: Path) -> None:
    """128 MiB of blanks, lists or entries, in a few hundred kilobytes."""
    for name, raw in {
        "blanks": b"{" + b" " * (MAX_HEADER - 2) + b"}",
        "lists": b'{"x":[' + b"[]," * (MAX_HEADER // 3 - 10) + b"0]}",
        "few lists": b'{"x":[' + b"[]," * (FREE_EXPANSION // 3 - 10) + b"0]}",
    }.items():
        path = tmp_path / f"{name}.kvp"
        path.write_bytes(assembled(raw, b"", pack_index([])))
        outcome = run("inspect", path, folder=tmp_path)
        assert_refused(outcome)
        assert outcome.megabytes < 150


def test_a_compact_header_that_expands_without_end() -> None:
    starred = {"metadata": {}, "tensors": [[MAX_TENSORS, ["*" * 1024, "F32", [0]]]]}
    axes = {"metadata": {}, "tensors": [[MAX_TENSORS, ["layers.*.keys", "F32", [0] + [(1 << 63) - 1] * 63]]]}
    for source in (starred, axes):
        raw = zlib.decompress(kvp("{}", [LOSSLESS])[32:])
        document = {**json.loads(raw), "source": source}
        with pytest.raises(FormatError, match="longer than"):
            Container(memoryview(assembled(json.dumps(document).encode(), b"", pack_index([]))))


@pytest.mark.parametrize("size", [100, FREE_EXPANSION, FREE_EXPANSION + 1, 3 * FREE_EXPANSION])
def test_what_the_writer_deflates_the_reader_inflates(size: int) -> None:
    for data in (bytes(size), np.random.default_rng(0).bytes(size)):
        assert inflate(deflate(data), MAX_HEADER, "header") == data


# ---- Streams and matrices --------------------------------------------------------------------------------------------


def constant(shape: tuple[int, int, int], width: int, code: int = 1) -> bytes:
    """A rans stream of one code, of the least size."""
    plane = PlaneSpec("", shape, width)
    few = np.full((shape[0], 64, shape[2]), code, plane.code_dtype)
    return Rans().encode(few, PlaneSpec("", few.shape, width))  # the number of tokens is not in the stream


def test_a_rans_stream_of_one_code_takes_no_memory(tmp_path: Path) -> None:
    """128 MiB of content in some hundred bytes: neither the lanes nor the planes are padded or filled."""
    from kvpack.numerics.checksum import checksum

    tokens, dims = 1 << 20, 64
    content = np.broadcast_to(np.uint16(1 << 7 | 1), (1, tokens, dims))
    streams = [("sign_exponent", constant((1, tokens, dims), 9)), ("mantissa", constant((1, tokens, dims), 7))]
    source = {"layers.0.keys": entry("BF16", [1, tokens, dims], 0, 2 * tokens * dims)}
    path = tmp_path / "amplify.kvp"
    path.write_bytes(kvp(source, [LOSSLESS], [(0, checksum(content), streams)], chunk_tokens=1 << 20, lossless=True))
    assert path.stat().st_size < 1000
    outcome = run("decompress", "-t", "--threads", 1, path, folder=tmp_path)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert outcome.megabytes < MOST_MEGABYTES
    limited = run("decompress", "-t", "--memlimit", "100M", path, folder=tmp_path)
    assert (limited.code, limited.err.count("\n")) == (1, 1)
    assert "--memlimit 384M" in limited.err


def test_one_lane_takes_memory_for_one_lane(tmp_path: Path) -> None:
    """A long vector has one channel, so 31 of a group's 32 lanes do not exist and are given no room."""
    path = tmp_path / "vector.safetensors"
    data = np.random.default_rng(0).integers(0, 4, 16 << 20, np.uint8).tobytes()
    path.write_bytes(safetensors({"x": entry("F32", [4 << 20], 0, 16 << 20)}, data))
    packed = run("compress", path, "--threads", 1, folder=tmp_path)
    assert packed.code == 0, packed
    back = run("decompress", "-t", "--threads", 1, f"{path}.kvp", folder=tmp_path)
    assert back.code == 0, back
    assert max(packed.megabytes, back.megabytes) < 170 + 10 * 16


def test_a_group_of_rans_that_asks_for_more_words_than_there_are() -> None:
    """Every state of a table of halves needs a word each 15 symbols; the stream has none."""
    from kvpack.errors import CorruptError

    plane = PlaneSpec("", (1, 4096, 40), 8)
    stream = bytearray(Rans().encode(np.random.default_rng(0).integers(0, 2, plane.shape).astype(np.uint8), plane))
    used = int.from_bytes(stream[12:16], "little")
    shorter = stream[: len(stream)]
    shorter[12:16] = (0).to_bytes(4, "little")
    lanes = 40 if used else 0
    del shorter[16 + 4 * lanes : 16 + 4 * lanes + 2 * used]
    with pytest.raises(CorruptError):
        Rans().decode(memoryview(bytes(shorter)), plane)


def test_a_packed_matrix_that_expands_without_end(tmp_path: Path) -> None:
    """A profile of some kilobytes whose matrix has 2**24 rows of one byte each."""
    arrays = {name: np.array(array) for name, array in Profile.open(TINY).items()}
    halves = {name for name, array in arrays.items() if array.dtype == np.float32 and ".mean" in name}
    arrays["fisher.basis.rows"] = np.array([1 << 24], np.int32)
    arrays["fisher.basis.codes"] = np.frombuffer(constant((1, 64, arrays["fisher.basis.step"].shape[1]), 8), np.uint8)
    arrays = {name: array.astype(np.float16) if name in halves else array for name, array in arrays.items()}
    bomb = profile(tmp_path / "bomb.kvprofile", arrays)
    outcome = run(
        "compress", tiny_capture(tmp_path / "tiny.safetensors"), "-c", "fisher-4", "-D", bomb, folder=tmp_path
    )
    assert_refused(outcome, 5)
    assert "fisher.basis" in outcome.err


def test_zstd_frames_that_hold_more_than_their_plane(tmp_path: Path) -> None:
    import zstandard

    frame = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28))
    source = {"x": entry("U8", [8], 0, 8)}
    packed = codec(stage("byte_planes"), stage("zstd", level=3))
    path = tmp_path / "zstd.kvp"
    path.write_bytes(kvp(source, [packed], [(0, 0, [("byte.0", frame)])], lossless=True))
    assert_refused(run("decompress", "-t", path, folder=tmp_path))

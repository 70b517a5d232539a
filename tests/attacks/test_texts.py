"""Headers and texts of files: malformed ones end in one line and exit code 4, and no control character is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forge import LOSSLESS, codec, entry, kvp, safetensors, stage
from hypothesis import given
from hypothesis import strategies as st

from kvpack.cache.metadata import parse_value
from kvpack.cache.untrusted import printable

Cli = Callable[..., Any]
ONE = entry("F32", [1], 0, 4)


def text_of(shape: str = "[1]", dtype: str = '"F32"', offsets: str = "[0,4]", name: str = '"a"') -> str:
    return f'{{{name}:{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'


MALFORMED = {
    "an axis of 5,000 digits": text_of(shape=f"[{'1' * 5000}]"),
    "an axis of 64 bits": text_of(shape="[18446744073709551616]"),
    "an axis below 0": text_of(shape="[-1]"),
    "an axis that is a fraction": text_of(shape="[1.0]"),
    "an axis that is a boolean": text_of(shape="[true]"),
    "a shape that is no list": text_of(shape="1"),
    "a dtype that is a list": text_of(dtype='["F32"]'),
    "a dtype that is an object": text_of(dtype="{}"),
    "a dtype that is null": text_of(dtype="null"),
    "offsets that are a dtype": text_of(offsets='"F32"'),
    "three offsets": text_of(offsets="[0,4,4]"),
    "half of a pair as name": text_of(name='"\\ud800"'),
    "the other half": text_of(name='"x\\udc00y"'),
    "half of a pair in the metadata": '{"__metadata__":{"a":"\\ud800"}}',
    "metadata that is no text": '{"__metadata__":{"a":1}}',
    "metadata that is a list": '{"__metadata__":[]}',
    "a tensor twice": '{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' * 2 + '"b":0}',
    "not a number in a field of no use": '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":NaN}}',
    "a size beyond 63 bits": text_of(shape="[4611686018427387904,0,4611686018427387904]", offsets="[0,0]"),
    "a size beyond 63 bits, 0 last": text_of(shape="[2147483648,2147483648,4,0]", offsets="[0,0]"),
    "400 axes": text_of(shape=f"[{','.join(['9223372036854775807'] * 400)},0]", offsets="[0,0]"),
}


@pytest.mark.parametrize("command", [["inspect"], ["inspect", "--json"], ["compress"]], ids=" ".join)
@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_header(cli: Cli, tmp_path: Path, text: str, command: list[str]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors(text, b"\0\0\0\0"))
    found = cli(*command, path)
    assert (found.code, found.err.count("\n")) == (4, 1), found.err
    assert json.loads(found.out)["exit_code"] == 4 if "--json" in command else found.out == ""
    assert len(found.err) < 500
    assert not Path(f"{path}.kvp").exists()


def test_the_same_headers_within_a_kvp_file(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "x.kvp"
    for text in MALFORMED.values():
        path.write_bytes(kvp(text, [LOSSLESS]))
        for command in (["inspect"], ["decompress", "-t"]):
            found = cli(*command, path)
            assert (found.code, found.err.count("\n")) == (4, 1), (text, found.err)


NOTHING: dict[str, Any] = {}
NO_CODECS: list[Any] = [
    {}, 5, None, "x", [], {"name": "x"}, {**LOSSLESS, "keys": 5}, {**LOSSLESS, "keys": []},
    {**LOSSLESS, "values": [1, 2]}, {**LOSSLESS, "name": 5}, {**LOSSLESS, "keys": [{}] * 2},
    {**LOSSLESS, "keys": [stage("rans")] * 17}, {**LOSSLESS, "more": 1},
    {"name": [], "version": 1, "configuration": NOTHING}, {"name": "a", "version": "b", "configuration": NOTHING},
    {"name": "replay", "version": 1, "configuration": 5},
    codec(stage("float_split"), {**stage("rans", 2), "configuration": 5}),
    codec(stage("float_split"), {**stage("rans", 2), "version": None}),
]  # fmt: skip


@pytest.mark.parametrize("document", NO_CODECS, ids=json.dumps)
def test_a_codec_that_is_none(cli: Cli, tmp_path: Path, document: Any) -> None:
    """Also where nothing is decoded."""
    path = tmp_path / "x.kvp"
    path.write_bytes(kvp({}, [document], lossless=True))
    for command in (["inspect"], ["inspect", "--json"], ["decompress", "-t"]):
        found = cli(*command, path)
        assert (found.code, found.err.count("\n")) == (4, 1), (command, found.err)


def test_metadata_of_any_number(cli: Cli, tmp_path: Path) -> None:
    """Values of metadata are documents of their own. What is no number of JSON is shown as null."""
    path = tmp_path / "x.safetensors"
    metadata = {"model": "NaN", "x": "Infinity", "y": '{"a":[-Infinity,1e999]}', "z": "1" * 5000, "deep": "[" * 9999}
    path.write_bytes(safetensors({"__metadata__": metadata, "a": ONE}, b"\0\0\0\0"))
    assert cli("inspect", path).code == 0
    identity = json.loads(cli("inspect", "--json", path).out)["identity"]
    assert (identity["model"], identity["x"], identity["y"]) == (None, None, {"a": [None, None]})
    assert cli("compress", path).code == 0


@pytest.mark.parametrize("document", ["model", "rope", "attention", "dtype", "needles", "schedule", "store"])
def test_half_of_a_pair_in_a_document_of_the_metadata(cli: Cli, tmp_path: Path, document: str) -> None:
    """Such a document is absent. An object's kind used to be computed from it, which ended in an internal error."""
    path = tmp_path / "x.safetensors"
    half = '{"name":"x","weights_sha256":"' + "5" * 64 + '","scale":1,"\\ud800":["\\udc00"]}'
    assert parse_value(half) is None
    assert parse_value(half.replace("\\ud800", "\ud800")) is None
    assert parse_value('"\\ud83d\\ude00"') == "\U0001f600"
    tensors = {"tokens": entry("I32", [1], 0, 4), "layers.0.keys": entry("BF16", [1, 1, 1], 4, 6)}
    weights = json.dumps({"weights_sha256": "5" * 64})
    path.write_bytes(safetensors({"__metadata__": {"model": weights, document: half}, **tensors}, bytes(6)))
    for command, code in ((("inspect",), 0), (("compress",), 0), (("store", "put", "--store", tmp_path / "s"), None)):
        found = cli(*command, path)
        expected = code if code is not None else 5 if document == "model" else 0
        assert (found.code, found.err.count("\n")) == (expected, int(expected != 0)), (command, found)


EVIL = "\x1b]0;PWNED\x07\x1b[2J\x1b[31m[red]x[/red]\x9b31m\u202e\u2066\r\b\x00:smile:\\"


def controls(text: str) -> set[str]:
    return {c for c in text if not c.isprintable() and c != "\n"}


def test_control_characters_do_not_reach_the_terminal(cli: Cli, tmp_path: Path) -> None:
    capture, other, packed = tmp_path / "x.safetensors", tmp_path / "y.safetensors", tmp_path / "z.kvp"
    capture.write_bytes(safetensors({"__metadata__": {"model": EVIL, EVIL: "1"}, f"a{EVIL}": ONE}, b"\0\0\0\0"))
    other.write_bytes(safetensors({f"b{EVIL}": ONE}, b"\0\0\1\0"))
    evil = codec(stage(f"float_split{EVIL}"), stage("rans", 2, **{EVIL: EVIL}), name=f"n{EVIL}")
    parts = [(0, 0, [(f"mantissa{EVIL}", b"\0"), ("sign_exponent", b"\0")])]
    fields = {"writer": EVIL, "dropped": [EVIL], "profile": {"name": EVIL, "sha256": "0" * 64}}
    packed.write_bytes(kvp({f"a{EVIL}": ONE}, [evil], parts, **fields))
    every = [
        cli("inspect", capture), cli("inspect", "-v", packed), cli("inspect", "--json", capture, packed),
        cli("verify", capture, other), cli("compress", capture), cli("decompress", "-t", packed),
        cli("compress", capture, "-o", tmp_path / f"no{EVIL}".replace("\0", "") / "x"),
    ]  # fmt: skip
    packed.write_bytes(kvp({f"a{EVIL}": ONE}, [LOSSLESS], [(0, 0, [("mantissa", b"\0"), ("sign_exponent", b"\0")])]))
    every.append(cli("decompress", "-t", packed))
    assert [found.code for found in every] == [0, 0, 0, 0, 0, 6, 1, 4]
    for found in every:
        assert not controls(found.out + found.err), found
    assert "[red]x[/red]" in every[0].out
    assert ":smile:" in every[3].out
    assert r"a\x1b]0;PWNED" in every[-1].err


@given(st.text())
def test_what_is_printed_is_printable(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb", "\x1b", "\u2028", "\U000e0001", "\u200b"])
def test_what_cannot_be_printed_is_escaped(text: str) -> None:
    assert printable(text).encode().decode().isprintable()
    assert "\\" in printable(text)

"""``kvpack store`` through the command line: what it prints, writes and refuses, and its exit codes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, nmse
from profiles import TINY, tiny_capture
from test_store import made_up
from texts import holds, text

from kvpack.cli.prompts import parse_ids
from kvpack.cli.upkeep import SIZES, TIMES, amount
from kvpack.errors import UsageError
from kvpack.formats.captures import layer_of
from kvpack.formats.source import Capture
from kvpack.numerics.floats import to_float32

Cli = Callable[..., Any]
TOKENS = made_up([(0, 300)])


@pytest.fixture
def store(tmp_path: Path) -> list[object]:
    return ["--store", tmp_path / "store"]


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    return written(tmp_path / "text.safetensors", text(TOKENS))


def written(path: Path, capture: Capture) -> Path:
    path.write_bytes(capture.file.source.read(0, capture.file.source.size))
    return path


def document(cli: Cli, *arguments: object) -> Any:
    result = cli("store", *arguments, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["schema_version"] == (2 if arguments[0] == "put" else 1)
    return found


def test_a_real_capture_comes_back(cli: Cli, store: list[object], tmp_path: Path) -> None:
    """Its keys and values bit for bit, as a capture that the other commands take."""
    done = cli("store", "put", SMALL, *store, "--window", 128)
    assert done.code == 0, done.err
    assert done.out.startswith(f"{SMALL}: lossless, 0 of 160 tokens were there, 2 objects written, ")
    assert cli("store", "put", SMALL, *store, "--window", 128).out == (
        f"{SMALL}: lossless, 160 of 160 tokens were there, 0 objects written, 0 bytes\n"
    )
    back = tmp_path / "back.safetensors"
    got = cli("store", "get", SMALL, *store, "-o", back)
    assert (got.code, got.err) == (0, "")
    assert got.out == f"{back}: 160 of the prompt's 160 tokens, 2 objects, lossless (bit-exact)\n"
    ours, theirs = Capture.open(back), Capture.open(SMALL)
    for name, entry in theirs.tensors.items():
        if layer_of(entry) is not None or name == "tokens":
            assert np.array_equal(ours.read(name), theirs.read(name))
    assert ours.metadata["schedule"] == theirs.metadata["schedule"]
    assert cli("compress", back).code == 0
    assert cli("store", "get", f"{back}.kvp", *store, "-o", tmp_path / "again").code == 0
    assert (tmp_path / "again").read_bytes() == back.read_bytes()
    piped = cli("store", "get", SMALL, *store, "-o", "-")
    assert piped.raw == back.read_bytes()
    assert "160 of the prompt's 160 tokens" in piped.err
    assert cli("store", "get", SMALL, *store, "-o", back).code == 1
    assert cli("store", "get", SMALL, *store, "-o", back, "-f").code == 0


def test_prompts_as_token_ids(cli: Cli, store: list[object], capture: Path, tmp_path: Path) -> None:
    assert cli("store", "put", capture, *store).code == 0
    listed = tmp_path / "ids.json"
    listed.write_text(json.dumps([*TOKENS[:270], 7, 8]))
    found = document(cli, "get", "--tokens", listed, *store, "-o", tmp_path / "a")
    assert (found["held"], found["tokens"], found["objects"]) == (270, 272, 2)
    assert found["schedule"] == {"prefill": [270], "decode": 0}
    assert holds(Capture.open(tmp_path / "a"), TOKENS[:270])
    ids = ",".join(map(str, TOKENS[:9]))
    assert document(cli, "get", "--tokens", ids, *store, "-o", tmp_path / "b")["held"] == 9


def test_a_miss_has_an_exit_code_of_its_own(cli: Cli, store: list[object], capture: Path, tmp_path: Path) -> None:
    assert cli("store", "put", capture, *store).code == 0
    for prompt in (["--tokens", "1,2,3"], [written(tmp_path / "x", text([5, 6]))], [SMALL]):
        result = cli("store", "get", *prompt, *store, "-o", tmp_path / "out")
        assert result.code == 7
        assert "holds no" in result.err
        assert result.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    result = cli("store", "get", capture, *store, "-c", "local-4", "-o", tmp_path / "out")
    assert result.code == 7
    assert "holds nothing of this model by local-4-prefix (it has caches by lossless)" in result.err


def test_a_text_by_the_models_tokenizer(
    cli: Cli, store: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is a stand-in here: its tokenizer, and the hash of its weights, which a store goes by."""
    from types import SimpleNamespace

    loaded = SimpleNamespace(
        tokenizer=lambda content: SimpleNamespace(input_ids=[ord(letter) for letter in content]),
        weights_sha256="5" * 64,
    )
    for module in ("prompts", "upkeep"):
        monkeypatch.setattr(f"kvpack.cli.{module}.named_model", lambda _: loaded)
    said = "a text that is long enough"
    path = written(tmp_path / "x.safetensors", text([ord(letter) for letter in said]))
    assert cli("store", "put", path, *store).code == 0
    (tmp_path / "prompt.txt").write_text(said[:11] + "?")
    found = document(cli, "get", "--text", tmp_path / "prompt.txt", *store, "-o", tmp_path / "a")
    assert (found["held"], found["tokens"]) == (11, 12)
    loaded.weights_sha256 = "6" * 64
    assert cli("store", "get", "--text", tmp_path / "prompt.txt", *store, "-o", tmp_path / "b").code == 7
    assert cli("store", "get", "--tokens", "97,32", "-m", "x", *store, "-o", tmp_path / "b").code == 7
    assert cli("store", "stat", "-m", "embedded", *store).code == 0  # nothing is shared, so nothing runs


def test_decode_steps_are_asked_for(cli: Cli, store: list[object], tmp_path: Path) -> None:
    path = written(tmp_path / "x", text(TOKENS, decode=50))
    assert cli("store", "put", path, *store).code == 0
    ids = ",".join(map(str, TOKENS))
    assert document(cli, "get", "--tokens", ids, *store, "-o", tmp_path / "a")["held"] == 250
    found = document(cli, "get", "--tokens", ids, "--made", "any", *store, "-o", tmp_path / "b")
    assert (found["held"], found["schedule"]) == (300, {"prefill": [250], "decode": 50})


def test_fisher_takes_the_prefix_as_its_context(cli: Cli, store: list[object], tmp_path: Path) -> None:
    tiny = tiny_capture(tmp_path / "tiny.safetensors")
    done = cli("store", "put", tiny, *store, "-c", "fisher-5", "-D", TINY, "--window", 128)
    assert done.code == 0
    line = "kvpack: fisher-5 codes tokens by what follows them; a store takes fisher-5-prefix instead\n"
    assert done.err == line
    back = tmp_path / "back"
    result = cli("store", "get", tiny, *store, "-c", "fisher-5", "-D", TINY, "-o", back)
    assert result.out == f"{back}: 160 of the prompt's 160 tokens, 2 objects, fisher-5-prefix (lossy)\n"
    assert cli("store", "get", tiny, *store, "-c", "fisher-5-prefix", "-D", TINY, "-o", back, "-f").err == ""
    whole = tmp_path / "whole.kvp"
    assert cli("compress", tiny, "-c", "fisher-5", "-D", TINY, "-o", whole).code == 0
    assert cli("decompress", whole, "-D", TINY, "-o", tmp_path / "usual").code == 0
    exact, ours, usual = (Capture.open(path) for path in (tiny, back, tmp_path / "usual"))
    for name in ("layers.0.keys", "layers.29.values"):
        errors = [nmse(*(to_float32(one.read(name), "BF16") for one in (other, exact))) for other in (ours, usual)]
        assert errors[0] < 1.5 * errors[1]
    without = cli("store", "get", tiny, *store, "-c", "fisher-5", "-o", back, "-f")
    assert (without.code, "give it with -D" in without.err) == (5, True)
    other = tmp_path / "other.kvprofile"
    data = bytearray(TINY.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    assert cli("store", "get", tiny, *store, "-c", "fisher-5", "-D", other, "-o", back, "-f").code == 5
    second = max((Path(str(store[1])) / "objects").rglob("*.kvp"), key=lambda path: path.parent.stat().st_ino)
    for path in (Path(str(store[1])) / "objects").rglob("*.kvp"):
        if json.loads(cli("inspect", "--json", path).out)["origin"]:
            second = path
    alone = cli("decompress", second, "-D", TINY, "-o", tmp_path / "no")
    assert (alone.code, "kvpack store get gives the whole prefix" in alone.err) == (5, True)
    again = cli("store", "put", back, *store)
    assert (again.code, "decoded from a lossy codec" in again.err) == (5, True)


def test_what_is_there(cli: Cli, store: list[object], tmp_path: Path) -> None:
    for i, tokens in enumerate((TOKENS, TOKENS[:256] + [9] * 100, TOKENS[:256] + [8] * 90)):
        assert cli("store", "put", written(tmp_path / f"{i}.safetensors", text(tokens)), *store).code == 0
    lines = cli("store", "ls", *store).out.splitlines()
    assert len(lines) == 3
    assert all("lossless" in line and "2 objects" in line for line in lines)
    texts = document(cli, "ls", *store)["texts"]
    assert sorted(one["tokens"] for one in texts) == [300, 346, 356]
    assert {one["model"] for one in texts} == {"made-up"}
    found = document(cli, "stat", *store)
    assert (found["objects"], found["kinds"], found["depth"], found["longest"]) == (4, 1, 2, 356)
    assert (found["tokens"], found["unreadable"]) == (256 + 44 + 100 + 90, 0)
    (first,) = (tmp_path / "store" / "objects").rglob(f"{found['branches'][0]['name']}.kvp")
    assert found["saved"] == 2 * first.stat().st_size
    assert [(one["tokens"], one["followers"], one["bits"]) for one in found["branches"]] == [(256, 3, None)]
    shown = cli("store", "stat", *store).out
    assert "objects      4, of 1 kinds; 490 tokens" in shown
    assert "256 tokens shared by 3 branches" in shown
    assert sum(path.stat().st_size for path in (tmp_path / "store" / "objects").rglob("*.kvp")) == found["bytes"]


@pytest.mark.long
def test_the_bits_of_a_shared_prefix_under_the_model(cli: Cli, store: list[object], tmp_path: Path) -> None:
    from kvpack.capture import CaptureOptions, load_model, run_tokens, write_capture
    from kvpack.capture.entropy import token_bits

    model = load_model(None)
    ids = model.tokenizer("The quick brown fox jumps over the lazy dog. " * 16).input_ids[:140]
    for i in range(2):
        path = tmp_path / f"{i}.safetensors"
        with path.open("wb") as sink:
            write_capture(run_tokens(model, [*ids[:128], *([i] * 12)], CaptureOptions(queries=0)), sink)
        assert cli("store", "put", path, *store, "--window", 128).code == 0
    (branch,) = document(cli, "stat", "--model", "embedded", *store)["branches"]
    mean, count = token_bits(model, ids[:128])
    assert branch["bits"] == pytest.approx(mean * count)
    assert f"{branch['bits']:.1f} bits under the model" in cli("store", "stat", "-m", "embedded", *store).out
    other = written(tmp_path / "x", text(TOKENS))
    more = written(tmp_path / "y", text(TOKENS[:256] + [1] * 70))
    assert cli("store", "put", other, more, *store).code == 0
    assert cli("store", "stat", "-m", "embedded", *store).code == 5


def test_damage_is_named(cli: Cli, store: list[object], capture: Path, tmp_path: Path) -> None:
    assert cli("store", "put", capture, *store).code == 0
    assert cli("store", "verify", *store).out == f"{store[1]}: 2 objects ok\n"
    second = next(path for path in (tmp_path / "store" / "objects").rglob("*.kvp") if path.stat().st_size < 5000)
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 1
    second.write_bytes(data)
    result = cli("store", "verify", *store)
    assert result.code == 4
    assert f"kvpack: {second}: corrupt: the checksum of " in result.err
    assert result.err.endswith(f"kvpack: {store[1]}: 1 files are damaged or do not belong there\n")
    listed = cli("store", "verify", *store, "--json")
    assert listed.code == 4
    assert [one["path"] for one in json.loads(listed.out)["damage"]] == [str(second)]
    got = cli("store", "get", capture, *store, "-o", tmp_path / "a")
    assert got.code == 0
    assert got.out == f"{tmp_path / 'a'}: 256 of the prompt's 300 tokens, 1 objects, lossless (bit-exact)\n"
    assert got.err.startswith(f"kvpack: stopped at token 256: {second}: corrupt: ")
    assert holds(Capture.open(tmp_path / "a"), TOKENS[:256])
    again = cli("store", "put", capture, *store)
    assert again.err == f"kvpack: {capture}: replaced damaged objects of tokens 256:300\n"
    assert cli("store", "verify", *store).code == 0


def test_a_damaged_key_serves_nothing(cli: Cli, store: list[object], capture: Path, tmp_path: Path) -> None:
    assert cli("store", "put", capture, *store).code == 0
    key = tmp_path / "store" / "key"
    key.write_text(("f" if key.read_text()[0] == "e" else "e") + key.read_text()[1:])
    for command in (["put", capture], ["get", capture, "-o", tmp_path / "x"], ["ls"], ["stat"], ["verify"], ["gc"]):
        result = cli("store", *command, *store)
        assert result.code == 4, command
        assert "key" in result.err


def test_a_damaged_kind_is_told_and_put_writes_it_again(
    cli: Cli, store: list[object], capture: Path, tmp_path: Path
) -> None:
    assert cli("store", "put", capture, *store).code == 0
    (kind,) = (tmp_path / "store" / "kinds").iterdir()
    kind.write_bytes(kind.read_bytes()[:-1] + b"]")
    missed = cli("store", "get", capture, *store, "-o", tmp_path / "x")
    assert (missed.code, "1 kinds are damaged: kvpack store verify names them" in missed.err) == (7, True)
    assert cli("store", "stat", *store).err.startswith("kvpack: 2 objects are damaged or cannot be reached")
    assert cli("store", "verify", *store).code == 4
    assert "300 of 300 tokens were there, 0 objects written" in cli("store", "put", capture, *store).out
    assert cli("store", "verify", *store).code == 0


def test_other_bits_are_told(cli: Cli, store: list[object], capture: Path, tmp_path: Path) -> None:
    assert cli("store", "put", capture, *store).code == 0
    result = cli("store", "put", written(tmp_path / "x", text(TOKENS, salt=1)), *store)
    assert result.code == 0
    assert "the store has other bits for tokens 0:256, 256:300, of another machine or schedule; they stay" in result.err
    row = document(cli, "put", tmp_path / "x", *store)
    assert row["differing"] == [[0, 256], [256, 300]]


def test_gc(cli: Cli, store: list[object], capture: Path, tmp_path: Path) -> None:
    assert cli("store", "put", capture, *store).code == 0
    assert document(cli, "gc", *store)["removed"] == 0
    assert document(cli, "gc", "--max-age", "1d", *store)["removed"] == 0
    for path in (tmp_path / "store" / "objects").rglob("*.kvp"):
        os.utime(path, (0, 0))
    assert document(cli, "gc", "--max-bytes", "1G", *store)["kept"] == 2
    result = cli("store", "gc", "--max-age", "12h", *store)
    assert result.out.startswith(f"{store[1]}: 2 objects removed, ")
    assert document(cli, "ls", *store)["texts"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["put", "{capture}", "--window", "100"], 2, "a multiple of 128"),
        (["put", "{capture}", "-c", "nonsense"], 2, "no codec is named"),
        (["put", "{capture}", "-c", "fisher-5"], 2, "needs a calibration profile"),
        (["put", "{capture}", "-c", "replay"], 2, "runs the model over a whole text"),
        (["put", "{missing}"], 1, "No such file"),
        (["get", "-o", "{out}"], 2, "give one prompt"),
        (["get", "{capture}", "--tokens", "1", "-o", "{out}"], 2, "give one prompt"),
        (["get", "--tokens", "1,x", "-o", "{out}"], 2, "--tokens takes token ids"),
        (["get", "{capture}", "--made", "up", "-o", "{out}"], 2, "--made is own or any"),
        (["get", "{capture}", "-m", "embedded", "-o", "{out}"], 2, "--model goes with"),
        (["get", "{capture}", "--json", "-o", "-"], 2, "cannot both go"),
        (["gc", "--max-bytes", "lots"], 2, "takes a size"),
        (["gc", "--max-age", "1G"], 2, "takes a time"),
    ],
)
def test_what_is_refused(
    cli: Cli, store: list[object], capture: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    assert cli("store", "put", capture, *store).code == 0
    places = {"capture": capture, "missing": tmp_path / "missing", "out": tmp_path / "out"}
    result = cli("store", *(argument.format(**places) for argument in arguments), *store)
    assert (result.code, message in result.err) == (code, True), result.err


def test_what_is_no_store(cli: Cli, capture: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for command in (["get", capture, "-o", tmp_path / "x"], ["ls"], ["stat"], ["verify"], ["gc"]):
        for place in (empty, tmp_path / "nowhere"):
            result = cli("store", *command, "--store", place)
            assert (result.code, "is not a store" in result.err) == (1, True), result.err
    assert not list(empty.iterdir())
    refused = cli("store", "put", capture, "--store", tmp_path)
    assert (refused.code, "is no part of a store" in refused.err) == (2, True)


def test_lists_of_token_ids(tmp_path: Path) -> None:
    assert parse_ids("1,2, 3") == parse_ids("1 2 3") == [1, 2, 3]
    (tmp_path / "ids").write_text("[4, 5,\n6]\n")
    assert parse_ids(str(tmp_path / "ids")) == [4, 5, 6]
    for wrong in ("", "1,-2", "1.5", "x", "2147483648", "٣"):
        with pytest.raises(UsageError):
            parse_ids(wrong)


def test_amounts() -> None:
    assert [amount(given, SIZES, "") for given in ("7", "2K", "500M", "20G")] == [7, 2048, 500 << 20, 20 << 30]
    assert [amount(given, TIMES, "") for given in ("30s", "5m", "12h", "2d")] == [30, 300, 43200, 172800]
    for wrong in ("", "G", "-1", "1.5G", "1H"):
        with pytest.raises(UsageError):
            amount(wrong, SIZES, "")
    with pytest.raises(UsageError):
        amount("12", TIMES, "a number without a unit")

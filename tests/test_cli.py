"""The shell manners: exit codes, streams, files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, one_of_each_family, write_tensors
from profiles import profile_for

from kvpack import jobs
from kvpack.codecs.recipes import CODECS, codec_names
from kvpack.formats.source import Capture
from kvpack.kvp.layout import MAGIC

Cli = Callable[..., "object"]


def test_round_trip_is_byte_for_byte(cli: Cli, small: Path, tmp_path: Path) -> None:
    packed = cli("compress", small)
    assert packed.code == 0
    assert packed.out.startswith(f"{small} -> {small}.kvp: lossless, 295608 -> ")
    back = cli("decompress", f"{small}.kvp", "-o", tmp_path / "back")
    assert (back.code, back.out) == (0, f"{small}.kvp -> {tmp_path / 'back'} (bit-exact)\n")
    assert (tmp_path / "back").read_bytes() == small.read_bytes()


def test_pipes(cli: Cli) -> None:
    packed = cli("compress", "-", stdin=SMALL.read_bytes())
    assert packed.code == 0
    assert packed.raw.startswith(MAGIC)
    back = cli("decompress", "-", stdin=packed.raw)
    assert back.raw == SMALL.read_bytes()


def test_existing_files_are_kept_unless_forced(cli: Cli, small: Path) -> None:
    target = small.with_name("small.safetensors.kvp")
    target.write_text("mine")
    refused = cli("compress", small)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err == f"kvpack: {target}: exists already; use -f to overwrite it\n"
    assert target.read_text() == "mine"
    assert cli("compress", "-f", small).code == 0
    assert target.read_bytes().startswith(MAGIC)


def test_several_inputs(cli: Cli, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        path.write_bytes(SMALL.read_bytes())
    assert cli("compress", *paths).out.count("ratio") == 2
    assert cli("compress", *paths, "-o", "x").code == 2
    assert cli("decompress", "-t", *(f"{path}.kvp" for path in paths)).out.count("ok (bit-exact)") == 2


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.safetensors" for name in ("b", "a", "c")]
    for path in paths:
        path.write_bytes(SMALL.read_bytes())
    return paths


def test_several_inputs_are_reported_in_their_order(cli: Cli, three: list[Path]) -> None:
    lines = cli("compress", *three).out.splitlines()
    assert [line.split(" -> ")[0] for line in lines] == list(map(str, three))
    rows = [json.loads(line) for line in cli("compress", "-f", *three, "--json").out.splitlines()]
    assert [row["input"] for row in rows] == list(map(str, three))
    assert {row["codec"] for row in rows} == {"lossless"}


def test_auto_decides_by_all_files_together(cli: Cli, three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def find_gpu(device: str, size: int) -> tuple[None, str]:
        asked.append((device, size))
        return None, "no GPU"

    monkeypatch.setattr("kvpack.gpu.runtime.host.find_gpu", find_gpu)
    assert cli("compress", *three).err == "kvpack: no GPU: using the CPU\n"
    assert asked == [("auto", 3 * SMALL.stat().st_size)]
    assert cli("compress", "-f", "-c", "kivi-4", *three).err == ""
    assert len(asked) == 1  # auto takes a GPU for lossless alone
    assert cli("compress", "-f", "-c", "kivi-4", "--device", "cuda", *three).err.count("\n") == 1


def test_rm_only_after_verification(cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        from kvpack.errors import CorruptError

        raise CorruptError("corrupt")

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "require_restorable", broken)
        assert cli("compress", "--rm", small).code == 1
        assert small.exists()
    assert cli("compress", "-f", "--rm", small).code == 0
    assert not small.exists()
    assert cli("decompress", "--rm", f"{small}.kvp").code == 0
    assert small.read_bytes() == SMALL.read_bytes()
    assert not Path(f"{small}.kvp").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["compress"], 2),
        (["compress", "IN", "-c", "nonsense"], 2),
        (["compress", "IN", "-k", "--rm"], 2),
        (["compress", "-f", "IN", "--chunk-tokens", "100"], 2),
        (["compress", "nowhere"], 1),
        (["compress", "."], 1),
        (["compress", "IN", "-o", "nowhere/out"], 1),
        (["capture", "--text", "TEXT", "-o", "nowhere/out"], 1),
        (["compress", "-o", "-", "--json", "IN"], 2),
        (["decompress", "-o", "-", "--json", "IN.kvp"], 2),
        (["nonsense"], 2),
        (["decompress", "IN"], 2),
        (["decompress", "IN", "-o", "out"], 4),
        (["decompress", "IN.kvp", "--layers", "0"], 2),
        (["decompress", "IN.kvp", "--layers", "7", "-o", "out"], 2),
        (["decompress", "IN.kvp", "--layers", "x", "-o", "out"], 2),
        (["decompress", "IN.kvp", "--tokens", "5:3", "-o", "out"], 2),
        (["decompress", "IN.kvp", "--tokens", "0:161", "-o", "out"], 2),
        (["inspect", "TEXT"], 4),
        (["verify", "TEXT", "IN.kvp"], 4),
        (["verify", "IN", "TEXT"], 4),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else str(a),
)
def test_bad_input_is_one_line_and_no_file(
    cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int
) -> None:
    monkeypatch.chdir(small.parent)
    Path("text").write_text("not a capture, not a container\n" * 10)
    assert cli("compress", small, "-q").code == 0
    before = sorted(small.parent.iterdir())
    names = {"IN": small.name, "IN.kvp": f"{small.name}.kvp", "TEXT": "text"}
    result = cli(*[names.get(argument, argument) for argument in arguments])
    assert (result.code, result.out) == (code, "")
    assert "Traceback" not in result.err
    if not result.err.startswith("Usage"):
        assert result.err.count("\n") == 1
        assert result.err.startswith("kvpack: ")
    assert sorted(small.parent.iterdir()) == before


@pytest.mark.parametrize("damage", [b"", b"\x89KVP", None])
def test_damaged_files_leave_nothing(cli: Cli, small: Path, tmp_path: Path, damage: bytes | None) -> None:
    assert cli("compress", small).code == 0
    path = Path(f"{small}.kvp")
    broken = bytearray(path.read_bytes())
    broken[len(broken) // 2] ^= 1
    path.write_bytes(bytes(broken) if damage is None else damage)
    target = tmp_path / "out"
    result = cli("decompress", path, "-o", target)
    assert result.code == 4
    assert result.err.count("\n") == 1
    assert result.err.startswith(f"kvpack: {path}: ")
    assert not target.exists()
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


@pytest.mark.parametrize(("changes", "lengths"), [(400, 100), pytest.param(2000, 500, marks=pytest.mark.long)])
def test_no_damage_ends_in_anything_but_one_line(
    cli: Cli, small: Path, tmp_path: Path, changes: int, lengths: int
) -> None:
    """Changed bytes and lengths through the command line: exit code 4, one line, no output file."""
    part, path, target = tmp_path / "part.safetensors", tmp_path / "part.kvp", tmp_path / "out"
    assert cli("compress", small).code == 0
    assert cli("decompress", f"{small}.kvp", "--layers", "29", "--tokens", "0:40", "-o", part).code == 0
    assert cli("compress", part, "-o", path).code == 0
    data = path.read_bytes()
    rng = np.random.default_rng(2)
    files = [data[:length] for length in rng.integers(0, len(data), lengths)]
    for place in rng.integers(0, len(data), changes):
        files.append(data[:place] + bytes([data[place] ^ int(rng.integers(1, 256))]) + data[place + 1 :])
    before = len(list(tmp_path.iterdir()))
    for content in files:
        path.write_bytes(content)
        result = cli("decompress", path, "-o", target)
        assert (result.code, result.out, result.err.count("\n")) == (4, "", 1)
        assert result.err.startswith(f"kvpack: {path}: ")
    assert len(list(tmp_path.iterdir())) == before
    path.write_bytes(data)
    assert cli("decompress", path, "-o", target).code == 0


def test_an_output_never_replaces_its_own_input(cli: Cli, small: Path) -> None:
    result = cli("compress", small, "-o", small, "-f", "--rm")
    assert (result.code, small.read_bytes()) == (2, SMALL.read_bytes())


def test_a_newer_format_has_its_own_exit_code(cli: Cli, small: Path) -> None:
    from test_container import with_prologue

    assert cli("compress", small).code == 0
    path = Path(f"{small}.kvp")
    path.write_bytes(with_prologue(path.read_bytes(), major=9))
    for command in (["decompress", "-t"], ["inspect"]):
        result = cli(*command, path)
        assert result.code == 6
        assert "upgrade" in result.err


def test_selection(cli: Cli, small: Path, tmp_path: Path) -> None:
    assert cli("compress", small, "--chunk-tokens", "128").code == 0
    target = tmp_path / "part.safetensors"
    result = cli("decompress", f"{small}.kvp", "--layers", "29", "--tokens", "100:140", "-o", target)
    assert result.code == 0
    assert "left out of the selection: 6 tensors" in result.err
    report = json.loads(cli("inspect", target, "--json").out)
    assert report["shapes"] == {
        "BF16[3, 40, 64]": ["layers.29.keys", "layers.29.values"],
        "I32[40]": ["tokens"],
    }
    from kvpack.jobs.reader import open_cache

    whole, part = open_cache(small), open_cache(target)
    for name in part.tensors:
        cut = whole.read(name)[100:140] if name == "tokens" else whole.read(name)[:, 100:140]
        assert (part.read(name) == cut).all()


PROBES = ["attention_mass", "queries.0", "queries.29", "query_positions"]


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ([], []),
        (["--drop-probes"], PROBES),
        (["--drop", "tok*"], ["tokens"]),
        (["-c", "kivi-4"], PROBES),
        (["-c", "kivi-4", "--keep-probes"], []),
        (["-c", "kivi-4", "--drop", "tokens"], [*PROBES, "tokens"]),
        (["--ratio", "8"], PROBES),
        (["--ratio", "1.2"], []),
    ],
    ids=" ".join,
)
def test_what_is_left_out_is_said_and_not_counted(
    cli: Cli, small: Path, options: list[str], dropped: list[str]
) -> None:
    """Lossy files have no probes unless told otherwise; a ratio that lossless reaches is lossless, and whole."""
    done = cli("compress", small, *options)
    report = json.loads(cli("inspect", f"{small}.kvp", "--json").out)
    assert sorted(report["dropped"]) == dropped
    assert f"ratio {report['ratio']:.3f}" in done.out
    row = json.loads(cli("compress", small, *options, "-f", "--json").out)
    assert (sorted(row["dropped"]), row["original_size"]) == (dropped, report["original_size"])
    sizes = {name: spec.nbytes for name, spec in ((s.name, s) for s in Capture.open(small).file.header.tensors)}
    assert row["dropped_bytes"] == sum(sizes[name] for name in dropped)
    assert (f"({row['dropped_bytes']} bytes)" in done.out) == bool(dropped)
    assert ("that only measure quality" in done.out) == (dropped == PROBES)
    skipped = json.loads(cli("compress", small, *options, "--resume", "--json").out)
    assert (skipped["skipped"], skipped["ratio"]) == (True, row["ratio"])


def test_verify_thresholds(cli: Cli, small: Path) -> None:
    assert cli("compress", small, "-c", "kivi-2").code == 0
    path = f"{small}.kvp"
    fine = cli("verify", small, path, "--max-nmse", "0.5", "--max-attn-err", "0.9")
    assert (fine.code, fine.err) == (0, "")
    assert fine.out.splitlines()[-2] == "bit-exact: no"
    left_out = "attention_mass, queries.0, queries.29, ... (4 in all)"
    assert fine.out.splitlines()[-1] == f"tensors that the file leaves out: {left_out}"
    for option in (["--max-nmse", "1e-9"], ["--max-attn-err", "1e-9"], ["--bit-exact"]):
        result = cli("verify", small, path, *option, "--json")
        assert result.code == 3
        assert json.loads(result.out)["schema_version"] == 1
        assert result.err.count("\n") == 1
    assert cli("compress", "-f", small).code == 0
    assert cli("verify", small, path, "--bit-exact").code == 0


def test_verify_refuses_another_original(cli: Cli, small: Path, tmp_path: Path) -> None:
    assert cli("compress", small, "-c", "turboquant-2").code == 0
    data = bytearray(small.read_bytes())
    data[len(data) // 3] ^= 1
    other = tmp_path / "other.safetensors"
    other.write_bytes(bytes(data))
    result = cli("verify", other, f"{small}.kvp")
    assert result.code == 5
    assert "was not made from" in result.err


def test_verify_without_queries_says_what_is_missing(cli: Cli, tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0x3F00, 0x4000, (2, 200, 8)).astype(np.uint16)
    path = write_tensors(tmp_path / "bare", {"layers.0.keys": ("BF16", bits), "layers.0.values": ("BF16", bits)})
    assert cli("compress", path, "-c", "kivi-4").code == 0
    result = cli("verify", path, f"{path}.kvp", "--max-nmse", 0.01)
    assert result.code == 0
    assert "no probe queries" in result.out
    assert cli("verify", path, f"{path}.kvp", "--max-attn-err", "1").code == 3


@pytest.mark.parametrize("codec", one_of_each_family(CODECS))
def test_inspect_json_adds_up(cli: Cli, small: Path, codec: str) -> None:
    path = small.with_name(f"{codec}.kvp")
    profile = profile_for(small, CODECS[codec])
    options = ("-D", profile.path) if profile else ()
    assert cli("compress", small, "-c", codec, "-o", path, "-q", *options).out == ""
    report = json.loads(cli("inspect", path, "--json", "--check").out)
    assert report["schema_version"] == 2
    assert report["header"] + report["index"] + sum(report["streams"].values()) == report["size"]
    assert report["size"] == path.stat().st_size
    assert report["checksums"] == {"header": "ok", "index": "ok", "streams": "ok"}
    assert report["codec"]["name"] == codec
    assert report["identity"]["model"]["name"] == "SmolLM2-135M-Instruct.Q4_1.gguf"
    kv = report["size"] - report["other_tensors"]
    assert report["bits_per_element"] == pytest.approx(8 * kv / (4 * 3 * 160 * 64))


def test_inspect_text(cli: Cli, small: Path) -> None:
    assert cli("compress", small).code == 0
    text = cli("inspect", f"{small}.kvp").out
    for expected in ("lossless (lossless)", "float_split() > rans()", "where the bytes went", "BF16[3, 160, 64]"):
        assert expected in text


def test_colour_and_progress_only_on_a_terminal(cli: Cli, small: Path) -> None:
    packed = cli("compress", small)
    report = cli("inspect", f"{small}.kvp")
    assert (packed.err, report.err) == ("", "")
    assert "\x1b" not in report.out


@pytest.mark.parametrize("plain", [True, False])
def test_terminals_get_progress_and_no_color_is_respected(small: Path, plain: bool) -> None:
    """In a real pseudo-terminal."""
    import pty

    environment = {**os.environ, "TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if plain else {})
    master, slave = pty.openpty()
    with subprocess.Popen([_script(), "compress", str(small)], stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        seen = b""
        with contextlib.suppress(OSError):
            while data := os.read(master, 4096):
                seen += data
    os.close(master)
    assert process.returncode == 0
    assert b"compressing small.safetensors" in seen
    assert b"ratio" in seen
    assert (re.search(rb"\x1b\[[0-9;]*3[0-9]", seen) is None) == plain


def test_compress_json(cli: Cli, small: Path) -> None:
    document = json.loads(cli("compress", small, "--json").out)
    assert document["schema_version"] == 2
    assert document["original_size"] == small.stat().st_size
    assert document["size"] == Path(f"{small}.kvp").stat().st_size


def test_verify_reads_standard_input(cli: Cli, small: Path) -> None:
    assert cli("compress", small).code == 0
    packed = Path(f"{small}.kvp").read_bytes()
    assert "bit-exact: yes" in cli("verify", small, "-", stdin=packed).out
    assert "bit-exact: yes" in cli("verify", "-", f"{small}.kvp", stdin=small.read_bytes()).out
    assert cli("verify", "-", stdin=packed).out.startswith("-: compared ")
    damaged = cli("verify", "-", stdin=packed[:-30])
    assert (damaged.code, damaged.err.startswith("kvpack: -: truncated")) == (4, True)
    assert cli("verify", "-", "-").code == 2


def test_inspect_shows_lists_of_equal_values_short_and_is_silent_with_q(cli: Cli, small: Path) -> None:
    assert '2 x "DynamicLayer"' not in cli("inspect", small).out  # of two, both are shown
    assert cli("inspect", "-q", small).out == ""
    capture = Capture.open(small)
    metadata = {**capture.metadata, "layer_classes": json.dumps(["DynamicLayer"] * 30)}
    tensors = {name: (spec.dtype, capture.read(name)) for name, spec in capture.tensors.items()}
    source = Capture.of("x", tensors, metadata).file.source
    small.write_bytes(source.read(0, source.size))
    assert '30 x "DynamicLayer"' in cli("inspect", small).out


def test_a_misspelt_codec_and_a_capture_to_decompress(cli: Cli, small: Path) -> None:
    assert "did you mean turboquant-4 or " in cli("compress", small, "-c", "turboqaunt-4").err
    wrong = cli("compress", small, "-c", "nonsense")
    assert (wrong.code, len(wrong.err) < 120) == (2, True)
    assert "is a capture by its name, and decompress takes .kvp files" in cli("decompress", small).err


def test_codecs_are_listed_and_completed(cli: Cli) -> None:
    assert cli("compress", "--list-codecs", "-q").out.split() == codec_names()
    environment = {**os.environ, "_KVPACK_COMPLETE": "complete_bash", "COMP_WORDS": "kvpack comp", "COMP_CWORD": "1"}
    done = subprocess.run([_script()], env=environment, capture_output=True, text=True, check=False)
    assert "compress" in done.stdout


def test_interrupted_writes_leave_nothing(cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "small.kvp")

    monkeypatch.setattr("kvpack.kvp.writer.ContainerWriter.finish", full)
    result = cli("compress", small)
    assert (result.code, result.err) == (1, "kvpack: small.kvp: No space left on device\n")
    assert [p.name for p in small.parent.iterdir()] == [small.name]


def _script() -> str:
    return str(Path(sys.executable).with_name("kvpack"))


def test_help_and_inspect_never_import_torch(small: Path) -> None:
    """Nor numpy, numba or the model library: that is what makes them start fast."""
    check = (
        "import sys, runpy\n"
        "sys.argv = ['kvpack', *sys.argv[1:]]\n"
        "try: runpy.run_module('kvpack', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'numba', 'transformers', 'zstandard'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    for arguments in (["--help"], ["--version"], ["inspect", str(small)], ["inspect", "--json", str(small)]):
        done = subprocess.run([sys.executable, "-c", check, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_compress_and_verify_never_import_torch(small: Path) -> None:
    code = (
        "import sys, kvpack.cli.main as m\n"
        "for arguments in (['compress', P], ['verify', P, P + '.kvp'], ['decompress', '-f', P + '.kvp']):\n"
        "    sys.argv = ['kvpack', *arguments]\n"
        "    try: m.main()\n"
        "    except SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    ).replace("P", repr(str(small)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_real_process_ends_in_one_line(small: Path) -> None:
    done = subprocess.run([_script(), "decompress", str(small), "-o", "-"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == f"kvpack: {small}: not a .kvp file: it is a safetensors file, as captures are\n"

"""What a newcomer meets: help, the list of codecs, messages about wrong files, tables, progress and completion."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from profiles import TINY
from test_docs import BENCHMARKS, ROOT, rows

from kvpack.cli import common
from kvpack.cli.main import ENVIRONMENT, app
from kvpack.codecs.catalogue import families
from kvpack.codecs.recipes import CODECS, codec_names
from kvpack.formats import kinds
from kvpack.kvp.layout import MAGIC

Cli = Callable[..., Any]
SCRIPT = str(Path(sys.executable).with_name("kvpack"))


# ---- Help ----------------------------------------------------------------------------------------------------------


def commands(group: Any = None, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words, ``store put`` among them."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        yield (*before, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*before, name))


EVERY = list(commands())


@pytest.mark.parametrize(
    ("words", "command"), EVERY, ids=lambda found: " ".join(found) if isinstance(found, tuple) else ""
)
@pytest.mark.parametrize("width", [80, 120])
def test_help_fills_its_width_and_cuts_nothing(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], command: Any, width: int
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", width)
    text = cli(*words, "--help").out
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
    paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    assert paragraphs[0]
    for paragraph in paragraphs:
        assert paragraph in said
        assert paragraph.endswith((".", ":"))


@pytest.mark.parametrize(
    ("words", "command"), EVERY, ids=lambda found: " ".join(found) if isinstance(found, tuple) else ""
)
def test_every_option_is_a_sentence_with_a_word_for_its_value(words: tuple[str, ...], command: Any) -> None:
    for param in command.params:
        if param.name in ("help", "install_completion", "show_completion") or not hasattr(param, "help"):
            continue
        assert param.help, (words, param.name)
        assert param.help[0].isupper() or param.help.startswith(("own:", "-")), param.help
        assert param.help.rstrip().endswith((".", ")")), param.help
        flag = getattr(param, "is_flag", False)
        assert flag or param.metavar, (words, param.name)
    assert len(command.help.split("\n\n")[0]) <= 90, "a list of commands has room for a line"


def test_the_environment_is_documented(cli: Cli) -> None:
    text = " ".join(cli("--help").out.split())
    page = (ROOT / "docs" / "usage.md").read_text()
    for name, meaning in ENVIRONMENT.items():
        assert f"{name}: {meaning}" in text
        assert f"`{name}`" in page
    read = {
        found
        for path in (ROOT / "kvpack").rglob("*.py")
        for found in re.findall(r"\"(KVPACK_\w+)\"", path.read_text())
        if path.name != "main.py"
    }
    assert read == {name for name in ENVIRONMENT if name.startswith("KVPACK_")}


def test_debug_shows_where_an_error_comes_from(cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cli("decompress", small, "-o", "-")
    monkeypatch.setenv("KVPACK_DEBUG", "1")
    found = cli("decompress", small, "-o", "-")
    assert (plain.code, found.code) == (4, 4)
    assert "Traceback" in found.err
    assert found.err.endswith(plain.err)


# ---- Codecs --------------------------------------------------------------------------------------------------------


def test_the_list_of_codecs_fits_a_screen_and_says_what_each_is(cli: Cli) -> None:
    lines = cli("compress", "--list-codecs").out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for family in families():
        (line,) = (line for line in lines if line.split() and line.split()[0] == family.codecs[0].name)
        assert family.about in line
    places = {name: at for at, line in enumerate(lines) for name in line.split()[:1]}
    without, lossy, calibrated = (at for at, line in enumerate(lines) if line.endswith(":"))
    assert without < places["lossless"] < places["replay"] < lossy < places["kivi-4"] < calibrated < places["fisher-8"]


def test_programs_get_names_or_json(cli: Cli) -> None:
    assert cli("compress", "--list-codecs", "-q").out.split() == codec_names()
    document = json.loads(cli("compress", "--list-codecs", "--json").out)
    assert [row["name"] for row in document["codecs"]] == codec_names()
    by_name = {row["name"]: row for row in document["codecs"]}
    assert (by_name["lossless"]["lossless"], by_name["fisher-4"]["needs_profile"]) == (True, True)
    assert (by_name["replay"]["needs_model"], by_name["local-4"]["needs_profile"]) == (True, False)


def test_the_lists_figures_are_those_of_the_benchmarks() -> None:
    """A new measurement changes kvpack/codecs/catalogue.py too."""
    measured = rows(BENCHMARKS, "### All codecs, one document")
    for family in families():
        if family.codecs[0].name in CODECS:
            bits = [float(measured[codec.name][0]) for codec in (family.codecs[0], family.codecs[-1])]
            assert [family.most, family.least] == bits, family.name
    (replay,) = re.findall(r"^\| `replay`, tokens by zstd \| ([\d.]+) \|", (ROOT / "docs/replay.md").read_text(), re.M)
    assert families()[-1].most == pytest.approx(float(replay) / (2 * 30 * 3 * 64), rel=0.01)


# ---- Wrong files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("compress KVP", 4, "not a safetensors file: it is a .kvp file (kvpack decompress gives the capture)"),
        ("compress EMPTY", 4, "not a safetensors file: it is empty"),
        ("compress TEXT", 4, "not a safetensors file"),
        ("compress IN -c fisher-4 -D TEXT", 5, "not a .kvprofile file"),
        ("compress IN -c fisher-4 -D KVP", 5, "not a .kvprofile file: it is a .kvp file"),
        ("compress IN -c fisher-4 -D IN", 5, "not a .kvprofile file of version 1"),
        ("compress IN -c fisher-4", 2, "needs a calibration profile"),
        ("compress IN --quality high", 2, "no profile is installed"),
        ("compress IN --chunk-tokens 100", 2, "--chunk-tokens is a multiple of 128 up to 1048576, not 100"),
        ("compress IN -o no/such", 1, "no/such: there is no directory no"),
        ("compress .", 1, "is a folder; give -r to take the files in it"),
        ("decompress EMPTY -o x", 4, "not a .kvp file: it is empty"),
        ("decompress IN -o x", 4, "not a .kvp file: it is a safetensors file, as captures are"),
        ("verify KVP IN", 4, "not a safetensors file: it is a .kvp file"),
        ("verify TEXT", 4, "neither a .kvp file nor a capture"),
        ("inspect EMPTY", 4, "neither a .kvp file nor a capture (a safetensors file): it is empty"),
        ("inspect TEXT", 4, "neither a .kvp file nor a capture"),
        ("store get TEXT --store STORE -o x", 4, "neither a .kvp file nor a capture"),
        ("capture --text EMPTY -o x", 1, "there is no text in it"),
        ("capture --text KVP -o x", 1, "not UTF-8 text"),
        ("calibrate --text EMPTY -o x", 1, "there is no text in it"),
    ],
    ids=lambda given: given if isinstance(given, str) and " " in given else "",
)
def test_a_wrong_file_is_told_what_it_is(
    cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch, command: str, code: int, message: str
) -> None:
    monkeypatch.chdir(small.parent)
    monkeypatch.setattr("kvpack.profiles.installed.SHIPPED", Path(os.devnull))
    Path("text").write_text("some words and nothing else\n" * 5)
    Path("empty").touch()
    assert cli("compress", small, "-o", "a.kvp").code == 0
    assert cli("store", "put", small, "--store", "store").code == 0
    before = sorted(small.parent.rglob("*"))
    names = {"IN": small.name, "KVP": "a.kvp", "TEXT": "text", "EMPTY": "empty", "STORE": "store"}
    found = cli(*(names.get(word, word) for word in command.split()))
    assert (found.code, found.err.count("\n")) == (code, 1), found.err
    assert message in found.err
    assert not re.search(r"\[Errno|/proc/|/dev/fd|tmp\.|Traceback", found.err)
    assert sorted(small.parent.rglob("*")) == before


def test_bad_standard_input_has_no_temporary_name(cli: Cli, small: Path, tmp_path: Path) -> None:
    for command in (
        ("compress", "-"),
        ("decompress", "-", "-o", "x"),
        ("inspect", "-"),
        ("verify", "-"),
        ("verify", small, "-"),
        ("store", "put", "-", "--store", tmp_path / "s"),
    ):
        found = cli(*command, stdin=b"neither this nor that")
        assert (found.code, found.err.count("\n")) == (4, 1), found.err
        assert found.err.startswith("kvpack: -: n")
    assert MAGIC[:4] == kinds.KVP


def test_a_model_or_a_device_that_is_none(cli: Cli, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("some words")
    for options, code, message in (
        (("-m", text), 1, f"{text}: a model is a hub id, a directory or a .gguf file, and this is another file"),
        (("--device", "gpu"), 2, "--device is auto, cpu, cuda, cuda:1, ..., not 'gpu'"),
        (("--dtype", "int8"), 2, "--dtype is auto, bf16, fp16, fp32, not 'int8'"),
    ):
        found = cli("capture", "--text", text, "-o", tmp_path / "x", *options)
        assert (found.code, found.err) == (code, f"kvpack: {message}\n")


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_an_extra_that_is_missing_is_named(small: Path, missing: str) -> None:
    (small.parent / "text").write_text("some words")
    script = f"import sys; sys.modules[{missing!r}] = None; from kvpack.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "capture", "--text", "text", "-o", "x"],
        cwd=small.parent, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, f"kvpack: capture needs {missing}: pip install 'kvpack[capture]'\n")


# ---- Tables and progress -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["20", "80"])
def test_tables_are_never_cut(cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert cli("compress", small, "-c", "kivi-2").code == 0
    text = cli("verify", small, f"{small}.kvp").out
    header, *lines = text.splitlines()[:4]
    assert header.split("  ")[0] == "layer"
    assert [len(re.split(r" {2,}", line)) for line in (header, *lines)] == [10] * 4
    assert max(map(len, (header, *lines))) <= 80
    document = json.loads(cli("inspect", f"{small}.kvp", "--json").out)
    text = cli("inspect", "-v", f"{small}.kvp").out
    for name, size in document["streams"].items():
        assert re.search(rf"^{re.escape(name)}  .*{size:,}  ", text, re.M)
    for layer in document["layers"]:
        assert re.search(rf"^{layer['layer']} .*  {layer['keys']:,}  .*{layer['values']:,}  ", text, re.M)
    assert "…" not in text
    assert '30 x "DynamicLayer"' in text
    assert "left out" in text


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with common.progress_bar("working", False) as progress:
        assert progress is not None
        for second in range(100):
            clock[0] = float(second)
            progress(second, 100)
        progress(100, 100)
    assert capsys.readouterr().err.splitlines() == [
        "kvpack: working: 10%, about 90 seconds left",
        "kvpack: working: 40%, about 60 seconds left",
        "kvpack: working: 70%, about 30 seconds left",
    ]
    with common.progress_bar("working", True) as progress:
        assert progress is None


@pytest.mark.skipif(shutil.which("script") is None, reason="no pseudo-terminal by script")
@pytest.mark.parametrize(
    "command",
    [
        pytest.param("capture --text text -o a.safetensors --max-tokens 32", marks=pytest.mark.long),
        "compress IN -f -c local-4",
        "decompress IN.kvp -f -o b",
        "verify IN IN.kvp",
        "calibrate --text text -o p --tokens 64 --context 32 --codecs kvtc -m MODEL",
    ],
    ids=lambda command: command.split()[0],
)
def test_quiet_draws_nothing_on_a_terminal(cli: Cli, small: Path, command: str) -> None:
    (small.parent / "text").write_text("some words that are read by a small model. " * 40)
    assert cli("compress", small).code == 0
    if "MODEL" in command:
        from models import CONFIGS, save_model

        save_model(CONFIGS["llama-gqa"](), small.parent / "MODEL")
    line = f"{SCRIPT} {command.replace('IN', small.name)} -q"
    done = subprocess.run(
        ["script", "-qec", line, "/dev/null"], cwd=small.parent, capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


# ---- Completion ----------------------------------------------------------------------------------------------------

IN_BASH = """
source "$HOME/.bashrc"
for words in "comp" "compress -c turboquant-p" "store p"; do
    COMP_WORDS=(kvpack $words) COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    _kvpack_completion kvpack
    echo "${COMPREPLY[@]}"
done
complete -p kvpack
"""
IN_FISH = """
source ~/.config/fish/completions/kvpack.fish
complete -C "kvpack compress -c turboquant-p"
complete -C "kvpack compress sma"
"""
IN_ZSH = """
source ~/.zfunc/_kvpack 2> /dev/null
_TYPER_COMPLETE_ARGS="kvpack compress -c turboquant-p" _KVPACK_COMPLETE=complete_zsh kvpack
"""
NAMES = ["turboquant-prod-1", "turboquant-prod-2", "turboquant-prod-3", "turboquant-prod-4"]


def shell(name: str, script: str, folder: Path) -> str:
    home = folder / "home"
    home.mkdir(exist_ok=True)
    path = f"{Path(SCRIPT).parent}{os.pathsep}{os.environ['PATH']}"
    # Twice, as a script, so that the shell stays to be found and does not become the command.
    for text in ("kvpack --install-completion; true", script):
        done = subprocess.run(
            [name, "-c", text], cwd=folder, capture_output=True, text=True, check=False,
            env={**os.environ, "HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return done.stdout


def test_completion_in_bash(small: Path) -> None:
    first, second, third, installed = shell("bash", IN_BASH, small.parent).splitlines()
    assert (first, sorted(second.split()), third) == ("compress", NAMES, "put")
    assert "-o default" in installed  # which completes names of files


@pytest.mark.parametrize(("name", "script"), [("fish", IN_FISH), ("zsh", IN_ZSH)])
def test_completion_in_other_shells(small: Path, name: str, script: str) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    text = shell(name, script, small.parent)
    assert sorted(re.findall(r"turboquant-prod-\d", text)) == NAMES
    assert name != "fish" or "small.safetensors" in text


def test_the_tiny_profile_is_not_taken_for_a_capture_with_layers(cli: Cli, tmp_path: Path) -> None:
    found = cli("compress", TINY, "-c", "kivi-4", "-o", tmp_path / "x")
    assert (found.code, "no layers.N.keys or layers.N.values" in found.err) == (4, True)

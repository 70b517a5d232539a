"""Many files in one command: how they are found and named, that a bad one stops no other, and going on later."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Result
from profiles import profile_for, tiny_capture

from kvpack.cli import workers
from kvpack.cli.batch import Item, Outcome
from kvpack.codecs.recipes import CODECS
from kvpack.jobs import KvpFile

Cli = Callable[..., Result]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Captures in folders: two sound ones, one that is cut off, and a file of another kind."""
    folder = tmp_path / "in"
    for name in ("a.safetensors", "deep/b.safetensors", "deep/er/c.safetensors"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(SMALL.read_bytes())
    (folder / "deep/b.safetensors").write_bytes(SMALL.read_bytes()[:5000])
    (folder / "notes.txt").write_text("notes")
    return folder


def _profile(path: Path, codec: str) -> list[object]:
    """Return the option that gives a codec its profile, if it takes one."""
    profile = profile_for(path, CODECS[codec])
    return ["-D", profile.path] if profile else []


def rows_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_folder_and_back(cli: Cli, tree: Path, tmp_path: Path, jobs: int) -> None:
    out, back = tmp_path / "new/out", tmp_path / "back"
    done = cli("compress", "-r", tree, "-o", f"{out}/", "-j", jobs, "--json")
    assert done.code == 4
    rows = rows_of(done.out)
    assert [Path(row["input"]).name for row in rows] == ["a.safetensors", "b.safetensors", "c.safetensors"]
    assert [row.get("exit_code") for row in rows] == [None, 4, None]
    assert "truncated" in rows[1]["error"]
    assert [row["schema_version"] for row in rows] == [2, 2, 2]
    first, last = done.err.splitlines()
    assert first == f"kvpack: {rows[1]['error']}"
    assert last == "kvpack: 1 of 3 files failed"
    assert files_in(out) == {"a.safetensors.kvp", "deep/er/c.safetensors.kvp"}
    assert cli("decompress", "-r", out, "-o", f"{back}/", "-j", jobs).code == 0
    assert files_in(back) == {"a.safetensors", "deep/er/c.safetensors"}
    assert (back / "deep/er/c.safetensors").read_bytes() == SMALL.read_bytes()


def test_without_a_folder_outputs_lie_beside_their_inputs(cli: Cli, tree: Path) -> None:
    assert cli("compress", "-r", tree, "-q").code == 4
    assert files_in(tree) >= {"a.safetensors.kvp", "deep/er/c.safetensors.kvp"}


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [("bad", 4, "not a safetensors file"), ("gone", 1, "No such file or directory"), ("taken", 1, "exists already")],
)
def test_a_bad_input_does_not_stop_the_others(cli: Cli, tmp_path: Path, damage: str, code: int, message: str) -> None:
    three = [tmp_path / f"{name}.safetensors" for name in "abc"]
    targets = [Path(f"{path}.kvp") for path in three]
    for path in three:
        path.write_bytes(SMALL.read_bytes())
    if damage == "bad":
        three[1].write_bytes(b"not a capture")
    elif damage == "gone":
        three[1].unlink()
    else:
        targets[1].write_bytes(b"mine")
    result = cli("compress", *three)
    assert (result.code, message in result.err) == (code, True)
    assert [line.split(" -> ")[0] for line in result.out.splitlines()] == [str(three[0]), str(three[2])]
    assert (targets[0].is_file(), targets[1].exists(), targets[2].is_file()) == (True, damage == "taken", True)
    assert damage != "taken" or targets[1].read_bytes() == b"mine"


def test_a_source_that_fails_while_it_is_coded(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine has asked for blocks of the files after it."""
    from kvpack.formats.source import Capture

    three = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path in three:
        path.write_bytes(SMALL.read_bytes())
    read = Capture.window

    def window(self: Capture, spec: Any) -> Any:
        if self.file.name == str(three[1]):
            raise OSError(5, "Input/output error", self.file.name)
        return read(self, spec)

    monkeypatch.setattr(Capture, "window", window)
    result = cli("compress", *three)
    assert (result.code, f"{three[1]}: Input/output error" in result.err) == (1, True)
    assert [Path(f"{path}.kvp").exists() for path in three] == [True, False, True]


def test_the_largest_exit_code_is_that_of_the_command(cli: Cli, small: Path, tmp_path: Path) -> None:
    packed, options = tmp_path / "packed.kvp", _profile(small, "fisher-4")
    assert cli("compress", small, "-c", "fisher-4", *options, "-o", packed).code == 0
    newer = bytearray(packed.read_bytes())
    newer[8] = 9
    for name, data in (("newer.kvp", bytes(newer)), ("cut.kvp", packed.read_bytes()[:-9])):
        (tmp_path / name).write_bytes(data)
    done = cli("decompress", "-t", "--json", *(tmp_path / name for name in ("cut.kvp", "packed.kvp", "gone.kvp")))
    assert [row["exit_code"] for row in rows_of(done.out)] == [4, 5, 1]
    assert done.code == 5


def test_names_of_a_list(cli: Cli, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one two.safetensors", "two\xe9.safetensors")]
    for path in paths:
        path.write_bytes(SMALL.read_bytes())
    listed = tmp_path / "list"
    listed.write_bytes(b"\n".join(os.fsencode(path) for path in paths) + b"\n\n")
    done = cli("inspect", "--json", "--files-from", listed)
    assert [row["input"] for row in rows_of(done.out)] == [str(path) for path in paths]
    done = cli("compress", "--json", "--files-from", "-", "-o", tmp_path, stdin=listed.read_bytes())
    assert [row["output"] for row in rows_of(done.out)] == [f"{path}.kvp" for path in paths]
    assert cli("compress", "--files-from", "-", "-", stdin=b"").code == 2
    empty = tmp_path / "empty"
    empty.write_text("")
    assert cli("compress", "--files-from", empty).code == 2


def test_wrong_usage_does_nothing(cli: Cli, tree: Path, tmp_path: Path) -> None:
    a, c = tree / "a.safetensors", tree / "deep/er/c.safetensors"
    twin = tmp_path / "a.safetensors"
    twin.write_bytes(SMALL.read_bytes())
    (tree / "a.safetensors.kvp.safetensors").write_bytes(SMALL.read_bytes())
    before = files_in(tmp_path)
    for arguments, message in (
        ([a, c, "-o", tmp_path / "x"], "name a folder"),
        ([a, twin, "-o", f"{tmp_path}/"], "would both become"),
        ([a, "-o", a, "-f"], "the command reads this file"),
        (["-", "-o", f"{tmp_path}/"], "has no name"),
        ([tmp_path / "in/deep/er/none", "-r", "--rm", "-k"], "contradict"),
        ([a, "-j", 2, "--device", "cuda"], "-j is for the CPU"),
    ):
        done = cli("compress", *arguments)
        assert (done.code, message in done.err) == (2, True), done.err
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert cli("compress", "-r", nothing).code == 2
    assert files_in(tmp_path) == before


def test_a_folder_needs_the_option(cli: Cli, tree: Path) -> None:
    done = cli("compress", tree)
    assert (done.code, done.err) == (1, f"kvpack: {tree}: is a folder; give -r to take the files in it\n")


def test_a_file_named_twice_is_taken_once(cli: Cli, small: Path) -> None:
    assert len(cli("compress", small, small).out.splitlines()) == 1


@pytest.mark.parametrize("codec", ["lossless", "kivi-4", "fisher-4"])
def test_resuming_skips_what_is_done(cli: Cli, tmp_path: Path, codec: str) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path in paths:
        path.write_bytes(SMALL.read_bytes())
    options = _profile(paths[0], codec)
    wanted = ("compress", "--resume", "--json", "-c", codec, *options)
    assert cli(*wanted, *paths[:2]).code == 0
    before = Path(f"{paths[0]}.kvp").stat()
    rows = rows_of(cli(*wanted, *paths).out)
    assert [row["skipped"] for row in rows] == [True, True, False]
    assert Path(f"{paths[0]}.kvp").stat().st_mtime_ns == before.st_mtime_ns
    assert {row["size"] for row in rows} == {before.st_size}
    back = tmp_path / "back"
    again = ("decompress", "--resume", "--json", *(f"{path}.kvp" for path in paths), "-o", f"{back}/", *options)
    assert [row["skipped"] for row in rows_of(cli(*again).out)] == [False, False, False]
    (back / "b.safetensors").unlink()
    assert [row["skipped"] for row in rows_of(cli(*again).out)] == [True, False, True]


def test_resuming_compares(cli: Cli, tmp_path: Path) -> None:
    """What lies in the place of an output is not skipped because of its name, and not lost either."""
    path, target = tmp_path / "a.safetensors", tmp_path / "a.safetensors.kvp"
    data = SMALL.read_bytes()
    path.write_bytes(data)
    assert cli("compress", path, "-q").code == 0
    packed = target.read_bytes()
    changed, broken = bytearray(data), bytearray(packed)
    changed[-1] ^= 1
    broken[len(packed) // 2] ^= 1
    cases: list[tuple[bytes, bytes, tuple[str, ...], str]] = [
        (bytes(changed), packed, (), "holds other data"),
        (data, bytes(broken), (), "does not match"),
        (data, packed[:-5], (), "truncated"),
        (data, b"", (), "exists already"),
        (data, packed, ("-c", "kivi-4"), "coded by lossless"),
        (data, packed, ("--chunk-tokens", "128"), "chunks of 2048"),
        (data, packed, ("--drop-probes",), "other tensors"),
    ]
    for source, there, options, message in cases:
        path.write_bytes(source)
        target.write_bytes(there)
        done = cli("compress", "--resume", path, *options)
        assert (done.code, message in done.err) == (1, True), done.err
        assert target.read_bytes() == there
        assert cli("compress", "--resume", "-f", path, *options).code == 0
        assert cli("compress", "--resume", path, *options).out == f"{path}: {target} is there already\n"
    back = tmp_path / "back"
    for there in (bytes(changed), data[:-1], b""):
        target.write_bytes(packed)
        back.write_bytes(there)
        done = cli("decompress", "--resume", target, "-o", back)
        assert (done.code, "exists already" in done.err) == (1, True), done.err
        assert back.read_bytes() == there


def test_resuming_with_rm_removes_what_was_left(cli: Cli, small: Path) -> None:
    assert cli("compress", small).code == 0
    assert cli("compress", "--resume", "--rm", small).code == 0
    assert not small.exists()


@pytest.mark.long
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_night_of_files(cli: Cli, tmp_path: Path, jobs: int) -> None:
    """2,000 files, of which 20 are bad."""
    sound, folder, out = tiny_capture(tmp_path / "x").read_bytes(), tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(2000):
        data = sound[: 700 + number] if number % 100 == 50 else sound
        (folder / f"{number:04}.safetensors").write_bytes(data)
    wanted = ("compress", "-r", folder, "-o", f"{out}/", "-j", jobs, "--resume", "--json")
    for skipped in (False, True):
        done = cli(*wanted)
        rows = rows_of(done.out)
        assert (done.code, len(rows)) == (4, 2000)
        bad = [row for row in rows if "error" in row]
        assert [Path(row["input"]).stem for row in bad] == [f"{number:04}" for number in range(50, 2000, 100)]
        assert all(row["exit_code"] == 4 and row["input"] in row["error"] for row in bad)
        assert {row["skipped"] for row in rows if "error" not in row} == {skipped}
        assert len(files_in(out)) == 1980
    assert cli("decompress", "-t", "-r", out, "-j", jobs).code == 0


class Fragile:
    """Work that ends its process at a file of the name ``die``, and fails at one of the name ``fail``."""

    def outcomes(self, items: Any) -> Iterator[Outcome]:
        """Yield an outcome for each item."""
        for item in items:
            if item.path.name == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if item.path.name == "fail":
                raise ValueError("failed")
            yield Outcome(str(item.path), {"process": os.getpid()})


def test_a_worker_that_dies_takes_one_file_with_it() -> None:
    names = ["a", "die", "b", "fail", "c"]
    found = list(workers.run(Fragile, [Item(Path(name), Path(name)) for name in names], 2))
    assert [outcome.path for outcome in found] == names
    assert [outcome.error is None for outcome in found] == [name in "abc" for name in names]
    assert found[1].error == "die: the process that worked on it was killed by signal 9"
    assert "internal error: ValueError('failed')" in (found[3].error or "")
    assert os.getpid() not in {(outcome.row or {}).get("process") for outcome in found}


def unable() -> Fragile:
    """Raise an error, as options do that contradict each other."""
    raise ValueError("no options")


def test_work_that_cannot_be_made_is_one_error() -> None:
    with pytest.raises(ValueError, match="no options"):
        list(workers.run(unable, [Item(Path(name), Path(name)) for name in "abc"], 2))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_command(tmp_path: Path, number: signal.Signals) -> None:
    """Also if it is killed, which it cannot tell them. What may be left then is a temporary file."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(60)]
    for path in paths:
        path.write_bytes(SMALL.read_bytes())
    command = [sys.executable, "-m", "kvpack", "compress", "-j", "2", *map(str, paths)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    limit = time.monotonic() + 30
    while time.monotonic() < limit and _workers_of(tmp_path):
        time.sleep(0.1)
    assert not _workers_of(tmp_path)
    made = list(tmp_path.glob("*.kvp"))
    assert len(made) < len(paths)
    assert all(KvpFile.open(path).lossless for path in made)
    assert number == signal.SIGKILL or not list(tmp_path.glob(".*.tmp"))


def _workers_of(folder: Path) -> list[str]:
    """Return the processes that have files of a folder open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link).startswith(f"{folder}/"):
                found.append(link.parts[2])
    return found

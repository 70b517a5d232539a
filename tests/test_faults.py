"""What the machine and other programs may do to a command: signals, full disks, bad reads, files that change."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL
from profiles import TINY

import kvpack
from kvpack import errors, jobs
from kvpack.cli.main import main
from kvpack.codecs.recipes import CODECS
from kvpack.errors import EXIT_CODES, KvpackError, MismatchError, TruncatedError
from kvpack.formats.input import InputFile
from kvpack.formats.output import atomic_output
from kvpack.formats.source import Capture
from kvpack.formats.temporary import create_beside, leftovers, settle
from kvpack.jobs.reader import KvpFile
from kvpack.profiles import Profile

Cli = Callable[..., Any]
ROOT = Path(__file__).parent.parent
COMMANDS = [["inspect", "{}"], ["compress", "{}"], ["decompress", "{}"], ["verify", "{}", "{}"], ["bench", "-q", "{}"]]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def packed(small: Path) -> Path:
    path = small.with_name("small.kvp")
    with path.open("wb") as sink:
        jobs.compress(small, sink, CODECS["lossless"])
    return path


# ---- Inputs that shrink or cannot be read --------------------------------------------------------------------------


def test_a_capture_that_shrinks_is_an_error(small: Path) -> None:
    capture = Capture.open(small)
    os.truncate(small, small.stat().st_size // 2)
    with pytest.raises(TruncatedError, match=r"small.safetensors: has become shorter"):
        jobs.compress(capture, io.BytesIO(), CODECS["lossless"])
    with pytest.raises(TruncatedError):
        capture.read("layers.29.values", slice(3, 7))


def test_a_file_that_shrinks_is_an_error_in_a_server_too(packed: Path) -> None:
    opened, archive = kvpack.open(packed), KvpFile.open(packed)
    os.truncate(packed, packed.stat().st_size // 2)
    for read in (opened.to_tensors, lambda: opened.read("layers.29.keys"), lambda: jobs.check(archive)):
        with pytest.raises(TruncatedError, match=r"^[^:]*small.kvp: has become shorter"):
            read()


def test_a_profile_that_shrinks_is_a_wrong_profile(tmp_path: Path) -> None:
    path = tmp_path / "p.kvprofile"
    path.write_bytes(TINY.read_bytes())
    profile = Profile.open(path)
    os.truncate(path, 5000)
    with pytest.raises(MismatchError, match="has become shorter"):
        [profile[name] for name in profile]


def test_a_command_whose_input_shrinks(cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = jobs.prepare

    def later(capture: Capture, *given: Any, **options: Any) -> Any:
        os.truncate(small, small.stat().st_size // 2)
        return prepare(capture, *given, **options)

    monkeypatch.setattr(jobs, "prepare", later)
    found = cli("compress", "--rm", small)
    assert (found.code, found.err.count("\n")) == (4, 1)
    assert [path.name for path in small.parent.iterdir()] == [small.name]


def test_short_reads_are_continued(packed: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr("kvpack.formats.input._pread", lambda file, count, at: pread(file, min(count, 100), at))
    monkeypatch.setattr(os, "preadv", lambda file, rooms, at: preadv(file, [rooms[0][:1000]], at))
    back, again = io.BytesIO(), io.BytesIO()
    jobs.decompress(KvpFile.open(packed), back)
    jobs.compress(small, again, CODECS["lossless"])
    assert (back.getvalue(), again.getvalue()) == (small.read_bytes(), packed.read_bytes())
    assert Capture.open(small).read("layers.29.keys", slice(3, 99)).shape[1] == 96


def test_a_read_that_fails_names_the_file(cli: Cli, small: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread

    def broken(file: int, count: int, at: int) -> bytes:
        if at > 30_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(file, count, at)

    monkeypatch.setattr("kvpack.formats.input._pread", broken)
    for command in (("compress", small), ("decompress", "-f", packed), ("verify", small, packed)):
        found = cli(*command)
        assert (found.code, found.err.count("\n")) == (1, 1)
        assert re.match(r"kvpack: \S*small\.(kvp|safetensors): Input/output error", found.err), found.err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "socket"])
def test_what_is_no_file_is_not_waited_for(cli: Cli, tmp_path: Path, command: list[str], kind: str) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / "x.kvp"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    options = [] if command[0] == "inspect" else ["-o", tmp_path / "out"] if command[0] != "verify" else []
    found = cli(*(word.format(path) for word in command), *options)
    assert (found.code, found.err.count("\n")) == (1, 1), found.err
    assert str(path) in found.err
    assert not (tmp_path / "out").exists()


def test_texts_profiles_and_results_are_files_too(cli: Cli, small: Path, tmp_path: Path) -> None:
    pipe, out = tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(pipe)
    for command in (
        ("capture", "--text", pipe, "-o", out),
        ("calibrate", "--text", pipe, "-o", out),
        ("compress", small, "-D", pipe, "-c", "fisher-4", "-o", out),
        ("bench", "--compare", pipe, pipe),
        ("claims", "--config", pipe),
    ):
        found = cli(*command)
        assert (found.code, found.err.count("\n")) == (1, 1), found.err
        assert f"{pipe}: is a named pipe" in found.err


# ---- Disks and folders ---------------------------------------------------------------------------------------------


def test_a_full_disk_names_the_output_and_what_it_needs(small: Path, packed: Path) -> None:
    """The limit on a file's size stands for the disk; both come from the same place and are handled in one."""
    for command, needed in (
        (f"compress {small} -o out", r"more than \d+"),
        (f"decompress {packed} -o out", str(small.stat().st_size)),
    ):
        script = f"ulimit -f 40; exec {sys.executable} -m kvpack {command}"
        done = run(["bash", "-c", script], small.parent)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert re.match(rf"kvpack: out: File too large: {needed} bytes needed, \d+ are free", done.stderr), done.stderr
        assert {path.name for path in small.parent.iterdir()} == {small.name, packed.name}


@pytest.mark.parametrize("command", ["inspect", "inspect --json", "decompress -o -", "compress -o - -f"])
def test_standard_output_may_be_full(small: Path, packed: Path, command: str) -> None:
    name, *options = command.split()
    path = small if name == "compress" else packed
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvpack", name, path, *options], stdout=full, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
    line = "kvpack: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_a_full_folder_for_temporary_files_is_named(cli: Cli, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def fileno(self) -> int:
            return 0

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(packed.parent))
    found = cli("decompress", "-", stdin=packed.read_bytes())
    assert (found.code, found.err.count("\n")) == (1, 1)
    assert found.err.startswith(f"kvpack: {packed.parent}: No space left on device, for a temporary file; TMPDIR")


@pytest.mark.parametrize("length", [240, 245, 250, 255])
def test_names_may_be_as_long_as_the_system_allows(cli: Cli, small: Path, length: int) -> None:
    for letter in "xé":
        name = (letter * 255).encode()[:length].decode(errors="ignore")
        assert cli("compress", small, "-o", small.with_name(name)).code == 0


def test_a_folder_that_cannot_be_written(small: Path) -> None:
    folder = small.parent / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(KvpackError, match="cannot be written"), atomic_output(folder / "x"):
        pass


# ---- Permissions, and what must not be overwritten -----------------------------------------------------------------


@pytest.mark.parametrize("given", [0o600, 0o640, 0o644, 0o444])
def test_outputs_have_the_permissions_of_inputs(cli: Cli, small: Path, given: int) -> None:
    small.chmod(given)
    packed, back = Path(f"{small}.kvp"), small.with_name("back")
    assert cli("compress", small).code == 0
    assert cli("decompress", packed, "-o", back).code == 0
    assert (mode(packed), mode(back)) == (given, given)
    back.chmod(0o400)
    assert cli("decompress", packed, "-o", back, "-f").code == 0
    assert mode(back) == 0o400


def test_a_store_gives_no_more_permissions_than_captures(cli: Cli, small: Path, tmp_path: Path) -> None:
    small.chmod(0o600)
    store, out = tmp_path / "store", tmp_path / "out"
    assert cli("store", "put", small, "--store", store).code == 0
    assert {mode(path) for path in (store / "objects").glob("*/*.kvp")} == {0o600}
    assert cli("store", "get", small, "--store", store, "-o", out).code == 0
    assert mode(out) == 0o600


def test_no_output_is_what_the_command_reads(cli: Cli, small: Path, packed: Path, tmp_path: Path) -> None:
    text, profile, model = tmp_path / "text", tmp_path / "p.kvprofile", tmp_path / "model"
    text.write_text("some text")
    profile.write_bytes(TINY.read_bytes())
    model.mkdir()
    weights = model / "model.safetensors"
    weights.write_bytes(small.read_bytes())
    linked = tmp_path / "linked"
    linked.symlink_to(profile)
    hard = tmp_path / "hard"
    os.link(small, hard)
    store = tmp_path / "store"
    assert cli("store", "put", small, "--store", store).code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for command in (
        ("compress", small, "-o", small),
        ("compress", small, "-o", hard),
        ("compress", small, "-c", "fisher-4", "-D", profile, "-o", profile),
        ("compress", small, "-c", "fisher-4", "-D", profile, "-o", linked),
        ("compress", small, "-c", "replay", "-m", model, "-o", weights),
        ("decompress", packed, "-o", packed),
        ("decompress", packed, "-D", profile, "-o", profile),
        ("capture", "--text", text, "-o", text),
        ("capture", "--text", text, "-m", model, "-o", weights),
        ("calibrate", "--text", text, "-o", text),
        ("bench", small, "-o", small),
        ("bench", small, "--report", small, "-o", tmp_path / "r"),
        ("bench", small, "-D", profile, "--plot", profile, "-o", tmp_path / "r"),
        ("store", "get", small, "--store", store, "-o", small),
        ("store", "get", small, "--store", store, "-o", store / "key"),
    ):
        found = cli(*command, *(["-f"] if command[0] != "bench" else []))
        assert (found.code, found.err.count("\n")) == (2, 1), (command, found.err)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# ---- Leftovers -----------------------------------------------------------------------------------------------------


def test_leftovers_are_named_and_removed(cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, target = small.with_name(".x.0123abcd.tmp"), small.with_name("x")
    left.write_bytes(b"half")
    handle, live = create_beside(target)
    monkeypatch.setattr("kvpack.formats.temporary._live", set())  # as another process sees it
    monkeypatch.setattr("kvpack.cli.common.targets._remarked", set())
    found = cli("compress", small)
    assert found.code == 0
    assert found.err.count("\n") == 1
    assert str(left) in found.err
    assert f"kvpack clean {small.parent}" in found.err
    assert left.name in cli("clean", "--dry-run", small.parent).out
    assert left.exists()
    document = json.loads(cli("clean", "--json", small.parent).out)
    assert document == {"schema_version": 1, "removed": True, "files": [{"path": str(left), "size": 4}]}
    assert (left.exists(), live.exists()) == (False, True)
    os.close(handle)
    assert leftovers(small.parent) == [live]
    settle(live)
    assert cli("clean", small.parent).out == "nothing was left behind\n"


def test_leftovers_of_a_store(cli: Cli, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    assert cli("store", "put", small, "--store", store).code == 0
    left = store / "tmp" / ".x.kvp.0123abcd.tmp"
    left.write_bytes(b"half")
    monkeypatch.setattr("kvpack.cli.common.targets._remarked", set())
    assert str(left) in cli("store", "put", small, "--store", store).err
    assert str(left) in cli("clean", store).out
    assert not left.exists()


# ---- Signals -------------------------------------------------------------------------------------------------------


def run(command: list[Any], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=3000,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


WAITING = """
import signal, sys, time
from kvpack import jobs
from kvpack.cli.main import main
if {}:  # what runs in the background of a shell ignores some of these
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
def waits(*_, **__):
    {}
jobs.decompress = waits
sys.argv = ["kvpack", *sys.argv[1:]]
main()
"""
PATIENT = """
    print("now", file=sys.stderr, flush=True)
    time.sleep(60)
"""
STUBBORN = """
    try:
        print("now", file=sys.stderr, flush=True)
        time.sleep(60)
    finally:
        time.sleep(60)
"""


def stopped(packed: Path, numbers: list[int], work: str = PATIENT, before: str = "") -> tuple[int, float]:
    """Send signals to a command in the midst of writing; return its exit code and the seconds it then took."""
    command = ["bash", "-c", f'{before} exec "$@"', "-", sys.executable, "-c", WAITING.format(not before, work)]
    child = subprocess.Popen(
        [*command, "decompress", packed, "-o", packed.parent / "out"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stderr is not None
    assert child.stderr.readline() == "now\n"
    assert len(list(packed.parent.glob(".out.*.tmp"))) == 1
    start = time.monotonic()
    for number in numbers:
        child.send_signal(number)
        time.sleep(0.1)
    child.communicate(timeout=30)
    return child.returncode, time.monotonic() - start


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_clean_up(packed: Path, name: str) -> None:
    number = getattr(signal, name)
    assert stopped(packed, [number])[0] == 128 + number
    assert {path.name for path in packed.parent.iterdir()} == {"small.kvp", "small.safetensors"}


def test_a_signal_that_comes_out_as_another_error(packed: Path) -> None:
    work = """
    try:
        print("now", file=sys.stderr, flush=True)
        time.sleep(60)
    except BaseException:
        raise ImportError("initialization failed")
"""
    assert stopped(packed, [signal.SIGINT], work)[0] == 130


def test_work_that_does_not_end_is_ended(packed: Path) -> None:
    for numbers, limit in (([signal.SIGTERM, signal.SIGHUP], 2.0), ([signal.SIGTERM], 6.0)):
        code, seconds = stopped(packed, numbers, STUBBORN)
        assert code == 143
        assert seconds < limit
        assert {path.name for path in packed.parent.iterdir()} == {"small.kvp", "small.safetensors"}


def test_what_was_ignored_stays_ignored(packed: Path) -> None:
    code, _ = stopped(packed, [signal.SIGHUP, signal.SIGTERM], before="trap '' HUP;")
    assert code == 143


def test_the_library_has_no_signal_handlers() -> None:
    with_signals = [path for path in (ROOT / "kvpack").rglob("*.py") if "import signal" in path.read_text()]
    assert with_signals == [ROOT / "kvpack" / "cli" / "stopping.py"]


def test_handlers_are_those_from_before_when_a_command_has_ended(cli: Cli, small: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert cli("inspect", small).code == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_streams_that_are_closed(packed: Path) -> None:
    """Using one is an error; no file takes its number."""
    command = f"{sys.executable} -m kvpack"
    for words, code, line in (
        ("compress - -o x <&-", 1, "standard input: Bad file descriptor"),
        (f"decompress {packed} -o - >&-", 1, "standard output: Bad file descriptor"),
        (f"inspect {packed} >&-", 1, "standard output: Bad file descriptor"),
        (f"decompress {packed} -q -o y <&- >&- 2>&-", 0, ""),
    ):
        done = run(["bash", "-c", f"{command} {words}"], packed.parent)
        assert (done.returncode, done.stderr) == (code, f"kvpack: {line}\n" if line else "")
    assert (packed.parent / "y").read_bytes() == SMALL.read_bytes()


@pytest.mark.parametrize("kills", [12, pytest.param(500, marks=pytest.mark.long)])
def test_commands_that_are_ended_at_random_moments(tmp_path: Path, kills: int) -> None:
    done = run([sys.executable, ROOT / "tests" / "kill_commands.py", tmp_path, str(kills), "1"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"killed {kills} " in done.stdout


# ---- The cache of compiled loops -----------------------------------------------------------------------------------


LOOP = """
import numpy as np
from kvpack.numerics.jit import njit
@njit
def total(values):
    found = 0
    for value in values:
        found += value
    return found
assert total(np.arange(5)) == 10
print(*total._cache_misses.values(), *total._cache_hits.values())
"""
DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "changed": lambda path: path.write_bytes(path.read_bytes()[:-100] + bytes(100)),
    "another's": lambda path: path.chmod(0o666),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "shared": lambda path: path.parent.chmod(0o777),
    "for a group": lambda path: path.parent.chmod(0o775),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_cache_never_fails_a_command(tmp_path: Path, damage: str) -> None:
    script, folder = tmp_path / "loop.py", tmp_path / "cache"
    script.write_text(LOOP)

    def counts() -> str:
        done = run([sys.executable, script], tmp_path, KVPACK_CACHE_DIR=str(folder))
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()

    assert [counts(), counts()] == ["1", "1"]
    [path] = folder.iterdir()
    assert run([sys.executable, script], tmp_path, KVPACK_CACHE_DIR=str(folder)).returncode == 0
    DAMAGE[damage](path)
    assert counts() == "1"
    repaired = damage in ("empty", "cut", "changed", "another's", "a pipe")
    assert repaired == (path.is_file() and path.stat().st_size > 1000 and mode(path) == 0o600 and mode(folder) == 0o700)


@pytest.mark.parametrize("place", ["/dev/full/x", "/proc/nowhere", "file/x"])
def test_a_cache_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    done = run([sys.executable, script], tmp_path, KVPACK_CACHE_DIR=place)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_loop_depends_on_is_in_its_key(tmp_path: Path) -> None:
    script, constants, folder = tmp_path / "loop.py", tmp_path / "constants.py", tmp_path / "cache"
    script.write_text(
        "from constants import BASE\n" + LOOP.replace("found = 0", "found = BASE").replace("== 10", "> 0")
    )
    for base, files in ((1, 1), (1, 1), (2, 2)):
        constants.write_text(f"BASE = {base}\n")
        # Python's own files of compiled code go by the second of a change.
        given = {"KVPACK_CACHE_DIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        assert run([sys.executable, script], tmp_path, **given).stderr == ""
        assert len(list(folder.iterdir())) == files


# ---- Exit codes ----------------------------------------------------------------------------------------------------


def test_one_table_of_exit_codes(cli: Cli) -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, KvpackError)]
    assert {each.exit_code for each in classes} | {0, 129, 130, 143} == set(EXIT_CODES)
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    plain = {int(code): re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", meaning) for code, meaning in rows}
    assert {code: plain[code] for code in EXIT_CODES} == EXIT_CODES
    text = " ".join(cli("--help").out.replace("│", " ").split())
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in text
    assert main.__doc__


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "version", "dtype", "capture", "kvp", "deep"])
def test_a_malformed_profile_is_a_wrong_one(cli: Cli, small: Path, packed: Path, tmp_path: Path, damage: str) -> None:
    path, sound = tmp_path / "p.kvprofile", TINY.read_bytes()
    path.write_bytes(
        {
            "cut": sound[: len(sound) // 2],
            "empty": b"",
            "text": b"not a profile",
            "version": sound.replace(b'"kvpack_profile_version":"1"', b'"kvpack_profile_version":"9"'),
            "dtype": sound.replace(b'"F16"', b'"X16"', 1),
            "capture": small.read_bytes(),
            "kvp": packed.read_bytes(),
            "deep": (400).to_bytes(8, "little") + b'{"a":' * 80,
        }[damage]
    )
    for command in (("compress", small, "-c", "fisher-4", "-o", tmp_path / "out"), ("decompress", packed, "-f")):
        found = cli(*command, "-D", path)
        assert (found.code, found.err.count("\n")) == (5, 1), found.err
        assert str(path) in found.err


def test_reading_into_memory(small: Path) -> None:
    file = InputFile(small)
    room = np.zeros(100, np.uint8)
    file.read_into(7, room)
    assert room.tobytes() == small.read_bytes()[7:107] == bytes(file.read(7, 107))
    with pytest.raises(TruncatedError):
        file.read_into(file.size - 10, room)
    assert SMALL.stat().st_size == file.size

"""The cache of compiled kernels on disk: what is kept, what is never loaded, and several users of it at once."""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from kvpack.gpu.runtime import compiler
from kvpack.gpu.runtime.source import source_of
from kvpack.numerics import program_cache
from kvpack.numerics.program_cache import ProgramCache, default_folder, program_key

KEY = program_key("source", ("-DA=1", "--gpu-architecture=sm_90"), "NVRTC 13.0", "13000")


class Compiler:
    """Counts how often something is compiled."""

    def __init__(self, program: bytes = b"machine code" * 100) -> None:
        self.program, self.calls = program, 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.program


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_program_is_compiled_once(tmp_path: Path) -> None:
    build, folder = Compiler(), tmp_path / "new" / "folder"
    assert ProgramCache(folder).get(KEY, build) == build.program
    assert ProgramCache(folder).get(KEY, build) == build.program
    assert build.calls == 1
    assert only_file(folder).name == f"{KEY}.cubin"
    assert only_file(folder).stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "empty", "head", "another", "other file"])
def test_a_damaged_file_is_compiled_again(tmp_path: Path, damage: str) -> None:
    build, cache = Compiler(), ProgramCache(tmp_path)
    cache.get(KEY, build)
    path = only_file(tmp_path)
    content = path.read_bytes()
    changed = {
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "cut": content[:-1],
        "longer": content + b"\0",
        "empty": b"",
        "head": content[:20],
        "another": program_cache._wrapped(b"other machine code", "another key"),
        "other file": b"\x7fELF" + content,
    }[damage]
    path.write_bytes(changed)
    assert cache.get(KEY, build) == build.program
    assert build.calls == 2
    assert path.read_bytes() == content
    assert cache.get(KEY, build) == build.program
    assert build.calls == 2


def test_a_file_of_somebody_else_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, cache = Compiler(), ProgramCache(tmp_path)
    cache.get(KEY, build)
    path = only_file(tmp_path)
    path.chmod(0o666)
    assert cache.find(KEY) is None
    path.chmod(0o620)
    assert cache.find(KEY) is None
    path.chmod(0o600)
    assert cache.find(KEY) == build.program
    tmp_path.chmod(0o777)
    assert cache.find(KEY) is None
    tmp_path.chmod(0o700)
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    assert cache.find(KEY) is None
    assert not program_cache._is_trusted_file(path.stat())
    assert cache.get(KEY, build) == build.program


def test_links_and_pipes_are_not_loaded(tmp_path: Path) -> None:
    build, cache = Compiler(), ProgramCache(tmp_path / "cache")
    cache.get(KEY, build)
    path = only_file(tmp_path / "cache")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.find(KEY) is None
    path.unlink()
    os.mkfifo(path, 0o600)
    assert cache.find(KEY) is None
    path.unlink()
    path.mkdir()
    assert cache.get(KEY, build) == build.program


@pytest.mark.parametrize("kind", ["none", "below a file", "a file", "read only", "writable by all"])
def test_a_folder_that_cannot_be_used_is_fine(tmp_path: Path, kind: str) -> None:
    build = Compiler()
    (tmp_path / "file").write_bytes(b"")
    for name, mode in (("read only", 0o500), ("writable by all", 0o777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    folder = {"none": None, "below a file": tmp_path / "file" / "folder", "a file": tmp_path / "file"}.get(
        kind, tmp_path / kind
    )
    for _ in range(2):
        assert ProgramCache(folder).get(KEY, build) == build.program
    if kind != "read only" or os.geteuid():  # root may write there
        assert build.calls == 2
        assert folder is None or not folder.is_dir() or not list(folder.iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", failing)
    assert ProgramCache(tmp_path).get(KEY, Compiler()) == Compiler().program
    assert not list(tmp_path.iterdir())


def test_errors_of_the_compiler_are_not_hidden(tmp_path: Path) -> None:
    def failing() -> bytes:
        raise RuntimeError("does not compile")

    with pytest.raises(RuntimeError, match="does not compile"):
        ProgramCache(tmp_path).get(KEY, failing)
    assert not list(tmp_path.iterdir())


def test_keys_differ_with_every_ingredient() -> None:
    given: list[Any] = ["source", ("-DA=1", "--gpu-architecture=sm_90"), "NVRTC 13.0", "13000"]
    changes = [
        ("source ", *given[1:]),
        (given[0], ("-DA=2", "--gpu-architecture=sm_90"), *given[2:]),
        (given[0], ("-DA=1", "--gpu-architecture=sm_80"), *given[2:]),
        (given[0], ("-DA=1", "--gpu-architecture=sm_90", "-DB=1"), *given[2:]),
        (given[0], ("-DA=1--gpu-architecture=sm_90",), *given[2:]),
        (*given[:2], "NVRTC 13.1", "13000"),
        (*given[:3], "13010"),
        (*given[:2], "NVRTC 13.013000", ""),
    ]
    keys = {program_key(*arguments) for arguments in [given, *changes]}
    assert len(keys) == 1 + len(changes)
    assert KEY in keys


def test_the_oldest_programs_are_dropped(tmp_path: Path) -> None:
    cache = ProgramCache(tmp_path, max_bytes=4000)
    for number in range(3):
        cache.get(f"{number}", Compiler(bytes([number]) * 1200))
        os.utime(tmp_path / f"{number}.cubin", (1000 + number, 1000 + number))
    cache.get("0", Compiler())  # used now, so number 1 is the oldest
    (tmp_path / "left behind.tmp").write_bytes(b"x")
    os.utime(tmp_path / "left behind.tmp", (1000, 1000))
    (tmp_path / "under way.tmp").write_bytes(b"x")
    cache.get("3", Compiler(bytes([3]) * 1200))
    assert {path.name for path in tmp_path.iterdir()} == {"0.cubin", "2.cubin", "3.cubin", "under way.tmp"}


def fill(folder: Path, start: Any, program: bytes) -> None:
    start.wait()
    for number in range(20):
        assert ProgramCache(folder).get(f"{number}", lambda n=number: program + bytes([n])) == program + bytes([number])  # type: ignore[misc]


def test_threads_at_once(tmp_path: Path) -> None:
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            fill(tmp_path, start, b"code" * 10000)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(list(tmp_path.iterdir())) == 20


def test_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    processes = [context.Process(target=fill, args=(tmp_path, start, b"code" * 10000)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 20
    assert all(path.suffix == ".cubin" for path in tmp_path.iterdir())


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_folder({"KVPACK_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert default_folder({"KVPACK_CACHE_DIR": "", "XDG_CACHE_HOME": "/b"}) == Path("/b/kvpack/kernels")
    at_home = Path.home() / ".cache" / "kvpack" / "kernels"
    assert default_folder({"XDG_CACHE_HOME": "relative"}) == at_home
    assert default_folder({}) == at_home

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    assert default_folder({}) is None


def test_programs_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source is compiled with its options, and again only if something that matters has changed."""
    calls: list[tuple[str, tuple[str, ...]]] = []

    def compiled(text: str, name: str, options: tuple[str, ...]) -> bytes:
        assert text == source_of(name)
        calls.append((name, options))
        return b"program"

    versions = {"nvrtc": "NVRTC 13.0", "driver": "13000"}
    monkeypatch.setattr(compiler, "compile_source", compiled)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: versions["nvrtc"])
    monkeypatch.setattr(compiler, "driver_version", lambda: versions["driver"])
    monkeypatch.setenv("KVPACK_CACHE_DIR", str(tmp_path))

    def count(unit: str = "rans/emit", *options: str) -> int:
        assert compiler.program(unit, options) == b"program"
        return len(calls)

    assert [count(), count(), count("rans/emit", "-DA=1"), count("rans/pack"), count()] == [1, 1, 2, 3, 3]
    versions["nvrtc"] = "NVRTC 13.1"
    assert [count(), count()] == [4, 4]
    versions["driver"] = "13010"
    assert [count(), count()] == [5, 5]
    assert len(list(tmp_path.iterdir())) == 5


def test_nvrtc() -> None:
    """NVRTC needs no GPU; where it is installed, it compiles a source, says what is wrong, and knows its GPUs."""
    try:
        assert re.fullmatch(r"NVRTC \d+\.\d+", compiler.nvrtc_version())
    except Exception as error:
        pytest.skip(str(error))
    assert 90 in compiler.nvrtc_architectures()
    options = ("--gpu-architecture=sm_80", "-default-device")
    assert compiler.compile_source(source_of("common/align"), "align", options).startswith(b"\x7fELF")
    with pytest.raises(RuntimeError, match="broken does not compile"):
        compiler.compile_source("nonsense", "broken", options)

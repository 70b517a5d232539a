"""Output files appear whole or not at all, and have the mode of any new file."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpack.errors import KvpackError
from kvpack.formats.output import atomic_output


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_has_the_mode_of_any_new_file(tmp_path: Path, umask: int) -> None:
    with atomic_output(tmp_path / "x") as file:
        file.write(b"x")
    (tmp_path / "other").touch()
    assert mode(tmp_path / "x") == mode(tmp_path / "other") == 0o666 & ~umask


@pytest.mark.parametrize("given", [None, 0o600, 0o640, 0o444, 0o666], ids=str)
def test_what_is_overwritten_is_never_made_wider(tmp_path: Path, umask: int, given: int | None) -> None:
    path = tmp_path / "x"
    path.touch()
    path.chmod(0o640)
    with atomic_output(path, force=True, mode=given) as file:
        file.write(b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", (0o666 & ~umask if given is None else given) & 0o640)


@pytest.mark.parametrize("given", [0o600, 0o640, 0o444, 0o666, 0o4755], ids=oct)
@pytest.mark.usefixtures("umask")
def test_a_file_has_the_mode_that_it_is_given(tmp_path: Path, given: int) -> None:
    with atomic_output(tmp_path / "x", mode=given) as file:
        assert mode(next(tmp_path.iterdir())) & 0o077 == 0
        file.write(b"x")
    assert mode(tmp_path / "x") == given & 0o777


def test_the_umask_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(_: int) -> int:
        raise AssertionError("the umask belongs to the whole process")

    monkeypatch.setattr(os, "umask", touched)
    with atomic_output(tmp_path / "x") as file:
        file.write(b"x")


def test_other_threads_create_files_with_their_own_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread writes outputs without pause, another creates private files and looks at their modes.

    Whoever touches the umask is made to wait, so that the other thread is sure to notice.
    """
    set_umask = os.umask
    before = set_umask(0o077)

    def slow(value: int) -> int:
        previous = set_umask(value)
        time.sleep(0.001)
        return previous

    monkeypatch.setattr(os, "umask", slow)
    done, wrong = threading.Event(), []

    def create() -> None:
        number = 0
        while not done.is_set():
            path = tmp_path / f"private-{number}"
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            if mode(path) != 0o600:
                wrong.append(oct(mode(path)))
            path.unlink()
            number += 1

    other = threading.Thread(target=create)
    try:
        other.start()
        for _ in range(200):
            with atomic_output(tmp_path / "x", force=True) as file:
                file.write(b"x")
            assert mode(tmp_path / "x") == 0o600
    finally:
        done.set()
        other.join()
        set_umask(before)
    assert wrong == []


def test_threads_may_write_the_same_file(tmp_path: Path) -> None:
    """Each writes a temporary file of its own, and one of them is the last."""
    contents = [bytes([i]) * 10_000 for i in range(8)]

    def write(content: bytes) -> None:
        for _ in range(20):
            with atomic_output(tmp_path / "x", force=True) as file:
                file.write(content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_name_that_is_taken_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["taken", "free"])
    monkeypatch.setattr("kvpack.formats.temporary.secrets.token_hex", lambda _: next(names))
    (tmp_path / ".x.taken.tmp").write_bytes(b"another's")
    with atomic_output(tmp_path / "x") as file:
        file.write(b"mine")
    assert (tmp_path / "x").read_bytes() == b"mine"
    assert (tmp_path / ".x.taken.tmp").read_bytes() == b"another's"


def test_nothing_is_left_where_the_work_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_output(tmp_path / "x") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def write() -> None:
        with atomic_output(path) as file:
            file.write(b"mine")
            path.write_bytes(b"another's")

    with pytest.raises(KvpackError, match="exists already"):
        write()
    assert path.read_bytes() == b"another's"
    assert [one.name for one in tmp_path.iterdir()] == ["x"]

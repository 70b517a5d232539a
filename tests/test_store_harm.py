"""What may happen to a store: bits that change, names that change, writers that are killed, writers at once."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_store import LOSSLESS, fetch, made_up, prompt_of, stored
from texts import holds, text

from kvpack.errors import CorruptError, NotStoredError
from kvpack.store import Prompt, Store, collect, put, verify
from kvpack.store.trie import end_of, follow, longest

HERE = Path(__file__).parent
TEXTS = [made_up([(0, 300)]), made_up([(0, 200), (1, 30)])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two texts that part within a window."""
    store = Store.create(tmp_path_factory.mktemp("store") / "s")
    for tokens in TEXTS:
        stored(store, text(tokens))
    assert not verify(store.path).damage
    return store.path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def serves_nothing_wrong(path: Path) -> None:
    """Every text gets right bits or none: fewer tokens with a note, or an error of the store."""
    for tokens in TEXTS:
        try:
            done, found = fetch(Store(path), Prompt.of_tokens(tokens))
        except (NotStoredError, CorruptError):
            continue
        assert holds(found, tokens[: done.held])
        assert done.held == len(tokens) or done.notes or not reaches(path, tokens)


def reaches(path: Path, tokens: list[int]) -> bool:
    """Whether every object of a text is still found by its name."""
    store = Store(path)
    ids = np.array(tokens, np.int32)
    ways = (longest(follow(store, kind, ids, 128, lambda _: ("prefill",))) for kind, _ in store.kinds())
    return any(end_of(way) == len(tokens) for way in ways)


def flips(path: Path, share: float) -> Iterator[tuple[Path, int, int]]:
    """Every file with places to flip: all bits of small files in the long run, some of each in the short one."""
    source = random.Random(0)
    for file in files(path):
        size = file.stat().st_size
        places = [(at, bit) for at in range(size) for bit in range(8)]
        ends = [(at, bit) for at, bit in places if at in (0, 8, 12, size - 1, size - 41)]
        for at, bit in {*ends[::7], *source.sample(places, min(len(places), max(4, round(len(places) * share))))}:
            yield file, at, bit


@pytest.mark.parametrize("share", [0.0, pytest.param(0.002, marks=pytest.mark.long)], ids=["few", "many"])
def test_every_changed_bit_is_found_and_never_served(copy: Path, share: float) -> None:
    changed = 0
    for file, at, bit in flips(copy, share):
        before = file.read_bytes()
        file.write_bytes(before[:at] + bytes([before[at] ^ 1 << bit]) + before[at + 1 :])
        damage = verify(copy).damage
        assert damage, (file, at, bit)
        assert any(file.name in one.path + one.reason for one in damage), (file, damage)
        serves_nothing_wrong(copy)
        file.write_bytes(before)
        changed += 1
    assert changed > 40
    assert not verify(copy).damage


def test_every_changed_name_is_found_and_never_served(copy: Path) -> None:
    source = random.Random(1)
    for path in sorted(copy.rglob("*"), key=lambda path: -len(path.parts)):
        at, bit = source.randrange(len(path.name)), source.randrange(7)
        name = path.name[:at] + chr(ord(path.name[at]) ^ 1 << bit) + path.name[at + 1 :]
        if "/" in name or "\0" in name or name in (".", ".."):
            continue
        other = path.rename(path.with_name(name))
        assert verify(copy).damage, name
        if path.name != "store.json":
            serves_nothing_wrong(copy)
        other.rename(path)
    assert not verify(copy).damage


@pytest.mark.parametrize("what", ["cut", "emptied", "longer", "removed", "exchanged"])
def test_whole_files_are_found_too(copy: Path, what: str) -> None:
    for file in files(copy):
        if file.name in ("lock", "store.json") and what in ("emptied", "cut", "removed"):
            continue
        before = file.read_bytes()
        if what == "removed":
            file.unlink()
        elif what == "exchanged":
            other = next(one for one in files(copy) if (one.suffix == file.suffix and one != file) or one == file)
            file.write_bytes(other.read_bytes())
            if other == file:
                continue
        else:
            file.write_bytes({"cut": before[:-1], "emptied": b"", "longer": before + b"\0"}[what])
        leaf = file.suffix == ".kvp" and not (copy / "objects" / file.stem).exists()
        assert verify(copy).damage or (what == "removed" and leaf), file
        if file.name != "store.json":
            serves_nothing_wrong(copy)
        file.write_bytes(before)


def test_serving_stops_before_a_damaged_object_and_put_replaces_it(copy: Path) -> None:
    store = Store(copy)
    tokens = TEXTS[0]
    middle = next(path for path in (copy / "objects").rglob("*.kvp") if (copy / "objects" / path.stem).exists())
    while middle.parent.name not in {name for name, _ in store.kinds()}:
        middle = next(path for path in (copy / "objects").rglob(f"{middle.parent.name}.kvp"))
    data = bytearray(middle.read_bytes())
    data[len(data) // 2] ^= 4
    middle.write_bytes(data)
    with pytest.raises(NotStoredError, match=middle.name):
        fetch(store, Prompt.of_tokens(tokens))
    done = stored(store, text(tokens))
    assert (done.repaired, done.written, done.differing) == ([(0, 128)], 1, [])
    assert not verify(copy).damage
    assert holds(fetch(store, prompt_of(text(tokens)))[1], tokens)


def run_killer(folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill so many writers (``kill_puts.py``), and return how often some but not all of a text's objects were there."""
    command = [sys.executable, str(HERE / "kill_puts.py"), str(folder), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: int(count) for name, count in (line.split() for line in done.stdout.splitlines())}


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.long)])
def test_killed_writers_lose_nothing_and_leave_nothing_half_written(tmp_path: Path, kills: int) -> None:
    found = run_killer(tmp_path, kills)
    assert found["killed"] == kills
    assert found["between"] >= kills // 5


def test_two_writers_at_once_agree(tmp_path: Path) -> None:
    """Two processes put the same texts at once, from nothing: the store is as one writer would have left it."""
    command = [sys.executable, str(HERE / "kill_puts.py"), str(tmp_path / "both"), "write"]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    for writer in writers:
        out, _ = writer.communicate()
        assert writer.returncode == 0, out
    both = Store(tmp_path / "both")
    assert not verify(both.path).damage
    from kill_puts import texts

    alone = Store.create(tmp_path / "alone")
    for tokens in texts(3):
        put(alone, text(tokens), LOSSLESS, window=128)
        assert holds(fetch(both, Prompt.of_tokens(tokens))[1], tokens)
        assert put(both, text(tokens), LOSSLESS, window=128).written == 0
    assert not list((both.path / "tmp").iterdir())
    assert collect(both).kept == collect(alone).kept

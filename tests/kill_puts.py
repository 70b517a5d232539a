"""Kills writers of a store at random moments and looks after each what is there. ``test_store_harm.py`` runs it.

python tests/kill_puts.py FOLDER KILLS SEED      kill so many writers with SIGKILL; exit code 1 if anything is lost
python tests/kill_puts.py STORE write            put some texts and end
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
from pathlib import Path

from texts import text

from kvpack.codecs.recipes import CODECS
from kvpack.store import Prompt, Store, collect, get, put, verify

LENGTH = 900
"""Tokens of a text: eight objects."""


def texts(count: int) -> list[list[int]]:
    """Texts that share their first 128 or 300 tokens with others."""
    return [[*range(128 if i % 2 else 300), *(1000 * i + at for at in range(LENGTH))] for i in range(1, count + 1)]


def write(path: Path, every: list[list[int]]) -> None:
    for tokens in every:
        put(Store.create(path), text(tokens), CODECS["lossless"], window=128)


def objects(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "objects").glob("*/*.kvp")}


def killed(path: Path, tokens: list[int], after: float) -> bool:
    """Put a text in a child that is killed after so many seconds, and say whether the kill came in time."""
    child = os.fork()
    if child == 0:
        write(path, [tokens])
        os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(folder: Path, kills: int, seed: int) -> None:
    source, path = random.Random(seed), folder / "store"
    write(folder / "trial", texts(1))  # loads what is compiled, so that children start at once
    started = time.monotonic()
    write(folder / "trial", texts(5))
    usual = (time.monotonic() - started) / 4
    done = between = attempts = 0
    before: dict[str, bytes] = {}
    for tokens in texts(20 * kills + 20):
        if done == kills:
            break
        attempts += 1
        if not killed(path, tokens, source.uniform(0, 1.5 * usual)):
            before = objects(path)
            continue
        done += 1
        after = objects(path) if path.exists() else {}
        assert before.items() <= after.items(), "an object that was stored is lost or changed"
        between += 0 < len(after) - len(before) < 8
        before = after
        if (path / "store.json").exists():
            assert not verify(path).damage, verify(path).damage
    look_again(path, texts(attempts))
    print(f"killed {done}\nbetween {between}\nattempts {attempts}")


def look_again(path: Path, every: list[list[int]]) -> None:
    """Put every text now, and get each one back bit for bit."""
    write(path, every)
    collect(Store(path))
    assert not list((path / "tmp").iterdir())
    for tokens in every:
        sink = io.BytesIO()
        assert get(Store(path), Prompt.of_tokens(tokens), CODECS["lossless"], sink).held == len(tokens)
        whole = text(tokens)
        for name in whole.tensors:
            assert whole.read(name).tobytes() in sink.getvalue()
    assert not verify(path).damage


if __name__ == "__main__":
    if sys.argv[2] == "write":
        write(Path(sys.argv[1]), texts(3))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

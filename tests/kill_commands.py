"""Ends commands at random moments, by each signal, and looks after each at what is there. ``test_faults.py`` runs it.

python tests/kill_commands.py FOLDER KILLS SEED      exit code 1 if anything is wrong; FOLDER must be empty

Commands run in forks of this process, which has loaded everything, so that signals meet work and not imports.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of a parent that forks are a trap

import numpy as np
from conftest import write_tensors
from models import CONFIGS, save_model

import kvpack.bench.report
import kvpack.bench.run
import kvpack.calibration
import kvpack.capture
import kvpack.fidelity.model  # noqa: F401 - loaded before forks
from kvpack.cli.main import main
from kvpack.formats.safetensors import TensorFile
from kvpack.formats.temporary import leftovers, remove_leftover
from kvpack.kvp import Container
from kvpack.profiles import Profile
from kvpack.store import verify

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@dataclass
class Command:
    """A command in a folder of its own. ``outputs`` are the names that may appear there, ``kept`` what may stay."""

    name: str
    words: list[str]
    outputs: tuple[str, ...]
    kept: tuple[str, ...] = ()
    seconds: float = 0.0
    ended: Counter[str] = field(default_factory=Counter)


def whole(path: Path) -> None:
    """Check that a file under a final name is a whole file of its kind."""
    if path.suffix == ".kvp":
        for part in (container := Container.open(path)).parts:
            container.verify(part)
    elif path.suffix == ".safetensors":
        TensorFile.open(path)
    elif path.suffix == ".kvprofile":
        Profile.open(path)
    elif path.suffix == ".json":
        json.loads(path.read_bytes())
    elif path.suffix == ".png":
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82"), path
    elif path.suffix == ".md":
        assert path.read_text().endswith("|\n"), path


def begun(words: list[str], folder: Path) -> int:
    """Run a command in a fork, in ``folder``, and return the fork's id."""
    child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # A signal that comes before the command begins just ends it.
        os.chdir(folder)
        said = os.open(folder.parent / "said", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for number in (0, 1, 2):
            os.dup2(said, number)
        sys.argv = ["kvpack", *words]
        main()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    finally:
        os._exit(70)


def ended(child: int) -> int:
    """Wait for a fork, and return its exit code as a shell does."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256


def prepared(folder: Path) -> list[Command]:
    """Make what commands read in ``folder``, and return the commands with the seconds that they take undisturbed."""
    model = save_model(CONFIGS["llama-gqa"](), folder / "model")
    text = folder / "text"
    text.write_text("".join(f"Line {i} of a text that says {i * i} and nothing else. " for i in range(400)))
    rng, shape = np.random.default_rng(0), (4, 4096, 64)
    names = [f"layers.{i}.{kind}" for i in range(8) for kind in ("keys", "values")]
    floats = (rng.standard_normal(shape, np.float32).view(np.uint32) for _ in names)
    bits = {name: ("BF16", (one >> 16).astype("<u2")) for name, one in zip(names, floats, strict=True)}
    big = write_tensors(folder / "big.safetensors", bits)
    few = f"--text {text} -m {model} -q"
    calibrate = f"calibrate {few} --tokens 2048 --context 256 --rank 8 --gradients 2 --units 8 --steps 4"
    commands = [
        Command("compress", f"compress {big} -o x.kvp -f -q".split(), ("x.kvp",)),
        Command("decompress", f"decompress {folder}/big.kvp -o x.safetensors -f -q".split(), ("x.safetensors",)),
        Command("capture", f"capture {few} -o x.safetensors -f --max-tokens 400".split(), ("x.safetensors",)),
        Command("calibrate", f"{calibrate} -o x.kvprofile -f".split(), ("x.kvprofile",), ("x.kvprofile.partial",)),
        Command(
            "bench",
            f"bench {folder}/small.safetensors -m {model} --quick -q --report x.md --plot x.png -o x.json -f".split(),
            ("x.json", "x.md", "x.png"),
        ),
        Command("store", f"store put {folder}/small.safetensors --store s --window 128 -q".split(), ("s",)),
    ]
    packed, small = f"compress {big} -o {folder}/big.kvp", f"capture {few} -o {folder}/small.safetensors"
    for words in (packed, f"{small} --max-tokens 400"):
        assert ended(begun(words.split(), folder)) == 0, words
    for command in commands:
        place = folder / command.name
        place.mkdir()
        command.seconds = min(undisturbed(command, place) for _ in range(3))  # the first may have loops to compile
    return commands


def undisturbed(command: Command, place: Path) -> float:
    """Run a command in the empty folder ``place``, which is emptied again, and return the seconds that it took."""
    start = time.monotonic()
    assert ended(begun(command.words, place)) == 0, command.words
    seconds = time.monotonic() - start
    for path in place.iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)
    return seconds


def look(command: Command, place: Path, number: signal.Signals, code: int) -> None:
    """Check what is there after a command was sent a signal and ended with ``code``."""
    assert code in (0, 128 + number, 256 - number), (command.name, number, code, (place.parent / "said").read_text())
    found = {path.name for path in place.iterdir()}
    left = {path.name for path in leftovers(place)}
    assert not left or number == signal.SIGKILL, (command.name, number, left)
    assert found <= {*command.outputs, *command.kept, *left}, (command.name, number, found)
    for name in found & set(command.outputs):
        if command.name == "store":
            if (place / name / "store.json").exists():
                assert not verify(place / name).damage
            inside = place / name / "tmp"
            kept = set(leftovers(inside)) if inside.exists() else set()
            assert not kept or number == signal.SIGKILL, (number, kept)
            assert not inside.exists() or set(inside.iterdir()) == kept, list(inside.iterdir())
            left |= {path.name for path in kept}
            assert all(map(remove_leftover, kept))
        else:
            whole(place / name)
    assert all(remove_leftover(path) for path in leftovers(place))
    spools = [path for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith("kvpack")]
    assert not spools, (command.name, spools)
    command.ended["leftovers"] += len(left)
    command.ended["in time" if code else "too late"] += 1


def run(folder: Path, kills: int, seed: int) -> None:
    """Send ``kills`` signals that come in time, in turn to each command and of each kind."""
    source, done, start = random.Random(seed), 0, time.monotonic()
    temporary = folder / "temporary"
    temporary.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    commands = prepared(folder)
    counts: Counter[str] = Counter()
    while done < kills:
        command, number = commands[done % len(commands)], SIGNALS[done // len(commands) % len(SIGNALS)]
        place = folder / command.name
        child = begun(command.words, place)
        time.sleep(source.uniform(0.01, command.seconds))
        os.kill(child, number)
        code = ended(child)
        look(command, place, number, code)
        if code:
            done += 1
            counts[signal.Signals(number).name] += 1
            if done % 20 == 0:
                print(f"{done} of {kills}", file=sys.stderr, flush=True)
        if command.name == "store":  # its work is done once; begin a new one
            shutil.rmtree(place / "s", ignore_errors=True)
    for command in commands:
        place = folder / command.name
        assert ended(begun(command.words, place)) == 0, command.words
        assert {path.name for path in place.iterdir()} == set(command.outputs)
        print(command.name, f"{command.seconds:.2f} s", dict(command.ended))
    print(f"killed {done}", dict(counts), f"in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run(Path(sys.argv[1]).absolute(), int(sys.argv[2]), int(sys.argv[3]))

"""Fuzz one reader, or all of them one after another.

    python tests/fuzz/run.py TARGET [TARGET ...] --runs 100000 [--seconds S] [--seed K] [--plain] [--keep]
    python tests/fuzz/run.py --list

Where atheris is installed, its libFuzzer chooses inputs by the coverage of kvpack's Python code; elsewhere, or with
``--plain``, every input is a change of a sound one. Compiled code is not instrumented. ``NUMBA_BOUNDSCHECK=1`` with a
``NUMBA_CACHE_DIR`` of its own checks its indices.

A run ends after so many executions or seconds, whichever comes first, or at a finding, whose input is saved as
``finding-TARGET``. It says how many executions it made, in how many seconds, and what they covered. With ``--keep`` the
inputs that reach lines which sound ones do not are put into ``fixtures/fuzz``.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import paths

if TYPE_CHECKING:
    from targets import Target

SECONDS, MEGABYTES = 5, 512
"""The most that one input may take: of time, and of memory beyond what the process had before."""

RUNS = 100_000


class HangError(Exception):
    """An input took longer than it may."""


@contextlib.contextmanager
def limits(seconds: float = SECONDS) -> Iterator[None]:
    """Limit memory, and raise :class:`HangError` where the timer ends, which is to be set to ``seconds``."""

    def stop(_number: int, _frame: Any) -> None:
        faulthandler.dump_traceback(all_threads=True)
        raise HangError(f"more than {seconds} s")

    before, soft_and_hard = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_DATA)
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # of data; others are mapped files and reserved
    most = pages * resource.getpagesize() + (MEGABYTES << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (most, soft_and_hard[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, soft_and_hard)


def plain(target: Target, inputs: Sequence[bytes], runs: int, seconds: float, seed: int, hang: float = SECONDS) -> int:
    """Give a reader changes of the inputs, and return how many. Errors have the input as ``data``."""
    rng, end, done = Random(seed), time.monotonic() + seconds, 0
    with limits(hang):
        while done < runs and time.monotonic() < end:
            data = target.mutate(rng.choice(inputs), rng)
            signal.setitimer(signal.ITIMER_REAL, hang)
            try:
                target.attempt(data)
            except BaseException as error:
                error.data = data  # type: ignore[attr-defined]
                raise
            done += 1
    return done


def inputs_of(name: str, target: Target) -> list[bytes]:
    """Return the sound inputs of a target, and those that earlier runs have kept."""
    return [*target.seeds(), *(path.read_bytes() for path in sorted(kept(name).glob("*")))]


def kept(name: str) -> Path:
    """Return the folder of inputs that were kept for a target."""
    return Path(__file__).parent.parent.parent / "fixtures" / "fuzz" / name.replace("/", "-")


def uninstrumented() -> list[str]:
    """Return the modules with functions that numba compiles, which it cannot if they count what they do."""
    root = Path(__file__).parent.parent.parent
    found = [path for path in (root / "kvpack").rglob("*.py") if re.search(r"\bnjit\b|\bnumba\b", path.read_text())]
    names = [path.relative_to(root).with_suffix("").parts for path in found]
    return [".".join(name[:-1] if name[-1] == "__init__" else name) for name in names]


def guided(name: str, runs: int, seconds: float, seed: int, keep: bool) -> None:
    """Let libFuzzer run in a process of its own, and print what it has done."""
    with tempfile.TemporaryDirectory(prefix="kvpack-fuzz-") as folder:
        command = [sys.executable, __file__, name, "--child", folder, "--runs", str(runs), "--seconds", str(seconds)]
        done = subprocess.run([*command, "--seed", str(seed)], stderr=subprocess.PIPE, text=True, check=False)
        found = re.findall(r"#(\d+)\s.*cov: (\d+) ft: (\d+)", done.stderr)
        ended = re.search(r"Done (\d+) runs in (\d+) second", done.stderr)
        if ended is None or not found:
            print(done.stderr[-6000:])
            raise SystemExit(f"{name}: a finding; the input is {finding(name)}")
        _, coverage, features = found[-1]
        count, took = int(ended[1]), max(int(ended[2]), 1)
        print(f"{name}: {count} executions, {took} s, {count // took}/s, coverage {coverage}, features {features}")
        if keep:
            keep_new(name, [path.read_bytes() for path in Path(folder).glob("*")])


def child(name: str, folder: Path, runs: int, seconds: float, seed: int) -> None:
    """Fuzz by libFuzzer in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=["kvpack"], exclude=uninstrumented()):
        from targets import TARGETS
    target = TARGETS[name]
    for number, data in enumerate(inputs_of(name, target)):
        (folder / f"seed-{number:04}").write_bytes(data)
        target.attempt(data)  # so that whatever is compiled or imported late is there before time is taken

    def mutate(data: bytes, most: int, number: int) -> bytes:
        rng = Random(number)
        changed: bytes = atheris.Mutate(data, most) if rng.random() < 0.5 else target.mutate(data, rng)
        return changed[:most]

    def once(data: bytes) -> None:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            target.attempt(data)
        except BaseException:
            traceback.print_exc()
            finding(name).write_bytes(data)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    options = [f"-runs={runs}", f"-max_total_time={int(seconds)}", f"-seed={seed}", "-timeout=60", "-max_len=65536"]
    options += [f"-artifact_prefix={finding(name)}-", "-rss_limit_mb=0"]
    with limits():
        atheris.Setup([sys.argv[0], *options, str(folder)], once, custom_mutator=mutate)
        atheris.Fuzz()


def finding(name: str) -> Path:
    """Return where the input of a finding is saved."""
    return Path(f"finding-{name.replace('/', '-')}")


def keep_new(name: str, found: Sequence[bytes]) -> None:
    """Keep inputs that reach lines of kvpack which neither sound inputs nor inputs before them reach."""
    from targets import TARGETS

    target = TARGETS[name]
    seen: set[tuple[str, int]] = set()
    for data in inputs_of(name, target):
        seen |= lines(target, data)
    folder, number = kept(name), len(list(kept(name).glob("*")))
    for data in sorted(found, key=lambda one: (len(one), one)):
        reached = lines(target, data)
        if not reached <= seen:
            seen |= reached
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:03}").write_bytes(data)
            number += 1


def lines(target: Target, data: bytes) -> set[tuple[str, int]]:
    """Return the lines of kvpack that an input reaches."""
    seen: set[tuple[str, int]] = set()
    root = str(Path(__file__).parent.parent.parent / "kvpack") + os.sep

    def trace(frame: Any, _event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(root):
            return None
        seen.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        target.attempt(data)
    finally:
        sys.settrace(None)
    return seen


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="a target, or the beginning of some, or 'all'")
    parser.add_argument("--list", action="store_true", help="print the targets")
    parser.add_argument("--runs", type=int, help=f"executions of a target (default: {RUNS}, or no limit but time)")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="do without atheris")
    parser.add_argument("--keep", action="store_true", help="keep inputs that reach other lines")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.runs is None:
        given.runs = RUNS if given.seconds is None else (1 << 31) - 1  # as many as libFuzzer counts
    given.seconds = given.seconds or 1e6
    faulthandler.enable()
    if given.child:
        child(given.targets[0], given.child, given.runs, given.seconds, given.seed)
        return
    from targets import TARGETS

    if given.list:
        print("\n".join(TARGETS))
        return
    chosen = dict.fromkeys(name for one in given.targets for name in TARGETS if one == "all" or name.startswith(one))
    if not chosen:
        parser.error("no such target: --list prints all")
    for name in chosen:
        if not given.plain and paths.guided():
            guided(name, given.runs, given.seconds, given.seed, given.keep)
            continue
        inputs = inputs_of(name, TARGETS[name])
        for data in inputs:
            TARGETS[name].attempt(data)  # so that whatever is compiled or imported late is there
        start = time.monotonic()
        try:
            done = plain(TARGETS[name], inputs, given.runs, given.seconds, given.seed)
        except Exception as error:
            if hasattr(error, "data"):
                finding(name).write_bytes(error.data)
            raise
        took = time.monotonic() - start
        print(f"{name}: {done} executions, {took:.0f} s, {done / took:.0f}/s", flush=True)


if __name__ == "__main__":
    main()

"""Fuzzing for about a minute, with the same inputs every time: as many of them as there is time for.

``tests/fuzz/run.py`` fuzzes for longer, and ``docs/security.md`` has what it came to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import paths
import pytest
from mutators import join, split
from run import inputs_of, limits, plain
from samples import NAMES
from targets import TARGETS, build, files, tasks_of

from kvpack.codecs.recipes import codec_names
from kvpack.errors import KvpackError

HANG = 60
"""Seconds after which an input hangs, on a machine that may be busy and compiles at first use."""


@pytest.mark.parametrize("name", [name for name in TARGETS if not name.startswith("decode/")])
def test_a_reader_takes_or_refuses(name: str) -> None:
    target = TARGETS[name]
    inputs = inputs_of(name, target)
    with limits(HANG):
        for data in inputs:
            target.attempt(data)
    assert plain(target, inputs, 20_000, 2, seed=1, hang=HANG) > 10


@pytest.mark.parametrize("name", [name for name in TARGETS if name.startswith("decode/")])
def test_a_decoder_takes_or_refuses(name: str) -> None:
    target = TARGETS[name]
    inputs = inputs_of(name, target)
    with limits(HANG):
        for data in inputs:
            target.attempt(data)
    assert plain(target, inputs, 20_000, 0.5, seed=1, hang=HANG) > 10


@pytest.mark.skipif(not paths.guided(), reason="atheris is not installed")
def test_libfuzzer_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(paths.HERE / "run.py"), "opening", "--child", str(tmp_path), "--runs", "2000"]
    found = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(paths.HERE.parent.parent)}, capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "Done 2000 runs" in found.stderr, found.stderr[-3000:]


def test_every_codec_is_fuzzed() -> None:
    assert {*codec_names()} == {"replay" if name.startswith("replay-") else name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_what_fuzzing_begins_with_is_coded_by_the_codec(name: str) -> None:
    """Sound inputs have streams of keys and of values, and no part that the codec could not represent."""
    names = {stream.name for task in tasks_of(name) for part in task.parts for stream in part.streams}
    assert any(not stream.startswith("whole/") for stream in names)
    for seed in TARGETS[f"decode/{name}"].seeds():
        TARGETS[f"decode/{name}"].read(seed)


def test_whole_files_are_put_together_as_they_were() -> None:
    for pieces, data in zip(TARGETS["file"].seeds(), files(), strict=True):
        assert len(build(pieces)) > len(data) // 2
        TARGETS["file"].read(pieces)


def test_pieces_come_back() -> None:
    pieces = [b"", b"a", bytes(300)]
    assert split(join(pieces)) == pieces


def test_a_finding_is_told() -> None:
    """What no reader may raise ends a run, with its input."""
    target = TARGETS["text"]

    def broken(data: bytes) -> None:
        if data != target.seeds()[0]:
            raise KvpackError("of another kind")

    finds = type(target)(broken, target.seeds, target.mutate)
    with pytest.raises(KvpackError, match="another kind") as caught:
        plain(finds, finds.seeds(), 1000, 10, seed=1)
    assert isinstance(caught.value.data, bytes)  # type: ignore[attr-defined]

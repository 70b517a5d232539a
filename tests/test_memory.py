"""Memory does not grow with the cache: a file is compressed and decompressed where the whole of it would not fit."""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, nmse

from kvpack.formats.safetensors import TensorFile, build_header
from kvpack.formats.source import Capture
from kvpack.numerics.floats import to_float32

CEILING = 350 << 20
"""The anonymous memory that a command may take beyond a process that has only imported kvpack."""

JOINED_CEILING = 950 << 20
"""The same for codecs that join all layers of a window, of which two windows are in work at a time."""

CACHE_BYTES = 400 << 20
SLOW_CACHE_BYTES = 100 << 20
"""The cache that ``local`` is given, which is slow; it may take no less memory for that."""

STACKS = (8 << 20) * ((os.cpu_count() or 1) + 2)
"""Stacks of threads, which ``RLIMIT_DATA`` counts whole whether they are used or not."""

JOINED = ("cachegen-4", "local-4")

LAYERS, HEADS, DIMS = 30, 3, 64

CASES = [
    pytest.param("lossless", CACHE_BYTES, 0.0),
    pytest.param("turboquant-3", CACHE_BYTES, 0.04, marks=pytest.mark.long),
    pytest.param("cachegen-4", CACHE_BYTES, 0.02, marks=pytest.mark.long),
    pytest.param("local-4", SLOW_CACHE_BYTES, 0.1, marks=pytest.mark.long),
]
"""Codecs, the bytes of the cache they are given, and the squared error that they may make, over the energy."""

SAMPLER = """
import atexit, json, os, sys, threading, time

peaks = {"RssAnon": 0, "VmData": 0}

def sample():
    with open("/proc/self/status") as status:
        for line in status:
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], 1024 * int(value.split()[0]))

def watch():
    while True:
        sample()
        time.sleep(0.003)

def report():
    sample()
    with open(os.environ["KVPACK_TEST_PEAKS"], "w") as file:
        json.dump(peaks, file)

atexit.register(report)
threading.Thread(target=watch, daemon=True).start()
"""
"""What a measured process runs first: a thread notes how much anonymous memory there is, and the peak is written down.

Pages of mapped files, such as the capture's, are not counted: the system drops them when it needs memory.
"""

IMPORT = "import kvpack.cli.main, kvpack.jobs, kvpack.jobs.reader, kvpack.codecs.recipes"
COMMAND = "import runpy; sys.argv = ['kvpack', *sys.argv[1:]]; runpy.run_module('kvpack', run_name='__main__')"


def peaks(folder: Path, code: str, *arguments: object, data: int | None = None) -> dict[str, int]:
    """Peaks of ``RssAnon`` and ``VmData`` of a process that runs ``code`` with at most ``data`` bytes of data."""
    found = folder / "peaks.json"
    found.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", SAMPLER + code, *map(str, arguments)],
        env={**os.environ, "KVPACK_TEST_PEAKS": str(found)},
        preexec_fn=None if data is None else partial(resource.setrlimit, resource.RLIMIT_DATA, (data, data)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    measured: dict[str, int] = json.loads(found.read_text())
    return measured


@cache
def tile() -> list[bytes]:
    """Bits of one head of 160 tokens: of both layers' keys and values."""
    capture = Capture.open(SMALL)
    names = [f"layers.{i}.{kind}" for i in (0, 29) for kind in ("keys", "values")]
    return [np.ascontiguousarray(capture.read(name)[0]).tobytes() for name in names]


def made(path: Path, size: int) -> Path:
    """A capture of about so many bytes: the small one's heads, over and over."""
    repeats = size // (2 * LAYERS * HEADS * len(tile()[0]))
    names = [f"layers.{i}.{kind}" for i in range(LAYERS) for kind in ("keys", "values")]
    header = build_header([(name, "BF16", [HEADS, 160 * repeats, DIMS]) for name in names], {})
    with path.open("wb") as file:
        file.write(len(header.raw).to_bytes(8, "little") + header.raw)
        for i, _ in enumerate(names):
            for _ in range(HEADS):
                file.writelines(itertools.repeat(tile()[i % 4], repeats))
    return path


def pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a capture's tensors."""
    with path.open("rb") as file:
        file.seek(TensorFile.open(path).header.data_start)
        while piece := file.read(1 << 24):
            yield piece


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("codec", "size", "error"), CASES)
def test_a_cache_larger_than_memory(tmp_path: Path, codec: str, size: int, error: float) -> None:
    source, packed, back = made(tmp_path / "cache.safetensors", size), tmp_path / "cache.kvp", tmp_path / "back"
    commands = [
        ("compress", source, "-c", codec, "-o", packed, "-q", "-f"),
        ("decompress", packed, "-o", back, "-q", "-f"),
        ("decompress", "-t", packed, "-q"),
    ]
    warm = made(tmp_path / "warm.safetensors", 1 << 24)
    for command in commands:  # Kernels are compiled once, which takes memory of its own.
        peaks(tmp_path, COMMAND, *(warm if part == source else part for part in command))
    base = peaks(tmp_path, IMPORT)
    ceiling = JOINED_CEILING if codec in JOINED else CEILING
    limit = base["VmData"] + ceiling + STACKS
    for command in commands:
        peak = peaks(tmp_path, COMMAND, *command, data=limit)["RssAnon"] - base["RssAnon"]
        assert peak <= ceiling, f"{command[0]} took {peak >> 20} MiB more than a process that imports kvpack"
    assert back.stat().st_size == source.stat().st_size
    for ours, exact in zip(pieces(back), pieces(source), strict=True):
        values = (to_float32(np.frombuffer(raw, np.uint16), "BF16") for raw in (ours, exact))
        assert nmse(*values) <= error

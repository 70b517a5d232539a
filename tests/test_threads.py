"""Threads that read from one open file at once get what one thread gets."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st

from kvpack import jobs
from kvpack.codecs.recipes import CODECS
from kvpack.jobs.reader import KvpFile

T = TypeVar("T")
NAMES = ["lossless", "turboquant-3", "cachegen-4"]
TENSORS = ["layers.0.keys", "layers.0.values", "layers.29.keys", "layers.29.values"]
READS = st.lists(st.tuples(st.sampled_from(TENSORS), st.integers(0, 160), st.integers(0, 160)), min_size=1, max_size=6)
"""Tensors and ranges of tokens, one read after another; some ranges are empty."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small capture by every codec, in two chunks."""
    folder = tmp_path_factory.mktemp("threads")
    for name in NAMES:
        with (folder / name).open("wb") as sink:
            jobs.compress(SMALL, sink, CODECS[name], chunk_tokens=128)
    return {name: folder / name for name in NAMES}


def at_once(*tasks: Callable[[], T]) -> list[T]:
    """What the tasks give, each in a thread of its own, all started together."""
    start = threading.Barrier(len(tasks))

    def run(task: Callable[[], T]) -> T:
        start.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(run, tasks))


def read(archive: KvpFile, reads: list[tuple[str, int, int]]) -> list[np.ndarray]:
    return [archive.read(name, slice(start, stop)) for name, start, stop in reads]


@pytest.mark.parametrize("name", NAMES)
@given(first=READS, second=READS)
def test_reads_of_two_threads_are_those_of_one(
    files: dict[str, Path], name: str, first: list[tuple[str, int, int]], second: list[tuple[str, int, int]]
) -> None:
    shared, alone = KvpFile.open(files[name]), KvpFile.open(files[name])
    found = at_once(lambda: read(shared, first), lambda: read(shared, second))
    for some, reads in zip(found, (first, second), strict=True):
        for ours, expected in zip(some, read(alone, reads), strict=True):
            assert ours.shape == expected.shape
            assert (ours == expected).all()


@pytest.mark.parametrize("name", NAMES)
def test_two_whole_decompressions_at_once_are_the_same(files: dict[str, Path], name: str) -> None:
    def whole(archive: KvpFile) -> bytes:
        sink = io.BytesIO()
        jobs.decompress(archive, sink)
        return sink.getvalue()

    expected = whole(KvpFile.open(files[name]))
    for _ in range(5):
        shared = KvpFile.open(files[name])
        assert at_once(lambda shared=shared: whole(shared), lambda shared=shared: whole(shared)) == [expected] * 2

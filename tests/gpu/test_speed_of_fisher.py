"""The bench's long captures: what comes back is checked before anything is timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from profiles import profile_for

from kvpack.bench.speed import fisher, given, made
from kvpack.codecs.context import DecodeContext
from kvpack.jobs.reader import open_cache


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs once, and takes a second."""
    monkeypatch.setattr(fisher, "seconds", lambda function, **_: [function(), 1.0, 1.0, 1.0][1:])
    monkeypatch.setattr(fisher, "by_kernel", lambda _, function: {"all": [function(), 1.0][1:]})


def test_a_made_cache_comes_back(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given, "CHUNK", 128)
    monkeypatch.setattr(made, "VOCABULARY", 500)
    lines = list(fisher.rows(gpu, given.made(gpu, made.Shape("tiny", 2, 2, 32, 40, 2, 4, 16, 8, 12), 2 * 256 * 256)))
    assert [line.what for line in lines[:2]] == ["fisher compress", "fisher decompress"]
    assert {line.data for line in lines} == {"tiny, 2 x 128, R 48"}


def test_a_real_capture_comes_back(gpu: Any, small: Path) -> None:
    """Keys of later copies are turned to where they stand: their coordinates are those of the first."""
    profile = profile_for(small, fisher.CODEC)
    assert profile is not None
    one = given.real(gpu, open_cache(small), profile, 3 * 128 * 64 * 3 * 4 * 2)
    assert (one.chunk, one.tensors.shape[2]) == (128, 3 * 128)
    lines = list(fisher.rows(gpu, one))
    assert [line.what for line in lines[:2]] == ["fisher compress", "fisher decompress"]
    klt, values = fisher.CODEC.keys.transforms[0], one.tensors.float().cpu().numpy().reshape(one.part.shape)
    alone = replace(one.part, shape=(len(values), 128, 64), context=DecodeContext(one.part.context.profile))
    first, third = (klt.forward(values[:, at : at + 128], replace(alone, first=at))[0, 8:] for at in (0, 256))
    assert np.abs(first - third).max() < 0.01 * np.abs(first).max()

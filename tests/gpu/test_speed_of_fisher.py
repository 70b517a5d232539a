"""The bench's made profile and cache: what comes back is checked before anything is timed."""

from __future__ import annotations

from typing import Any

import pytest

from kvpack.bench.speed import fisher


def test_a_made_cache_comes_back(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "CHUNK", 128)
    monkeypatch.setattr(fisher, "VOCABULARY", 500)
    monkeypatch.setattr(fisher, "seconds", lambda function: [function(), 1.0, 1.0, 1.0][1:])
    monkeypatch.setattr(fisher, "by_kernel", lambda _, function: {"all": [function(), 1.0][1:]})
    lines = list(fisher.rows(gpu, fisher.Shape("tiny", 2, 2, 32, 40, 2, 4, 16, 8, 12), 2 * 256 * 256))
    assert [line.what for line in lines[:2]] == ["fisher compress", "fisher decompress"]
    assert {line.data for line in lines} == {"tiny, 2 x 128, R 48"}

"""How a cache falls into windows, parts and blocks, and where the streams of a stack lie."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import encode_window
from hypothesis import given
from hypothesis import strategies as st

from kvpack.cache import CacheSpec, windows
from kvpack.codecs.context import DecodeContext
from kvpack.codecs.recipes import CODECS
from kvpack.formats.captures import cache_spec
from kvpack.formats.safetensors import build_header

SHAPES = st.lists(st.integers(0, 300), min_size=0, max_size=6)


def cache_of(*entries: tuple[str, str, list[int]]) -> CacheSpec:
    return cache_spec(build_header(entries, {}))


@given(SHAPES, st.sampled_from(["lossless", "cachegen-4", "local-4"]), st.sampled_from([128, 256]))
def test_windows_and_blocks_hold_every_row_once(tokens: list[int], name: str, chunk: int) -> None:
    entries = [(f"layers.{i}.keys", "BF16", [1, count, 2]) for i, count in enumerate(tokens)]
    cache = cache_of(*entries, ("tokens", "I32", [7]), ("x", "F32", [2, 2]))
    rows = {name: 0 for name, _, _ in entries}
    for window in windows(cache, chunk):
        assert window.layered == (window.parts[0].tensor.layer is not None)
        if not window.layered:
            assert [part.tensor.name for part in window.parts] == ["tokens", "x"]
            continue
        assert len({part.first for part in window.parts}) == 1
        runs = list(CODECS[name].blocks(window))
        assert [part for run in runs for part in window.take(run).parts] == list(window.parts)
        assert len(runs) == (len(window.parts) if name == "lossless" else 1)
        for part in window.parts:
            assert part.first == rows[part.tensor.name]
            assert part.length == part.tensor.rows
            rows[part.tensor.name] += part.tokens
    assert list(rows.values()) == tokens


def test_rows_are_not_positions() -> None:
    """A part's position counts from where its tensor begins in the text."""
    from dataclasses import replace

    (window,) = windows(cache_of(("layers.0.keys", "BF16", [1, 30, 4])), 128)
    part = window.parts[0]
    assert (part.first, part.position) == (0, 0)
    moved = replace(part, tensor=replace(part.tensor, origin=1000), first=16)
    assert (moved.first, moved.position) == (16, 1016)


def test_more_may_follow() -> None:
    cache = cache_of(("layers.0.keys", "BF16", [1, 300, 4]), ("tokens", "I32", [300]))
    assert [part.length for w in windows(cache, 128, open_ended=True) for part in w.parts] == [None, None, None, 300]


def test_the_streams_of_a_stack_lie_with_its_first_part_in_file_order() -> None:
    names = ["layers.10.values", "layers.2.keys", "layers.2.values", "layers.10.keys"]
    (window,) = windows(cache_of(*((name, "BF16", [1, 30, 4]) for name in names)), 128)
    codec = CODECS["cachegen-4"]
    bits = [np.full((1, 30, 4), 0x3F80 + i, np.uint16) for i in range(4)]
    streams = encode_window(codec, window, bits)
    assert [bool(some) for some in streams] == [True, True, False, False]
    assert {name for some in streams for name, _ in some} == codec.stream_names(window, DecodeContext())
    back = codec.decode(
        window, [[(name, memoryview(data)) for name, data in some] for some in streams], DecodeContext()
    )
    for ours, theirs in zip(back, bits, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1


STABLE = ["lossless", "zstd", "turboquant-3", "turboquant-prod-2", "cachegen-4"]


@pytest.mark.parametrize("name", [*STABLE, "kivi-4", "local-4"])
@given(prefix=st.integers(1, 3), seed=st.integers(0, 100))
def test_the_frames_of_a_prefix_are_those_of_the_whole(name: str, prefix: int, seed: int) -> None:
    """Of codecs that say so in files; of every codec where windows say that more tokens may follow."""
    codec = CODECS[name]
    assert codec.traits.prefix_stable == (name in STABLE)
    values = np.random.default_rng(seed).standard_normal((2, 4 * 128, 8)).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)

    def frames(tokens: int) -> list[object]:
        entries = [(f"layers.0.{kind}", "BF16", [2, tokens, 8]) for kind in ("keys", "values")]
        every = windows(cache_of(*entries), 128, open_ended=name not in STABLE)
        cut = lambda w: bits[:, w.parts[0].first : w.parts[0].first + w.parts[0].tokens]  # noqa: E731
        return [encode_window(codec, w, [cut(w), cut(w)[::-1]]) for w in every]

    assert frames(prefix * 128) == frames(4 * 128)[:prefix]

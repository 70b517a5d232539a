"""Profiles whose arrays are not what their names promise: other ranks, dtypes, lengths and values."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forge import profile, run
from hypothesis import given
from hypothesis import strategies as st
from profiles import TINY, tiny_capture

from kvpack import jobs
from kvpack.codecs.recipes import codec_named
from kvpack.errors import KvpackError, MismatchError
from kvpack.formats.source import Capture
from kvpack.profiles import Profile

Arrays = dict[str, np.ndarray]
CODECS = {"fisher": "fisher-4", "rope": "fisher-4", "kvtc": "kvtc-1", "aquakv-3": "aquakv-3", "higgs": "aquakv-3"}
"""For the beginning of an array's name, a codec that takes it."""

UNUSED = (
    "fisher.curve",
    "kvtc.keys.plan.0",
    "kvtc.keys.plan.2",
    "kvtc.values.plan.0",
    "kvtc.values.plan.2",
    "higgs.16",
)


@cache
def sound() -> Arrays:
    return {name: np.array(array) for name, array in Profile.open(TINY).items()}


def taken() -> list[tuple[str, str]]:
    """Each array of the tiny profile that a codec takes, with the codec."""
    names = [name for name in sorted(sound()) if not name.startswith(UNUSED)]
    return [(name, codec) for name in names for start, codec in CODECS.items() if name.startswith(start)]


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return Capture.open(tiny_capture(tmp_path_factory.mktemp("tiny") / "tiny.safetensors"))


def both_ways(arrays: Arrays, codec: str, capture: Capture, path: Path) -> None:
    """Compress with the sound profile and with this one, and decompress what could be compressed."""
    opened = Profile.open(profile(path, arrays))
    sink = io.BytesIO()
    jobs.compress(capture, sink, codec_named(codec), profile=opened)
    path.with_suffix(".kvp").write_bytes(sink.getvalue())
    jobs.check(jobs.KvpFile.open(path.with_suffix(".kvp"), opened))


def never_a_bug(arrays: Arrays, codec: str, capture: Capture, path: Path) -> None:
    """Work with these arrays, which may be refused as a profile that does not fit, and in no other way."""
    try:
        both_ways(arrays, codec, capture, path)
    except KvpackError as error:
        if error.exit_code != MismatchError.exit_code:
            raise


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "an axis more before": lambda a: a[None],
    "an axis more behind": lambda a: a[..., None],
    "an axis less": lambda a: a.reshape(-1) if a.ndim > 1 else a[0],
    "numbers of another kind": lambda a: a.astype(np.int32 if a.dtype.kind == "f" else np.float32),
    "halves": lambda a: a.astype(np.float16) if a.dtype.kind != "f" else a.astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(("name", "codec"), taken(), ids=[name for name, _ in taken()])
def test_an_array_of_another_rank_or_dtype(
    name: str, codec: str, change: Callable[[np.ndarray], np.ndarray], capture: Capture, tmp_path: Path
) -> None:
    """It is refused by name, before compiled code sees it."""
    changed = change(sound()[name])
    with pytest.raises(MismatchError, match=name.rpartition(".")[0].replace(".", r"\.")):
        both_ways({**sound(), name: changed}, codec, capture, tmp_path / "changed.kvprofile")


@pytest.mark.long
@pytest.mark.parametrize(("name", "codec"), taken(), ids=[name for name, _ in taken()])
def test_an_array_that_is_longer_shorter_or_empty(name: str, codec: str, capture: Capture, tmp_path: Path) -> None:
    """It is refused, or it is another sound profile: nothing is read behind its end, and nothing is a bug."""
    array = sound()[name]
    for axis in range(array.ndim):
        longer = np.concatenate([array, np.take(array, [-1] if array.shape[axis] else [], axis)], axis)
        for changed in (longer, np.delete(array, -1, axis) if array.shape[axis] else array, np.take(array, [], axis)):
            never_a_bug({**sound(), name: changed}, codec, capture, tmp_path / "changed.kvprofile")


EXTREMES = (-(2**31), -1, 0, 1, 63, 64, 2**14, 2**14 + 1, 2**31 - 1)


@given(data=st.data())
def test_integers_out_of_range(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indices, sizes, frequencies and scales of any value are refused or are harmless."""
    integers = [pair for pair in taken() if sound()[pair[0]].dtype == np.int32]
    name, codec = data.draw(st.sampled_from(integers))
    changed = sound()[name].copy()
    for _ in range(data.draw(st.integers(1, 3))):
        changed.reshape(-1)[data.draw(st.integers(0, changed.size - 1))] = data.draw(st.sampled_from(EXTREMES))
    folder = tmp_path_factory.mktemp("integers")
    source = Capture.open(tiny_capture(folder / "tiny.safetensors"))
    never_a_bug({**sound(), name: changed}, codec, source, folder / "changed.kvprofile")


@pytest.mark.long
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0])
@pytest.mark.parametrize(("name", "codec"), [p for p in taken() if sound()[p[0]].dtype == np.float32], ids=str)
def test_floats_of_any_value(name: str, codec: str, value: float, capture: Capture, tmp_path: Path) -> None:
    """They are refused, or the parts that they spoil are stored losslessly."""
    changed = sound()[name].copy()
    changed.reshape(-1)[: max(1, changed.size // 2)] = value
    never_a_bug({**sound(), name: changed}, codec, capture, tmp_path / "changed.kvprofile")


def test_frequencies_of_rope_with_an_axis_more(tmp_path: Path) -> None:
    """The heap overflow that this folder began with: compiled code took the second axis for the first."""
    source = tiny_capture(tmp_path / "tiny.safetensors")
    for length in (32, 1 << 16):
        bad = profile(tmp_path / "bad.kvprofile", {**sound(), "rope.inv_freq": np.zeros((1, length), np.float32)})
        found = run("compress", source, "-c", "fisher-4", "-D", bad, "-o", tmp_path / "x.kvp", folder=tmp_path)
        assert (found.code, found.err.count("\n")) == (5, 1), found
        assert "rope.inv_freq" in found.err


def test_an_order_of_tokens_that_are_floats(cli: Any, tmp_path: Path) -> None:
    bad = profile(tmp_path / "bad.kvprofile", {**sound(), "fisher.order": sound()["fisher.order"].astype(np.float16)})
    source = tiny_capture(tmp_path / "tiny.safetensors")
    found = cli("compress", source, "-c", "fisher-4", "-D", bad, "-o", tmp_path / "x.kvp")
    assert (found.code, found.err.count("\n")) == (5, 1)
    assert "fisher.order" in found.err


def test_arrays_that_do_not_begin_where_their_elements_may(capture: Capture, tmp_path: Path) -> None:
    """A header of any length puts arrays at odd addresses; they are copied before compiled code reads them."""
    path = profile(tmp_path / "odd.kvprofile", sound())
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for spaces in (1, 2, 3):
        odd = (length + spaces).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * spaces + raw[8 + length :]
        path.write_bytes(odd)
        opened = Profile.open(path)
        assert all(array.flags.aligned for array in opened.values())
        jobs.compress(capture, io.BytesIO(), codec_named("fisher-4"), profile=opened)

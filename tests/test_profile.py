"""The ``.kvprofile`` and what hostile, missing or foreign ones do, in the library and on the command line."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, one_of_each_family
from hypothesis import given
from hypothesis import strategies as st
from profiles import PROFILED, STACKED, TINY, arrays_for, model_metadata, tiny_capture, write

from kvpack.errors import KvpackError, MismatchError
from kvpack.formats.safetensors import TensorFile
from kvpack.jobs.reader import open_cache
from kvpack.profiles import Profile, write_profile

Cli = Callable[..., Any]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A capture for which no profile is installed, although it names the model of one that is shipped."""
    monkeypatch.setattr("kvpack.profiles.installed.SHIPPED", Path(os.devnull))
    return tiny_capture(tmp_path / "tiny.safetensors")


def test_a_profile_comes_back_as_written(tmp_path: Path) -> None:
    arrays = {
        "half": np.array([[0.5, 1.5]], np.float16),
        "single": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
        "none": np.zeros((0, 2), np.int32),
    }
    profile = Profile.open(write(tmp_path / "p", arrays, model={"name": "m"}, versions={"a": "ü"}))
    assert dict(profile).keys() == arrays.keys()
    for name, array in arrays.items():
        assert profile[name].shape == array.shape
        assert (profile[name] == array).all()
    assert profile["half"].dtype == np.float32
    assert profile.model == {"name": "m"}
    assert json.loads(profile.metadata["versions"]) == {"a": "ü"}
    assert profile.size == (tmp_path / "p").stat().st_size
    again = io.BytesIO()
    write_profile(dict(reversed(arrays.items())), {"versions": {"a": "ü"}, "model": {"name": "m"}}, again)
    assert again.getvalue() == (tmp_path / "p").read_bytes()


def test_what_is_no_profile(tmp_path: Path) -> None:
    newer, dtype = tmp_path / "newer", write(tmp_path / "dtype", {"a": np.zeros(3, np.float32)})
    newer.write_bytes(TINY.read_bytes().replace(b'_profile_version":"1"', b'_profile_version":"2"'))
    dtype.write_bytes(dtype.read_bytes().replace(b'"F32"', b'"U32"'))
    for path in (newer, dtype, SMALL):
        with pytest.raises(MismatchError, match=path.name):
            Profile.open(path)


def test_only_another_models_weights_are_refused() -> None:
    profile = Profile.open(TINY)
    profile.require_model({})
    profile.require_model({"model": "not json"})
    profile.require_model(TensorFile.open(SMALL).metadata)
    with pytest.raises(MismatchError, match="weights"):
        profile.require_model({"model": json.dumps({"name": "other", "weights_sha256": "0" * 64})})


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_damage_to_a_profile_goes_unseen_or_ends_in_a_bug(place: int, change: int) -> None:
    data = bytearray(TINY.read_bytes())
    data[place % len(data)] ^= change
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.kvprofile"
        path.write_bytes(bytes(data))
        try:
            profile = Profile.open(path)
        except KvpackError:
            return
    assert profile.sha256 != Profile.open(TINY).sha256


@pytest.mark.parametrize("codec", one_of_each_family(PROFILED))
def test_the_profile_is_asked_for_by_name(cli: Cli, tiny: Path, tmp_path: Path, codec: str) -> None:
    packed, back = tmp_path / "x.kvp", tmp_path / "back"
    missing = cli("compress", tiny, "-c", codec, "-o", packed)
    assert (missing.code, missing.out, missing.err.count("\n")) == (2, "", 1)
    assert "kvpack calibrate" in missing.err
    assert not packed.exists()
    assert cli("compress", tiny, "-c", codec, "-o", packed, "-D", TINY).code == 0
    missing = cli("decompress", packed, "-o", back)
    assert (missing.code, missing.out, missing.err.count("\n")) == (5, "", 1)
    assert "tiny.kvprofile" in missing.err
    assert "-D" in missing.err
    other = write(tmp_path / "other.kvprofile", arrays_for(2, 1, 64))
    for command in (("decompress", packed, "-o", back), ("decompress", "-t", packed), ("verify", tiny, packed)):
        wrong = cli(*command, "-D", other)
        assert (wrong.code, wrong.out, wrong.err.count("\n")) == (5, "", 1), command
        assert "tiny.kvprofile" in wrong.err
        assert "other.kvprofile" in wrong.err
    assert not back.exists()
    renamed = tmp_path / "renamed.kvprofile"
    renamed.write_bytes(TINY.read_bytes())
    assert cli("decompress", packed, "-o", back, "-D", renamed).code == 0
    assert cli("verify", tiny, packed, "-D", TINY, "--max-nmse", 0.9).code == 0
    report = json.loads(cli("inspect", packed, "--json").out)
    assert report["profile"]["name"] == "tiny.kvprofile"
    assert "tiny.kvprofile" in cli("inspect", packed).out


@pytest.mark.parametrize("codec", ["kvtc-1", "aquakv-3"])
def test_profiles_for_other_models_are_refused(cli: Cli, tiny: Path, tmp_path: Path, codec: str) -> None:
    shapes = {"layers": (3, 1, 64), "heads": (2, 2, 64), "dims": (2, 1, 32)}
    for name, shape in shapes.items():
        path = write(tmp_path / f"{name}.kvprofile", arrays_for(*shape))
        result = cli("compress", tiny, "-c", codec, "-o", tmp_path / "x.kvp", "-D", path)
        assert (result.code, result.err.count("\n")) == (5, 1), result.err
    model = {**model_metadata(tiny), "weights_sha256": "0" * 64}
    path = write(tmp_path / "weights.kvprofile", arrays_for(2, 1, 64), model=model)
    result = cli("compress", tiny, "-c", codec, "-o", tmp_path / "x.kvp", "-D", path)
    assert (result.code, result.err.count("\n")) == (5, 1)
    assert "weights" in result.err
    empty = write(tmp_path / "empty.kvprofile", {})
    result = cli("compress", tiny, "-c", codec, "-o", tmp_path / "x.kvp", "-D", empty)
    assert (result.code, result.err.count("\n")) == (5, 1)
    assert not (tmp_path / "x.kvp").exists()


@pytest.mark.parametrize("damage", ["text", "cut", "capture", "nowhere"])
def test_damaged_profiles_are_one_line(cli: Cli, tiny: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "p.kvprofile"
    content = {"text": b"not a profile at all", "cut": TINY.read_bytes()[:-1], "capture": tiny.read_bytes()}
    if damage in content:
        path.write_bytes(content[damage])
    for command in (("compress", tiny, "-c", "kvtc-1", "-o", tmp_path / "x"), ("bench", tiny)):
        result = cli(*command, "-D", path)
        assert (result.code, result.out, result.err.count("\n")) == (1 if damage == "nowhere" else 5, "", 1)
        assert str(path) in result.err
    assert not (tmp_path / "x").exists()


def test_codecs_without_a_profile_ignore_one(cli: Cli, small: Path) -> None:
    assert cli("compress", small, "-D", TINY).code == 0
    assert json.loads(cli("inspect", f"{small}.kvp", "--json").out)["profile"] is None
    assert cli("decompress", "-t", f"{small}.kvp", "-D", TINY).code == 0


@pytest.mark.parametrize("codec", one_of_each_family(STACKED))
def test_selections_of_stacked_files(cli: Cli, tiny: Path, tmp_path: Path, codec: str) -> None:
    packed, part, whole = tmp_path / "x.kvp", tmp_path / "part", tmp_path / "whole"
    assert cli("compress", tiny, "-c", codec, "-o", packed, "-D", TINY, "--chunk-tokens", 128).code == 0
    assert cli("decompress", packed, "-o", whole, "-D", TINY).code == 0
    for options in (("--layers", "29"), ("--tokens", "120:140"), ("--layers", "0", "--tokens", "5:6")):
        result = cli("decompress", packed, *options, "-o", part, "-D", TINY, "-f")
        assert result.code == 0, result.err
        assert part.stat().st_size < tiny.stat().st_size
        given = dict(zip(options[::2], options[1::2], strict=True))
        tokens = slice(*map(int, given.get("--tokens", "0:160").split(":")))
        cut, every = open_cache(part), open_cache(whole)
        names = [name for name in every.tensors if name.startswith(f"layers.{given.get('--layers', '')}")]
        assert [name for name in cut.tensors if name.startswith("layers.")] == names
        for name in names:
            assert cut.read(name).any()
            assert (cut.read(name) == every.read(name)[:, tokens]).all()

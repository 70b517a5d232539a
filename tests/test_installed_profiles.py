"""Profiles that commands find without -D: by the model's weights to compress, by their digest to decompress."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from profiles import TINY, tiny_capture

import kvpack
from kvpack.cache.metadata import parse_metadata
from kvpack.formats.source import Capture
from kvpack.profiles import Profile, install_profile, installed_folder, profile_for, profile_with, sections_of
from kvpack.profiles.installed import DIGITS, SHIPPED

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of installed profiles, still missing. Those that are shipped play no part."""
    monkeypatch.setattr("kvpack.profiles.installed.SHIPPED", Path(os.devnull))
    monkeypatch.setenv("KVPACK_PROFILES", str(tmp_path / "installed"))
    return tmp_path / "installed"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_capture(tmp_path / "tiny.safetensors")


def test_an_installed_profile_needs_no_option(cli: Cli, place: Path, tiny: Path, tmp_path: Path) -> None:
    packed, back = tmp_path / "x.kvp", tmp_path / "back.safetensors"
    command = ("compress", tiny, "-c", "fisher-4", "-o", packed)
    missing = cli(*command)
    assert (missing.code, missing.err.count("\n")) == (2, 1)
    assert "none is installed for this model" in missing.err
    install_profile(TINY, "tiny model/v1.gguf", move=False)
    (place / "broken.kvprofile").write_bytes(b"no profile")
    assert cli(*command).code == 0
    assert cli("decompress", packed, "-o", back).code == 0
    assert cli("verify", tiny, packed).code == 0
    named = tmp_path / "named.safetensors"
    assert cli("decompress", packed, "-o", named, "-D", TINY).code == 0
    assert back.read_bytes() == named.read_bytes()
    assert set(kvpack.open(packed).to_tensors()) == set(kvpack.open(packed, TINY).to_tensors())
    for path in place.iterdir():
        path.unlink()
    gone = cli("decompress", packed, "-o", back, "-f")
    assert (gone.code, gone.err.count("\n")) == (5, 1)
    assert Profile.open(TINY).sha256[:DIGITS] in gone.err


def test_names_tell_model_and_digest(place: Path) -> None:
    path = install_profile(TINY, "some/Model.gguf", move=False)
    digest = Profile.open(TINY).sha256
    assert path == place / f"some-Model.{digest[:DIGITS]}.kvprofile"
    assert path.read_bytes() == TINY.read_bytes()
    found = profile_with(digest)
    assert found is not None
    assert found.path == path
    assert profile_with(digest[:DIGITS] + "0" * 52) is None  # The name fits, the content does not.


def test_the_newest_of_several_is_taken(tmp_path: Path, tiny: Path) -> None:
    first = install_profile(TINY, "model", move=False)
    copy = tmp_path / "copy"
    copy.write_bytes(TINY.read_bytes())
    second = first.with_name("other.000000000000.kvprofile")
    copy.rename(second)
    capture = Capture.open(tiny)
    metadata, tensors = capture.metadata, list(capture.tensors.values())
    for newer, older in ((first, second), (second, first)):
        os.utime(newer, (2e9, 2e9))
        os.utime(older, (1e9, 1e9))
        found = profile_for(metadata, "fisher", tensors)
        assert found is not None
        assert found.path == newer
    assert (
        profile_for(metadata, "fisher", [spec for spec in tensors if spec.name != "layers.0.keys"]) is None
    )  # It is for another number of elements.
    assert profile_for(metadata, "kvtc", tensors) is not None
    assert profile_for(metadata, "other", tensors) is None
    assert profile_for({}, "fisher", tensors) is None
    assert profile_for({"model": json.dumps({"weights_sha256": "0" * 64})}, "fisher", tensors) is None


def test_where_profiles_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVPACK_PROFILES")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert installed_folder() == Path("/data/kvpack/profiles")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert installed_folder() == Path.home() / ".local/share/kvpack/profiles"


def test_shipped_profiles_are_what_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpack.profiles.installed.SHIPPED", SHIPPED)
    shipped = list(SHIPPED.glob("*.kvprofile"))
    assert shipped
    page = (Path(__file__).parent.parent / "docs" / "profile-format.md").read_text()
    for path in shipped:
        profile = Profile.open(path)
        assert re.fullmatch(rf".+\.{profile.sha256[:DIGITS]}\.kvprofile", path.name)
        assert profile.sha256 in page  # The page says how it was made.
        assert sections_of(profile) == {"fisher"}
        assert parse_metadata(profile.metadata).weights_sha256
        assert "fisher.curve" in profile

"""``kvpack.open``: tensors and a model's cache, from captures and files of every way to decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, nmse, write_tensors
from profiles import profile_for

import kvpack
from kvpack import jobs
from kvpack.codecs.protocol import Need
from kvpack.codecs.recipes import CODECS
from kvpack.errors import FormatError, MismatchError, UsageError
from kvpack.formats.source import Capture
from kvpack.jobs.opened import Opened
from kvpack.numerics.floats import to_float32


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The small capture's two layers as layers 0 and 1, and its tokens."""
    given = Capture.open(SMALL)
    names = [f"layers.{to}.{kind}" for to in (0, 1) for kind in ("keys", "values")]
    sources = [f"layers.{of}.{kind}" for of in (0, 29) for kind in ("keys", "values")]
    tensors = {name: ("BF16", np.array(given.read(source))) for name, source in zip(names, sources, strict=True)}
    tensors["tokens"] = ("I32", np.array(given.read("tokens")))
    return write_tensors(tmp_path / "whole.safetensors", tensors, dict(given.metadata))


def packed(source: Path, name: str) -> tuple[Path, Path | None]:
    """A file, and its profile's."""
    codec, path = CODECS[name], source.with_suffix(".kvp")
    profile = profile_for(source, codec) if Need.PROFILE in codec.traits.needs else None
    with path.open("wb") as sink:
        jobs.compress(source, sink, codec, profile=profile)
    return path, profile and source.with_name(profile.name)


def assert_exact(found: dict[str, torch.Tensor], source: Path) -> None:
    capture = Capture.open(source)
    assert list(found) == [name for name in capture.tensors if name != "tokens"]
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert (tensor.cpu().view(torch.int16).numpy().view(np.uint16) == capture.read(name)).all()


def test_a_capture_and_a_lossless_file_give_the_same_tensors(whole: Path) -> None:
    assert_exact(kvpack.open(whole).to_tensors(), whole)
    assert_exact(kvpack.open(str(packed(whole, "lossless")[0])).to_tensors(), whole)


def test_a_cache_has_the_layers_in_order(whole: Path) -> None:
    opened = kvpack.open(packed(whole, "lossless")[0])
    cache, tensors = opened.to_cache(), opened.to_tensors()
    assert cache.get_seq_length() == 160
    for i in (0, 1):
        assert torch.equal(cache.layers[i].keys[0], tensors[f"layers.{i}.keys"])
        assert torch.equal(cache.layers[i].values[0], tensors[f"layers.{i}.values"])


def test_a_cache_wants_every_layer() -> None:
    with pytest.raises(FormatError, match="all layers from 0 on"):
        kvpack.open(SMALL).to_cache()


def test_what_needs_a_profile_says_so(whole: Path) -> None:
    path, profile = packed(whole, "fisher-8")
    assert profile is not None
    with pytest.raises(MismatchError, match="needs the profile"):
        kvpack.open(path).to_tensors()
    assert len(kvpack.open(path, profile).to_tensors()) == 4


def test_a_device_that_is_not_there(whole: Path) -> None:
    with pytest.raises(UsageError, match="no GPU for 'cuda:99'"):
        kvpack.open(whole).to_tensors("cuda:99")
    with pytest.raises(UsageError, match="not 'tpu'"):
        kvpack.open(whole).to_tensors("tpu")


@pytest.mark.parametrize("name", ["lossless", "kivi-4", "turboquant-3", "fisher-8", "zstd", "cachegen-4"])
def test_tensors_on_a_gpu_are_those_of_the_cpu(gpu: Any, whole: Path, name: str) -> None:
    """Exact where the codec is; else within what TurboQuant's and ``fisher``'s products may differ by."""
    path, profile = packed(whole, name)
    opened: Opened = kvpack.open(path, profile)
    there = opened.tensors_on(gpu)
    assert all(str(tensor.device).startswith(gpu.device) for tensor in there.values())
    if CODECS[name].lossless:
        assert_exact(there, whole)
    given = Capture.open(whole)
    for key, tensor in opened.to_tensors().items():
        values = (tensor.float().numpy(), to_float32(given.read(key), "BF16"))
        assert nmse(*(a[:, 1:] for a in values)) < 0.3  # The profile of these tests knows nothing of the first token.
        error = (there[key].cpu().float() - tensor.float()).abs().max()
        exact = name not in ("turboquant-3", "fisher-8")
        assert error <= (0 if exact else 0.01 * tensor.float().abs().max())


def test_a_capture_on_a_gpu(gpu: Any, whole: Path) -> None:
    assert_exact(kvpack.open(whole).tensors_on(gpu), whole)

"""``fisher``'s files from a GPU and from the CPU: each reads the other's, within bf16's rounding; damage is found."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import engine_on
from profiles import profile_for

from kvpack import jobs
from kvpack.codecs.recipes import CODECS
from kvpack.errors import CorruptError, MismatchError
from kvpack.formats.captures import layer_of
from kvpack.formats.safetensors import TensorFile, build_header
from kvpack.formats.source import Capture
from kvpack.jobs.opened import Opened
from kvpack.jobs.reader import KvpFile
from kvpack.kvp import Container
from kvpack.numerics.floats import to_float32
from kvpack.profiles import Profile

SMALL = Path(__file__).parents[2] / "fixtures" / "smollm2-160.safetensors"
CODEC = CODECS["fisher-8"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The small capture, and as much again."""
    given = Capture.open(SMALL)
    tensors = {name: given.read(name) for name in given.tensors if name == "tokens" or layer_of(given.tensors[name])}
    tensors |= {name: given.read(name) for name, spec in given.tensors.items() if layer_of(spec) is not None}
    twice = {
        n: np.concatenate([a, a[..., ::-1, :] if a.ndim > 1 else a], axis=1 if a.ndim > 1 else 0)
        for n, a in tensors.items()
    }
    header = build_header([(n, given.tensors[n].dtype, a.shape) for n, a in twice.items()], given.metadata)
    path = tmp_path / "twice.safetensors"
    data = b"".join(np.ascontiguousarray(a).tobytes() for a in twice.values())
    path.write_bytes(len(header.raw).to_bytes(8, "little") + header.raw + data)
    return path


@pytest.fixture
def profile(source: Path) -> Profile:
    found = profile_for(source, CODEC)
    assert found is not None
    return found


def compress(source: Path, profile: Profile, gpu: Any, chunk: int = 128) -> tuple[bytes, jobs.Compressed]:
    sink = io.BytesIO()
    done = jobs.compress(source, sink, CODEC, profile=profile, chunk_tokens=chunk, engine=engine_on(gpu))
    return sink.getvalue(), done


def opened(data: bytes, profile: Profile | None) -> KvpFile:
    return KvpFile(Container(memoryview(data)), profile)


def decompress(data: bytes, profile: Profile, gpu: Any) -> dict[str, np.ndarray]:
    archive = opened(data, profile)
    sink = io.BytesIO()
    jobs.decompress(archive, sink, engine=engine_on(gpu))
    whole = archive.container.source
    raw = memoryview(sink.getvalue())[whole.data_start :]
    return {
        spec.name: np.frombuffer(raw[spec.start : spec.stop], f"<u{spec.itemsize}").reshape(spec.shape)
        for spec in whole.tensors
    }


def assert_close(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Within bf16's rounding, and a thousandth of a token's largest value: the profile's basis mixes all of them."""
    layers = [name for name in theirs if name.startswith("layers.")]
    assert all((mine[name] == theirs[name]).all() for name in set(theirs) - set(layers))
    a, b = (np.nan_to_num(np.stack([to_float32(every[name], "BF16") for name in layers])) for every in (mine, theirs))
    assert b.any()
    scale = np.abs(b).max(axis=(0, 1, 3), keepdims=True)
    assert (np.abs(a - b) <= np.abs(b) * 2.0**-7 + scale * 2.0**-10).all()


@pytest.mark.parametrize("chunk", [128, 2048])
def test_each_reads_the_others(gpu: Any, source: Path, profile: Profile, chunk: int) -> None:
    (cpu, _), (mine, done) = compress(source, profile, None, chunk), compress(source, profile, gpu, chunk)
    assert not done.carried
    assert abs(len(mine) - len(cpu)) < len(cpu) // 1000 + 16
    original = {n: Capture.open(source).read(n) for n in opened(cpu, None).tensors}
    archives = opened(cpu, profile), opened(mine, profile)
    assert [p.digest for p in archives[0].container.parts] == [p.digest for p in archives[1].container.parts]
    for file in (cpu, mine):
        by_cpu, by_gpu = decompress(file, profile, None), decompress(file, profile, gpu)
        assert_close(by_gpu, by_cpu)
        for name, bits in original.items():
            if name.startswith("layers."):
                a, b = to_float32(by_gpu[name], "BF16")[:, 1:], to_float32(bits, "BF16")[:, 1:]
                assert np.abs(a - b).max() < 0.1


def test_tensors_on_the_device(gpu: Any, source: Path, profile: Profile) -> None:
    archive = opened(compress(source, profile, None)[0], profile)
    names = [name for name in archive.tensors if name.startswith("layers.")]
    found = Opened(archive).tensors_on(gpu)
    assert all(str(data.device).startswith(gpu.device) for data in found.values())
    bits = {n: data.cpu().view(torch.int16).numpy().view(np.uint16) for n, data in found.items()}
    assert_close(bits, {name: archive.read(name) for name in names})


def test_what_is_not_finite_is_carried_as_by_the_cpu(gpu: Any, source: Path, profile: Profile) -> None:
    """A chunk with it, losslessly; the others as ever."""
    data = bytearray(source.read_bytes())
    spec = TensorFile.open(source).tensors["layers.0.values"]
    at = TensorFile.open(source).header.data_start + spec.start + 2 * 64 * 200
    data[at : at + 2] = b"\x80\x7f"
    source.write_bytes(bytes(data))
    (cpu, by_cpu), (mine, by_gpu) = compress(source, profile, None), compress(source, profile, gpu)
    assert by_gpu.carried == by_cpu.carried
    assert len(by_gpu.carried) == 4
    assert_close(decompress(mine, profile, gpu), decompress(cpu, profile, None))


@pytest.mark.parametrize("where", [0, 60, 3000])
def test_damage_is_found(gpu: Any, source: Path, profile: Profile, where: int) -> None:
    good = compress(source, profile, None)[0]
    changed = bytearray(good)
    changed[Container(memoryview(good)).header_size + where] ^= 1
    with pytest.raises(CorruptError):
        decompress(bytes(changed), profile, gpu)


def test_without_its_profile_it_is_refused(gpu: Any, source: Path, profile: Profile) -> None:
    archive = opened(compress(source, profile, None)[0], None)
    with pytest.raises(MismatchError, match="needs the profile"):
        jobs.decompress(archive, io.BytesIO(), engine=engine_on(gpu))

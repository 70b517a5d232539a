"""Files: the GPU's are the CPU's byte for byte, each reads the other's, damage is found."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import engine_on

from kvpack import jobs
from kvpack.codecs.recipes import CODECS
from kvpack.errors import CorruptError, UsageError
from kvpack.formats.safetensors import build_header
from kvpack.gpu.runtime.host import find_gpu
from kvpack.jobs.opened import Opened
from kvpack.jobs.reader import KvpFile
from kvpack.kvp import Container

SMALL = Path(__file__).parents[2] / "fixtures" / "smollm2-160.safetensors"


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> Path:
    header = build_header([(n, d, a.shape) for n, (d, a) in tensors.items()], {})
    data = b"".join(a.tobytes() for _, a in tensors.values())
    path.write_bytes(len(header.raw).to_bytes(8, "little") + header.raw + data)
    return path


def mixed(path: Path) -> Path:
    """bf16 the GPU takes, of two lengths, beside what it does not: another dtype, odd dimensions, noise, no tokens."""
    generator = np.random.default_rng(7)
    bf16 = (generator.standard_normal((2, 300, 64)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    tensors = {
        "layers.0.keys": ("BF16", bf16),
        "layers.0.values": ("BF16", bf16[:, ::-1].copy()),
        "layers.1.keys": ("BF16", bf16[:, :130].copy()),
        "layers.1.values": ("BF16", generator.integers(0, 1 << 16, (2, 130, 64)).astype(np.uint16)),
        "layers.2.keys": ("BF16", bf16[:, :, :33].copy()),
        "layers.2.values": ("F16", generator.standard_normal((2, 300, 64)).astype(np.float16).view(np.uint16)),
        "layers.3.keys": ("BF16", bf16[:, :0].copy()),
        "tokens": ("I32", np.arange(300, dtype=np.int32)),
    }
    return write(path, tensors)


def compress(source: Path, gpu: Any, codec: str = "lossless", chunk: int = 2048) -> bytes:
    sink = io.BytesIO()
    jobs.compress(source, sink, CODECS[codec], chunk_tokens=chunk, engine=engine_on(gpu))
    return sink.getvalue()


@pytest.mark.parametrize("chunk", [128, 2048])
@pytest.mark.parametrize("which", ["small", "mixed"])
def test_the_file_is_the_same_and_comes_back(gpu: Any, tmp_path: Path, which: str, chunk: int) -> None:
    source = SMALL if which == "small" else mixed(tmp_path / "mixed.safetensors")
    cpu, mine = compress(source, None, chunk=chunk), compress(source, gpu, chunk=chunk)
    assert mine == cpu
    for reader in (None, gpu):
        sink = io.BytesIO()
        jobs.decompress(KvpFile(Container(memoryview(cpu))), sink, engine=engine_on(reader))
        assert sink.getvalue() == source.read_bytes()


@pytest.mark.parametrize("codec", ["zstd", "cachegen-4", "turboquant-prod-3"])
def test_other_codecs_are_not_disturbed(gpu: Any, codec: str) -> None:
    assert compress(SMALL, gpu, codec) == compress(SMALL, None, codec)


def test_damage_is_found(gpu: Any, tmp_path: Path) -> None:
    good = compress(mixed(tmp_path / "mixed.safetensors"), None)
    start = Container(memoryview(good)).header_size
    for offset in (0, 40, 4000, 20000):
        changed = bytearray(good)
        changed[start + offset] ^= 1
        with pytest.raises(CorruptError):
            jobs.decompress(KvpFile(Container(memoryview(bytes(changed)))), io.BytesIO(), engine=engine_on(gpu))


def test_tensors_on_the_device(gpu: Any, tmp_path: Path) -> None:
    source = mixed(tmp_path / "mixed.safetensors")
    archive = KvpFile(Container(memoryview(compress(source, gpu))))
    for name, data in Opened(archive).tensors_on(gpu).items():
        assert str(data.device).startswith(gpu.device)
        assert (data.cpu().view(torch.int16).numpy().view(np.uint16) == archive.read(name)).all()


def test_devices_are_named() -> None:
    assert find_gpu("cpu", 1 << 40) == (None, None)
    assert find_gpu("auto", 1) == (None, None)
    with pytest.raises(UsageError, match="auto, cpu, cuda"):
        find_gpu("tpu", 1)
    if not torch.cuda.is_available():
        found, reason = find_gpu("cuda", 1)
        assert found is None
        assert reason is not None
        assert reason in ("no NVIDIA driver", "torch sees no GPU")

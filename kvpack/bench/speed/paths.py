"""The paths of files: from pinned memory to pinned memory, from file to file, from a file to the device."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpack.gpu.engine import GpuEngine
from kvpack import jobs
from kvpack.bench.speed.timing import Speed, speed
from kvpack.codecs.protocol import Codec
from kvpack.codecs.recipes import 
from kvpack.formats.safetensors import TensorFile
from kvpack.gpu import engine as device
from kvpack.gpu.engine.staging import Source
from kvpack.gpu.runtime.launch import Gpu
from kvpack.formats.source import Capture
from kvpack.jobs.reader import KvpFile
from kvpack.formats.captures import layer_of
from kvpack.kvp import Container
from kvpack.profiles import Profile

TOKENS = 2048
ROUNDS = 5


def pinned(path: Path) -> torch.Tensor:
    """A file's bytes in pinned memory."""
    host = torch.empty(path.stat().st_size, dtype=torch.uint8, pin_memory=True)
    with path.open("rb") as file:
        file.readinto(host.numpy().data)
    return host


def _walls(function: Callable[[], Any]) -> list[float]:
    """Wall clock of calls, the first left out, ascending."""
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])


def _drained(items: Iterator[Any]) -> None:
    for _ in items:
        pass


def rows(
    gpu: Gpu, source: Path, data: str, codec: Codec, profile: Profile | None = None, chunk: int = TOKENS
) -> Iterator[Speed]:
    """A codec along each path, over the capture ``source``, ``chunk`` tokens at a time; lossless pinned memory too."""
    name = "" if codec.lossless else f"{codec.name} "
    remark = f"wall clock, first of {ROUNDS + 1} runs left out"
    size = sum(spec.nbytes for spec in TensorFile.open(source).tensors.values())
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        packed, back = Path(folder) / "packed.kvp", Path(folder) / "back.safetensors"

        def compress() -> None:
            with packed.open("wb") as sink:
                jobs.compress(source, sink, codec, profile=profile, chunk_tokens=chunk, engine=GpuEngine(gpu))

        def decompress() -> None:
            with back.open("wb") as sink:
                jobs.decompress(KvpFile.open(packed, profile), sink, engine=GpuEngine(gpu))

        def load() -> None:
            archive = KvpFile.open(packed, profile)
            names = [name for name, spec in archive.tensors.items() if layer_of(spec) is not None]
            _drained(device.read(gpu, archive, names, fetch=False))

        yield speed(f"{name}file to file compress", data, size, _walls(compress), remark)
        yield speed(f"{name}file to file decompress", data, size, _walls(decompress), remark)
        yield speed(f"{name}file to device", data, size, _walls(load), remark)
        if codec.lossless:
            yield from _host_to_host(gpu, source, packed, data, size, remark)


def _host_to_host(gpu: Gpu, source: Path, packed: Path, data: str, size: int, remark: str) -> Iterator[Speed]:
    """From pinned memory to pinned memory, both ways at once over the link."""
    image = pinned(source)
    mapped = TensorFile.open(source)
    capture = Capture(TensorFile(source, mapped.header, memoryview(image.numpy().data)))
    plans = [plan for plan in plan_parts(mapped.header, TOKENS) if plan.layer is not None]
    encoder, parts = device.Encoder(gpu), list(device.parts_of(capture, plans, Source(image)))
    yield speed("host to host compress", data, size, _walls(lambda: _drained(encoder.encode(parts))), remark)
    file = pinned(packed)
    archive = KvpFile(Container(memoryview(file.numpy().data)))
    names = [name for name, spec in archive.tensors.items() if layer_of(spec) is not None]
    decoder = device.Decoder(gpu, archive, Source(file))
    for name, bits in decoder.read(names):
        if not np.array_equal(bits, capture.read(name)):
            raise RuntimeError(f"{data}: what comes back is not what went in")
    yield speed("host to host decompress", data, size, _walls(lambda: _drained(decoder.read(names))), remark)

"""The paths of files: from pinned memory to pinned memory, from file to file, from a file to the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpack import jobs
from kvpack.bench.speed.timing import Speed, speed
from kvpack.cache import windows
from kvpack.codecs.context import DecodeContext, Hints
from kvpack.codecs.protocol import Codec
from kvpack.engine import Done, EncodeTask, Engine, Task, Ticket
from kvpack.formats.safetensors import TensorFile
from kvpack.formats.source import Capture
from kvpack.formats.temporary import scratch
from kvpack.gpu.engine import GpuEngine
from kvpack.gpu.runtime.launch import Gpu
from kvpack.jobs.opened import Opened
from kvpack.jobs.reader import KvpFile, keys_and_values
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


def rows(
    gpu: Gpu, source: Path, data: str, codec: Codec, profile: Profile | None = None, chunk: int = TOKENS
) -> Iterator[Speed]:
    """A codec along each path, over the capture ``source``, ``chunk`` tokens at a time; lossless pinned memory too."""
    name = "" if codec.lossless else f"{codec.name} "
    remark = f"wall clock, first of {ROUNDS + 1} runs left out"
    size = sum(spec.nbytes for spec in TensorFile.open(source).tensors.values())
    engine = GpuEngine(gpu)
    with scratch() as (_, packed), scratch() as (_, back):

        def compress() -> None:
            with packed.open("wb") as sink:
                jobs.compress(source, sink, codec, profile=profile, chunk_tokens=chunk, engine=engine)

        def decompress() -> None:
            with back.open("wb") as sink:
                jobs.decompress(KvpFile.open(packed, profile), sink, engine=engine)

        def load() -> None:
            Opened(KvpFile.open(packed, profile)).tensors_by(engine, gpu.device)

        yield speed(f"{name}file to file compress", data, size, _walls(compress), remark)
        yield speed(f"{name}file to file decompress", data, size, _walls(decompress), remark)
        yield speed(f"{name}file to device", data, size, _walls(load), remark)
        if codec.lossless:
            yield from _host_to_host(gpu, source, packed, codec, data, size, remark)


def _drained(engine: Engine, tasks: list[Task], use: Callable[[Done], object] = id) -> None:
    for done in engine.run(iter(tasks)):
        if done.error is not None:
            raise done.error
        use(done)


def _host_to_host(
    gpu: Gpu, source: Path, packed: Path, codec: Codec, data: str, size: int, remark: str
) -> Iterator[Speed]:
    """From pinned memory to pinned memory, both ways at once over the link."""
    image, file = pinned(source), pinned(packed)
    mapped = TensorFile.open(source)
    capture = Capture(TensorFile(data, mapped.header, memoryview(image.numpy().data)))
    engine = GpuEngine(gpu, pinned=(image, file))
    coding: list[Task] = [
        EncodeTask(Ticket(0, w, i), capture.window(window.take(run)), ((0, codec),), DecodeContext(), Hints())
        for w, window in enumerate(windows(capture.spec, TOKENS))
        if window.layered
        for i, run in enumerate(codec.blocks(window))
    ]
    yield speed("host to host compress", data, size, _walls(lambda: _drained(engine, coding)), remark)
    archive = KvpFile(Container(memoryview(file.numpy().data)))
    decoding: list[Task] = list(archive.tasks(keys_and_values))
    parts = {task.ticket: task.block.parts[0] for task in archive.tasks(keys_and_values)}

    def same(done: Done) -> None:
        if not np.array_equal(done.arrays[0], capture.part(parts[done.ticket])):
            raise RuntimeError(f"{data}: what comes back is not what went in")

    _drained(engine, decoding, same)
    yield speed("host to host decompress", data, size, _walls(lambda: _drained(engine, decoding)), remark)

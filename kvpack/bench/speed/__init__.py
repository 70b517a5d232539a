"""``kvpack bench --speed``: measures GB/s of raw cache in every stage on a GPU, and the limits of the machine.

Device to device means from bf16 parts in device memory to streams in device memory and back; calls follow each other
without waits and are timed by events between them. Host to host means from and to pinned memory. File to file means
what ``kvpack compress`` and ``decompress`` do, on the disk of the temporary folder. Device copies count the bytes read
and written; everything else counts the bytes of the raw cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from kvpack.bench.speed import fisher, given, lossless, paths, rivals
from kvpack.bench.speed.made import CODEC, EIGHT_B
from kvpack.bench.speed.paths import TOKENS
from kvpack.bench.speed.timing import Speed, Timed, seconds, speed
from kvpack.codecs.recipes import CODECS
from kvpack.errors import UsageError
from kvpack.formats.captures import layer_of
from kvpack.formats.safetensors import build_header
from kvpack.formats.source import Capture
from kvpack.formats.temporary import scratch
from kvpack.gpu.kernels import lloyd_max as turboquant
from kvpack.jobs.reader import KvpFile, open_cache
from kvpack.profiles import Profile


def ceilings(device: str) -> Iterator[Speed]:
    """Yield the limits of the machine: copies within the device and over the host link, and a bf16 matrix product."""
    size = 1 << 30
    one = torch.empty(size, dtype=torch.uint8, device=device).random_()
    two, host = torch.empty_like(one), torch.empty(size // 4, dtype=torch.uint8, pin_memory=True)
    yield speed("device copy", "random", 2 * size, seconds(lambda: two.copy_(one)), "bytes read and written")
    part = one[: size // 4]
    yield speed("pinned to device", "random", size // 4, seconds(lambda: part.copy_(host, non_blocking=True)))
    yield speed("device to pinned", "random", size // 4, seconds(lambda: host.copy_(part, non_blocking=True)))
    yield from _both_ways(part, host)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = seconds(lambda: a @ b)
    yield speed(
        "bf16 matmul 8192", "random", 3 * 2 * 8192**2, times, f"{2 * 8192**3 / median(times) / 1e12:.0f} TFLOP/s"
    )


def _both_ways(device: torch.Tensor, host: torch.Tensor) -> Iterator[Speed]:
    """Yield the speed of the host link with copies in both directions at once; bytes of one direction are counted."""
    cuda: Any = torch.cuda
    back, there = torch.empty_like(host, pin_memory=True), torch.empty_like(device)
    side = cuda.Stream(device.device)

    def both() -> None:
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            back.copy_(device, non_blocking=True)
        there.copy_(host, non_blocking=True)
        cuda.current_stream().wait_stream(side)

    yield speed("both ways at once", "random", host.numel(), seconds(both), "bytes one way")


def tiled(captures: list[Path], size: int, path: Path) -> np.ndarray:
    """Write a file of at least ``size`` bytes that repeats the captures' bf16 keys and values ``[N, H, T, D]``."""
    arrays = []
    for source in captures:
        cache = KvpFile.open(source) if source.suffix == ".kvp" else Capture.open(source)
        names = [n for n, s in cache.tensors.items() if layer_of(s) is not None and s.dtype == "BF16"]
        arrays += [np.ascontiguousarray(cache.read(name)[:, :TOKENS]) for name in names]
    if not arrays or len({a.shape for a in arrays}) > 1:
        raise UsageError("--speed wants captures with bf16 keys and values of one shape")
    repeats = -(-size // sum(a.nbytes for a in arrays))
    kinds = ("keys", "values")
    count = len(arrays) * repeats // 2
    entries = [(f"layers.{i // 2}.{kinds[i % 2]}", "BF16", arrays[0].shape) for i in range(2 * count)]
    header = build_header(entries, {})
    with path.open("wb") as sink:
        sink.write(len(header.raw).to_bytes(8, "little") + header.raw)
        for i in range(2 * count):
            sink.write(arrays[i % len(arrays)].tobytes())
    return np.stack(arrays)


def wide(arrays: np.ndarray) -> np.ndarray:
    """Rearrange real channels of keys and of values into the shape of an 8B model's layers, ``[64, 8, T, 128]``."""
    kinds = [arrays[kind::2].reshape(-1, *arrays.shape[2:]) for kind in (0, 1)]
    layers = []
    for layer in range(64):
        heads = kinds[layer % 2]
        pick = [heads[(16 * (layer // 2) + i) % len(heads)] for i in range(16)]
        layers.append(np.stack([np.concatenate(pick[i : i + 2], axis=1) for i in range(0, 16, 2)]))
    return np.stack(layers)


def measure(captures: list[Path], gib: float, profile: Profile | None = None) -> Iterator[Speed]:
    """Yield every line, measured on the first GPU with ``gib`` GiB of cache or slightly more.

    ``fisher`` is measured on captures only with their model's profile.
    """
    if not torch.cuda.is_available():
        raise UsageError("--speed measures a GPU, and torch sees none")
    gpu, size = Timed(), int(gib * (1 << 30))
    yield from ceilings(gpu.device)
    with scratch() as (_, path):
        arrays = tiled(captures, size, path)
        for name in ("lossless", "kivi-4", "turboquant-3"):
            yield from paths.rows(gpu, path, "capture", CODECS[name])
    for data, parts in (("capture", arrays), ("8B shape", wide(arrays))):
        if parts.shape[-1] % 64:
            continue
        bits = torch.from_numpy(parts.view(np.int16)).to(gpu.device)
        bits = bits.repeat(-(-size // (2 * bits.numel())), 1, 1, 1).contiguous()
        label = f"{data} {list(bits.shape)}"
        yield from lossless.rows(gpu, bits, label)
        yield from rivals.nvcomp(bits, label)
        yield from rivals.kivi(gpu, bits, label)
        if turboquant.supports(parts.shape[-1]):
            yield from rivals.turboquant_3(gpu, bits, label)
        del bits
        torch.cuda.empty_cache()
    if profile is not None:
        one = given.real(gpu, open_cache(captures[0]), profile, size)
        yield from fisher.rows(gpu, one)
        with scratch() as (_, path):
            one.write(path)
            yield from paths.rows(gpu, path, one.name, CODEC, profile, one.chunk)
        del one
        torch.cuda.empty_cache()
    yield from fisher.rows(gpu, given.made(gpu, EIGHT_B, size))


def to_json(lines: list[Speed]) -> dict[str, Any]:
    """Return the lines with the device's name and the versions of the programs."""
    from kvpack import __version__

    return {
        "schema_version": 1,
        "kvpack": __version__,
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "lines": [asdict(line) for line in lines],
    }

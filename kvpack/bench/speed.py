"""``kvpack bench --speed``: GB/s of raw cache through every stage on a GPU, beside what the machine can do.

Device to device: bf16 parts in device memory to streams in device memory and back, timed by events around calls that
follow each other without a wait. Host to host: from and to pinned memory. File to file: as ``kvpack compress`` and
``decompress`` do it, on whatever disk the temporary folder is. Copies count bytes read and written, all else raw cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from kvpack import api
from kvpack.archive import Archive, Capture
from kvpack.codecs import CODECS
from kvpack.container import layer_of, plan_parts
from kvpack import device
from kvpack.device import Encoder
from kvpack.errors import UsageError
from kvpack.stages.device.launch import Gpu
from kvpack.stages.entropy.rans import cuda
from kvpack.stages.quantizers.lloyd_max import cuda as turboquant
from kvpack.tensorfile import TensorFile, build_header

ROUNDS = 20
TOKENS = 2048


@dataclass(frozen=True)
class Speed:
    """One line: what, of which data, GB/s at the median and at the 10th and 90th percentile of times, and a remark."""

    what: str
    data: str
    gb_per_s: float
    slow: float
    fast: float
    remark: str = ""


def _event() -> Any:
    cuda: Any = torch.cuda
    return cuda.Event(enable_timing=True)


class _Timed(Gpu):
    """A GPU that notes how long each kernel takes, while asked to."""

    log: list[tuple[str, Any, Any]] | None = None

    def launch(self, name: str, *rest: Any) -> None:
        """Launch, between two events."""
        if self.log is None:
            super().launch(name, *rest)
            return
        start, stop = _event(), _event()
        start.record()
        super().launch(name, *rest)
        stop.record()
        self.log.append((name.rsplit(":", 1)[1], start, stop))


def _seconds(function: Callable[[], object]) -> list[float]:
    """Times of calls that follow each other, by device events, ascending."""
    for _ in range(2):
        function()
    events = [_event() for _ in range(ROUNDS + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) / 1e3 for a, b in pairwise(events))


def _speed(what: str, data: str, size: int, times: list[float], remark: str = "") -> Speed:
    tenth = len(times) // 10
    middle, slow, fast = median(times), times[-1 - tenth], times[tenth]
    return Speed(what, data, size / middle / 1e9, size / slow / 1e9, size / fast / 1e9, remark)


def ceilings(device: str) -> Iterator[Speed]:
    """What the machine can do: copies within the device and over the link, and a bf16 matrix product."""
    size = 1 << 30
    one = torch.empty(size, dtype=torch.uint8, device=device).random_()
    two, host = torch.empty_like(one), torch.empty(size // 4, dtype=torch.uint8, pin_memory=True)
    yield _speed("device copy", "random", 2 * size, _seconds(lambda: two.copy_(one)), "bytes read and written")
    part = one[: size // 4]
    yield _speed("pinned to device", "random", size // 4, _seconds(lambda: part.copy_(host, non_blocking=True)))
    yield _speed("device to pinned", "random", size // 4, _seconds(lambda: host.copy_(part, non_blocking=True)))
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = _seconds(lambda: a @ b)
    yield _speed(
        "bf16 matmul 8192", "random", 3 * 2 * 8192**2, times, f"{2 * 8192**3 / median(times) / 1e12:.0f} TFLOP/s"
    )


def _parts(tensors: torch.Tensor) -> cuda.Parts:
    """Parts ``[P, H, T, D]`` of bf16 bit patterns as the kernels take them."""
    count, *shape = tensors.shape
    addresses = torch.arange(count, device=tensors.device) * tensors[0].numel() * 2 + tensors.data_ptr()
    heads, tokens, dims = shape
    return cuda.Parts(addresses, (heads, tokens, dims), tokens * dims, item=2, shift=7, width=9, floats=True)


def lossless(gpu: _Timed, tensors: torch.Tensor, data: str) -> Iterator[Speed]:
    """The lossless codec from device to device, whole and kernel by kernel; what comes back is compared."""
    parts, size = _parts(tensors), 2 * tensors.numel()
    coded = cuda.encode(gpu, parts)
    assert coded.mantissas is not None
    assert coded.digests is not None
    out = torch.full_like(tensors, -1)
    packed = torch.arange(parts.count, device=gpu.device) * coded.mantissas.shape[1] + coded.mantissas.data_ptr() + 16
    streams, length = coded.places[:-1] + coded.arena.data_ptr(), 1 + cuda.mantissa_size(parts)
    ranges = torch.cat([streams, packed - 1]), torch.cat([coded.sizes, torch.full_like(coded.sizes, length)])
    heads = [coded.arena[place : place + 16].tolist() for place in coded.places[:-1:16].tolist()]
    target, shared = _parts(out), cuda.shared_for(heads)

    def back() -> Any:
        return cuda.decode(gpu, streams, coded.sizes, target, packed, shared, ranges)

    meta, digests, _ = back()
    exact = torch.equal(out, tensors) and not meta[:, cuda.FAULT].any() and torch.equal(digests, coded.digests)
    if not exact:
        raise RuntimeError(f"{data}: what comes back is not what went in")
    ratio = size / (int(coded.sizes.sum()) + parts.count * length)
    yield _speed("lossless compress", data, size, _seconds(lambda: cuda.encode(gpu, parts)), f"ratio {ratio:.3f}")
    yield _speed("lossless decompress", data, size, _seconds(back))
    for way, function in (("compress", lambda: cuda.encode(gpu, parts)), ("decompress", back)):
        for kernel, times in _by_kernel(gpu, function).items():
            yield _speed(f"  {way}: {kernel}", data, size, times, f"{median(times) * 1e6:.0f} us")
    symbols = (tensors >> 7 & 255).to(torch.uint8)
    yield from _symbols(gpu, symbols, data)


def _by_kernel(gpu: _Timed, function: Callable[[], object]) -> dict[str, list[float]]:
    """Times of each kernel within a call, ascending."""
    gpu.log = []
    for _ in range(ROUNDS // 2):
        function()
    torch.cuda.synchronize()
    log, gpu.log = gpu.log, None
    names = list(dict.fromkeys(name for name, _, _ in log))
    calls = ROUNDS // 2
    times = {}
    for name in names:
        each = [a.elapsed_time(b) / 1e3 for n, a, b in log if n == name]
        launches = len(each) // calls
        times[name] = sorted(sum(each[i * launches : (i + 1) * launches]) for i in range(calls))
    return times


def _symbols(gpu: _Timed, symbols: torch.Tensor, data: str) -> Iterator[Speed]:
    """RANS alone on 8-bit symbols (exponents), into and out of the file's layout, tables known."""
    count, heads, tokens, dims = symbols.shape
    addresses = torch.arange(count, device=gpu.device) * symbols[0].numel()
    parts = cuda.Parts(addresses + symbols.data_ptr(), (heads, tokens, dims), tokens * dims)
    coded, out = cuda.encode(gpu, parts), torch.full_like(symbols, 0xA5)
    target = cuda.Parts(addresses + out.data_ptr(), parts.shape, parts.head_stride)
    starts = coded.places[:-1] + coded.arena.data_ptr()
    shared = cuda.shared_for([coded.arena[place : place + 16].tolist() for place in coded.places[:-1:16].tolist()])
    encode = _by_kernel(gpu, lambda: cuda.encode(gpu, parts))
    decode = _by_kernel(gpu, lambda: cuda.decode(gpu, starts, coded.sizes, target, None, shared))
    if not torch.equal(out, symbols):
        raise RuntimeError(f"{data}: what comes back is not what went in")
    size = symbols.numel()
    remark = f"ratio {size / int(coded.sizes.sum()):.3f}"
    yield _speed("rans encode: lanes", data, size, encode["encode"], remark)
    whole = [sum(times) for times in zip(*(encode[name] for name in ("encode", "layout", "emit")), strict=True)]
    yield _speed("rans encode: into the stream", data, size, whole, remark)
    yield _speed("rans decode: lanes", data, size, decode["decode"], remark)
    whole = [sum(times) for times in zip(decode["prepare"], decode["decode"], strict=True)]
    yield _speed("rans decode: with tables", data, size, whole, remark)


def turboquant_3(gpu: Gpu, tensors: torch.Tensor, data: str) -> Iterator[Speed]:
    """TurboQuant's rotation and packed 3-bit codes, and back."""
    vectors = torch.nan_to_num(tensors.view(torch.bfloat16), 0, 0, 0).reshape(-1, tensors.shape[-1])
    codes, norms = turboquant.compress(gpu, vectors, seed=1)
    size = 2 * vectors.numel()
    yield _speed("turboquant-3 compress", data, size, _seconds(lambda: turboquant.compress(gpu, vectors, seed=1)))
    yield _speed("turboquant-3 decompress", data, size, _seconds(lambda: turboquant.decompress(gpu, codes, norms, 1)))


def paths(gpu: Gpu, source: Path, data: str) -> Iterator[Speed]:
    """Through pinned memory and back, and from file to file."""
    capture = Capture(TensorFile.open(source))
    size = sum(spec.nbytes for spec in capture.tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        packed, back = Path(folder) / "packed.kvp", Path(folder) / "back.safetensors"
        times: dict[str, list[float]] = {
            "file to file compress": [],
            "file to file decompress": [],
            "file to device": [],
        }
        for _ in range(4):
            start = time.perf_counter()
            with packed.open("wb") as sink:
                api.compress(source, sink, CODECS["lossless"], gpu=gpu)
            times["file to file compress"].append(time.perf_counter() - start)
            archive = Archive.open(packed)
            start = time.perf_counter()
            with back.open("wb") as sink:
                api.decompress(archive, sink, gpu=gpu)
            times["file to file decompress"].append(time.perf_counter() - start)
            start = time.perf_counter()
            for _name, _tensor in device.read(gpu, archive, list(archive.tensors), fetch=False):
                pass
            torch.cuda.synchronize()
            times["file to device"].append(time.perf_counter() - start)
    for what, seconds in times.items():
        yield _speed(what, data, size, sorted(seconds[1:]), "wall clock, first of 4 runs left out")
    encoder = Encoder(gpu, capture)
    plans = [plan for plan in plan_parts(capture.file.header, TOKENS) if plan.layer is not None]
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        for _part in encoder.encode(plans):
            pass
        seconds.append(time.perf_counter() - start)
    yield _speed("host to host compress", data, size, sorted(seconds[1:]), "staging into pinned memory included")


def tiled(captures: list[Path], size: int, folder: Path) -> tuple[Path, np.ndarray]:
    """A file of at least ``size`` bytes that repeats the captures' bf16 keys and values; those ``[N, H, T, D]``."""
    arrays = []
    for path in captures:
        cache = Archive.open(path) if path.suffix == ".kvp" else Capture(TensorFile.open(path))
        names = [n for n, s in cache.tensors.items() if layer_of(s) is not None and s.dtype == "BF16"]
        arrays += [np.ascontiguousarray(cache.read(name)[:, :TOKENS]) for name in names]
    if not arrays or len({a.shape for a in arrays}) > 1:
        raise UsageError("--speed wants captures with bf16 keys and values of one shape")
    repeats = -(-size // sum(a.nbytes for a in arrays))
    kinds = ("keys", "values")
    count = len(arrays) * repeats // 2
    entries = [(f"layers.{i // 2}.{kinds[i % 2]}", "BF16", arrays[0].shape) for i in range(2 * count)]
    header, path = build_header(entries, {}), folder / "tiled.safetensors"
    with path.open("wb") as sink:
        sink.write(len(header.raw).to_bytes(8, "little") + header.raw)
        for i in range(2 * count):
            sink.write(arrays[i % len(arrays)].tobytes())
    return path, np.stack(arrays)


def wide(arrays: np.ndarray) -> np.ndarray:
    """The shape of an 8B model's layers, ``[64, 8, T, 128]``, of real channels of keys and of values."""
    kinds = [arrays[kind::2].reshape(-1, *arrays.shape[2:]) for kind in (0, 1)]
    layers = []
    for layer in range(64):
        heads = kinds[layer % 2]
        pick = [heads[(16 * (layer // 2) + i) % len(heads)] for i in range(16)]
        layers.append(np.stack([np.concatenate(pick[i : i + 2], axis=1) for i in range(0, 16, 2)]))
    return np.stack(layers)


def measure(captures: list[Path], gib: float) -> Iterator[Speed]:
    """Every line, on the first GPU, over data of ``gib`` GiB or a little more."""
    if not torch.cuda.is_available():
        raise UsageError("--speed measures a GPU, and torch sees none")
    gpu, size = _Timed(), int(gib * (1 << 30))
    yield from ceilings(gpu.device)
    with tempfile.TemporaryDirectory() as folder:
        path, arrays = tiled(captures, size, Path(folder))
        yield from paths(gpu, path, "capture")
    for data, parts in (("capture", arrays), ("8B shape", wide(arrays))):
        if parts.shape[-1] % 64:
            continue
        bits = torch.from_numpy(parts.view(np.int16)).to(gpu.device)
        bits = bits.repeat(-(-size // (2 * bits.numel())), 1, 1, 1).contiguous()
        label = f"{data} {list(bits.shape)}"
        yield from lossless(gpu, bits, label)
        yield from nvcomp(bits, label)
        if turboquant.supports(parts.shape[-1]):
            yield from turboquant_3(gpu, bits, label)
        del bits
        torch.cuda.empty_cache()


def nvcomp(tensors: torch.Tensor, data: str) -> Iterator[Speed]:
    """NVIDIA's ANS on the same bytes, where its package is installed (``pip install kvpack[nvcomp]``)."""
    try:
        from nvidia import nvcomp as library
    except ImportError:
        return
    size = 2 * tensors.numel()
    torch.cuda.empty_cache()
    for mode in ("<f2", "|u1"):
        codec = library.Codec(algorithm="ANS", data_type=mode)
        array = library.as_array(tensors.reshape(-1).view(torch.uint8))
        packed = codec.encode(array)
        remark = f"ratio {size / packed.buffer_size:.3f}, wall clock"
        yield _speed(f"nvCOMP ANS {mode} compress", data, size, _waited(codec.encode, array), remark)
        yield _speed(f"nvCOMP ANS {mode} decompress", data, size, _waited(codec.decode, packed), "wall clock")


def _waited(function: Callable[[Any], Any], argument: Any) -> list[float]:
    """Times of calls that are waited for, ascending: for code that works on a stream of its own."""
    times = []
    for _ in range(2 + ROUNDS // 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = function(argument)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        del result
    return sorted(times[2:])


def to_json(lines: list[Speed]) -> dict[str, Any]:
    """The lines with the machine's and the programs' names."""
    import kvpack

    return {
        "schema_version": 1,
        "kvpack": kvpack.__version__,
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "lines": [asdict(line) for line in lines],
    }

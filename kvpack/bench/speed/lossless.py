"""Measures the lossless codec and its entropy coder from device to device."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from kvpack.bench.speed.timing import Speed, Timed, by_kernel, seconds, speed
from kvpack.gpu.kernels import rans as cuda


def _parts(tensors: torch.Tensor) -> cuda.Parts:
    """Describe ``tensors`` ``[P, H, T, D]`` of bf16 bit patterns as parts for the kernels."""
    count, *shape = tensors.shape
    addresses = torch.arange(count, device=tensors.device) * tensors[0].numel() * 2 + tensors.data_ptr()
    heads, tokens, dims = shape
    return cuda.Parts(addresses, (heads, tokens, dims), tokens * dims, item=2, shift=7, width=9, floats=True)


def rows(gpu: Timed, tensors: torch.Tensor, data: str) -> Iterator[Speed]:
    """Yield the speeds of the lossless codec in total and for each kernel, after checking that it restores the data."""
    parts, size = _parts(tensors), 2 * tensors.numel()
    coded = cuda.encode(gpu, parts)
    assert coded.mantissas is not None
    assert coded.digests is not None
    out = torch.full_like(tensors, -1)
    packed = torch.arange(parts.count, device=gpu.device) * coded.mantissas.shape[1] + coded.mantissas.data_ptr() + 16
    streams, length = coded.places[:-1] + coded.arena.data_ptr(), 1 + cuda.mantissa_size(parts)
    ranges = torch.cat([streams, packed - 1]), torch.cat([coded.sizes, torch.full_like(coded.sizes, length)])
    target, shared = _parts(out), cuda.shared_for(int(coded.meta[:, cuda.TABLES].max()))

    def back() -> Any:
        return cuda.decode(gpu, streams, coded.sizes, target, packed, shared, ranges)

    meta, digests, _ = back()
    exact = torch.equal(out, tensors) and not meta[:, cuda.FAULT].any() and torch.equal(digests, coded.digests)
    if not exact:
        raise RuntimeError(f"{data}: what comes back is not what went in")
    ratio = size / (int(coded.sizes.sum()) + parts.count * length)
    yield speed("lossless compress", data, size, seconds(lambda: cuda.encode(gpu, parts)), f"ratio {ratio:.3f}")
    yield speed("lossless decompress", data, size, seconds(back))
    for way, function in (("compress", lambda: cuda.encode(gpu, parts)), ("decompress", back)):
        for kernel, times in by_kernel(gpu, function).items():
            yield speed(f"  {way}: {kernel}", data, size, times, f"{median(times) * 1e6:.0f} us")
    symbols = (tensors >> 7 & 255).to(torch.uint8)
    yield from _symbols(gpu, symbols, data)


def _symbols(gpu: Timed, symbols: torch.Tensor, data: str) -> Iterator[Speed]:
    """Yield the speeds of rANS alone on 8-bit symbols (exponents), to and from the file's layout, with known tables."""
    count, heads, tokens, dims = symbols.shape
    addresses = torch.arange(count, device=gpu.device) * symbols[0].numel()
    parts = cuda.Parts(addresses + symbols.data_ptr(), (heads, tokens, dims), tokens * dims)
    coded, out = cuda.encode(gpu, parts), torch.full_like(symbols, 0xA5)
    target = cuda.Parts(addresses + out.data_ptr(), parts.shape, parts.head_stride)
    starts = coded.places[:-1] + coded.arena.data_ptr()
    shared = cuda.shared_for(int(coded.meta[:, cuda.TABLES].max()))
    encode = by_kernel(gpu, lambda: cuda.encode(gpu, parts))
    decode = by_kernel(gpu, lambda: cuda.decode(gpu, starts, coded.sizes, target, None, shared))
    if not torch.equal(out, symbols):
        raise RuntimeError(f"{data}: what comes back is not what went in")
    size = symbols.numel()
    remark = f"ratio {size / int(coded.sizes.sum()):.3f}"
    yield speed("rans encode: lanes", data, size, encode["encode"], remark)
    whole = [sum(times) for times in zip(*(encode[name] for name in ("encode", "layout", "emit")), strict=True)]
    yield speed("rans encode: into the stream", data, size, whole, remark)
    yield speed("rans decode: lanes", data, size, decode["decode"], remark)
    whole = [sum(times) for times in zip(decode["prepare"], decode["decode"], strict=True)]
    yield speed("rans decode: with tables", data, size, whole, remark)

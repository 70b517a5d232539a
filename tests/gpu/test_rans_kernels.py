"""The GPU's rANS against the CPU's: the same bytes, each decodes the other's.

Runs on a GPU where there is one, else on the CPU through ``simt.py`` (g++), which checks the kernels' logic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvpack.codecs.chain.base import Part, PlaneSpec
from kvpack.codecs.chain.entropy.bitpack import pack
from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.codecs.chain.quantizers.float_split import FloatSplit
from kvpack.gpu.kernels import rans as cuda
from kvpack.numerics.checksum import checksum


def on_device(gpu: Any, arrays: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Arrays one behind another in device memory, and their addresses."""
    flat = np.concatenate([a.reshape(-1) for a in arrays]).view(np.uint8)
    memory = torch.from_numpy(flat.copy()).to(gpu.device)
    sizes = np.cumsum([0, *(a.nbytes for a in arrays[:-1])])
    return memory, torch.from_numpy(sizes + memory.data_ptr()).to(gpu.device)


def host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def streams_of(coded: cuda.Streams) -> list[bytes]:
    arena, places, sizes = host(coded.arena), host(coded.places), host(coded.sizes)
    return [arena[a : a + n].tobytes() for a, n in zip(places, sizes, strict=False)]


def codes_like(kind: str, shape: tuple[int, int, int], width: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if kind == "equal":
        return np.full(shape, (1 << width) - 1)
    if kind == "uniform":
        return generator.integers(0, 1 << width, shape)
    centre = generator.uniform(0.2, 0.8, (shape[0], 1, shape[2])) * (1 << width)
    spread = generator.uniform(0.3, 3, (shape[0], 1, shape[2]))
    return np.clip(np.round(centre + spread * generator.standard_normal(shape)), 0, (1 << width) - 1)


CODE_SHAPES = [(1, 1, 2), (2, 63, 34), (3, 1000, 64), (9, 5, 66), (3, 300, 1), (70, 9, 3)]


@pytest.mark.parametrize("kind", ["peaked", "equal", "uniform"])
@pytest.mark.parametrize("width", [1, pytest.param(3, marks=pytest.mark.long), 8])
@pytest.mark.parametrize("shape", CODE_SHAPES, ids=str)
def test_codes_have_the_same_streams(gpu: Any, shape: tuple[int, int, int], width: int, kind: str) -> None:
    planes = [codes_like(kind, shape, width, seed).astype(np.uint8) for seed in range(3)]
    spec = PlaneSpec("codes", shape, width)
    expected = [Rans().encode(plane, spec) for plane in planes]
    memory, addresses = on_device(gpu, planes)
    parts = cuda.Parts(addresses, shape, shape[1] * shape[2], width=width)
    coded = cuda.encode(gpu, parts)
    assert streams_of(coded) == expected
    assert [int(c) % (1 << 64) for c in host(coded.checksums)] == [checksum(stream) for stream in expected]
    del memory
    assert_decodes(gpu, expected, planes, parts)


def assert_decodes(gpu: Any, streams: list[bytes], planes: list[np.ndarray], parts: cuda.Parts) -> None:
    """The GPU decodes the CPU's streams, writes every code and nothing else."""
    item, slack = planes[0].itemsize, 64
    out = torch.full((len(planes), planes[0].nbytes + slack), 0xA5, dtype=torch.uint8, device=gpu.device)
    targets = torch.arange(len(planes), device=gpu.device) * out.shape[1] + out.data_ptr()
    padded = [np.frombuffer(s + bytes(-len(s) % 16), np.uint8) for s in streams]
    arena, places = on_device(gpu, [*padded, np.zeros(2 * planes[0].size + 4096, np.uint8)])
    sizes = torch.tensor([len(s) for s in streams], device=gpu.device)
    target = cuda.Parts(targets, parts.shape, parts.head_stride, item, parts.shift, parts.width, parts.floats)
    meta, _, _ = cuda.decode(gpu, places[: len(planes)], sizes, target)
    del arena
    assert not host(meta)[:, cuda.FAULT].any()
    for i, plane in enumerate(planes):
        if host(meta)[i, cuda.MODE]:
            assert (host(out)[i, : plane.nbytes].view(plane.dtype).reshape(plane.shape) == plane).all()
            assert (host(out)[i, plane.nbytes :] == 0xA5).all()


@pytest.mark.parametrize("width", [1, 7, 10, 12])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 63, 5), (2, 700, 64)], ids=str)
def test_codes_without_a_model(gpu: Any, shape: tuple[int, int, int], width: int) -> None:
    """Packed as by the CPU, and back beside other bits, or without them; unsound ones are found."""
    shift = min(16 - width, 6)
    elements = np.random.default_rng(width).integers(0, 1 << 16, (2, *shape)).astype(np.uint16)
    codes = elements >> shift & (1 << width) - 1
    expected = [bytes([0]) + pack(plane.astype(PlaneSpec("", shape, width).code_dtype), width) for plane in codes]
    memory, addresses = on_device(gpu, list(elements))
    parts = cuda.Parts(addresses, shape, shape[1] * shape[2], item=2, shift=shift, width=width)
    packed = cuda.pack(gpu, parts)
    assert streams_of(packed) == expected
    assert [int(c) % (1 << 64) for c in host(packed.checksums)] == [checksum(stream) for stream in expected]
    streams = packed.places[:-1] + packed.arena.data_ptr()
    for merge in (True, False):
        out = torch.full((2, codes[0].size + 8), 0x0001, dtype=torch.int16, device=gpu.device)
        targets = torch.arange(2, device=gpu.device) * (2 * out.shape[1]) + out.data_ptr()
        goal = cuda.Parts(targets, shape, parts.head_stride, item=2, shift=shift, width=width)
        assert not host(cuda.unpack(gpu, streams, packed.sizes, goal, merge)).any()
        got = host(out).view(np.uint16)
        assert (got[:, : codes[0].size].reshape(codes.shape) == (codes << shift | (1 if merge else 0))).all()
        assert (got[:, codes[0].size :] == 1).all()
        assert host(cuda.unpack(gpu, streams, packed.sizes - 1, goal, merge)).all()
        packed.arena[packed.places[1]] = 2
        assert host(cuda.unpack(gpu, streams, packed.sizes, goal, merge)).tolist() == [0, 1]
        packed.arena[packed.places[1]] = 0
    del memory


def bits_like(kind: str, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if kind == "random":
        return generator.integers(0, 1 << 16, shape).astype(np.uint16)
    if kind == "equal":
        return np.full(shape, 0x7FC1, np.uint16)
    scale = np.exp(generator.uniform(-4, 3, (shape[0], 1, shape[2])))
    values = (generator.standard_normal(shape) * scale).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    if kind == "special":
        where = generator.random(shape) < 0.02
        bits[where] = generator.choice(np.array([0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 1], np.uint16), int(where.sum()))
    return bits


@pytest.mark.parametrize("kind", ["normal", "special", "equal", "random"])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 63, 64), (3, 160, 64), (1, 1000, 128), (2, 7, 192)], ids=str)
def test_bf16_has_the_same_streams(gpu: Any, shape: tuple[int, int, int], kind: str) -> None:
    """Streams, checksums, digests; and back, merged with the mantissas."""
    every = [bits_like(kind, shape, seed) for seed in range(2)]
    part = Part("BF16", shape, 0, shape[1])
    specs = FloatSplit().planes(part)
    planes = [FloatSplit().encode(bits, part) for bits in every]
    expected = [Rans().encode(high, specs[0]) for high, _ in planes]
    mantissas = [bytes([0]) + pack(low, 7) for _, low in planes]
    memory, addresses = on_device(gpu, every)
    run = shape[1] * shape[2]
    parts = cuda.Parts(addresses, shape, run, item=2, shift=7, width=9, floats=True)
    coded = cuda.encode(gpu, parts)
    assert streams_of(coded) == expected
    assert coded.mantissas is not None
    assert coded.mantissa_checksums is not None
    assert coded.digests is not None
    assert [
        row[15 : 16 + len(m) - 1].tobytes() for row, m in zip(host(coded.mantissas), mantissas, strict=True)
    ] == mantissas
    assert [int(c) % (1 << 64) for c in host(coded.mantissa_checksums)] == [checksum(m) for m in mantissas]
    digests = [checksum(bits) for bits in every]
    assert [int(d) % (1 << 64) for d in host(coded.digests)] == digests
    out = torch.full((len(every), every[0].nbytes + 64), 0xA5, dtype=torch.uint8, device=gpu.device)
    targets = torch.arange(len(every), device=gpu.device) * out.shape[1] + out.data_ptr()
    packed = torch.arange(len(every), device=gpu.device) * coded.mantissas.shape[1] + (coded.mantissas.data_ptr() + 16)
    back = cuda.Parts(targets, shape, run, item=2, shift=7, width=9, floats=True)
    meta, sums, _ = cuda.decode(gpu, coded.places[:-1] + coded.arena.data_ptr(), coded.sizes, back, packed)
    assert not host(meta)[:, cuda.FAULT].any()
    for i, bits in enumerate(every):
        if host(meta)[i, cuda.MODE]:
            assert (host(out)[i, : bits.nbytes].view(np.uint16).reshape(shape) == bits).all()
            assert (host(out)[i, bits.nbytes :] == 0xA5).all()
            assert int(host(sums)[i]) % (1 << 64) == digests[i]
    del memory


def test_a_chunk_of_a_longer_tensor(gpu: Any) -> None:
    """Heads that lie further apart than the chunk is long."""
    whole = bits_like("normal", (2, 200, 64), 5)
    cut = np.ascontiguousarray(whole[:, 40:140])
    part = Part("BF16", cut.shape, 40, 200)
    spec = FloatSplit().planes(part)[0]
    memory, addresses = on_device(gpu, [whole])
    parts = cuda.Parts(addresses + 40 * 64 * 2, cut.shape, 200 * 64, item=2, shift=7, width=9, floats=True)
    coded = cuda.encode(gpu, parts)
    assert streams_of(coded) == [Rans().encode(FloatSplit().encode(cut, part)[0], spec)]
    assert coded.digests is not None
    assert int(host(coded.digests)[0]) % (1 << 64) == checksum(cut)
    del memory


@pytest.mark.parametrize("where", ["head", "side", "words", "states", "cut"])
def test_unsound_streams_are_found(gpu: Any, where: str) -> None:
    shape = (1, 300, 64)
    plane = codes_like("peaked", shape, 8, 1).astype(np.uint8)
    spec = PlaneSpec("codes", shape, 8)
    good = Rans().encode(plane, spec)
    changed = bytearray(good)
    if where == "cut":
        changed = changed[:-1]
    else:
        changed[{"head": 4, "side": len(good) - 3, "words": 16 + 4 * 64 + 100, "states": 20}[where]] ^= 0x55
    padded = np.frombuffer(bytes(changed) + bytes(-len(changed) % 16), np.uint8)
    arena, places = on_device(gpu, [padded, np.zeros(2 * plane.size + 4096, np.uint8)])
    out = torch.zeros(plane.size, dtype=torch.uint8, device=gpu.device)
    target = cuda.Parts(torch.tensor([out.data_ptr()], device=gpu.device), shape, plane.size)
    meta, _, _ = cuda.decode(gpu, places[:1], torch.tensor([len(changed)], device=gpu.device), target)
    del arena
    assert host(meta)[0, cuda.FAULT]

"""``fisher``'s chain on a GPU against the CPU: coordinates, codes but for near ties, values within bf16's rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from profiles import VOCABULARY, arrays_for

from kvpack.checksum import checksum
from kvpack.codecs import fisher
from kvpack.device.joint import Joint
from kvpack.device.staging import unsigned
from kvpack.floats import from_float32, to_float32
from kvpack.stages.base import Part, Side
from kvpack.stages.quantizers.dead_zone import MIDDLE, DeadZone
from kvpack.stages.quantizers.dead_zone import cuda as dead_zone
from kvpack.stages.symbols import zigzag
from kvpack.stages.transforms.token_klt import TokenKlt
from kvpack.stages.transforms.token_klt import cuda as klt

LAYERS, HEADS, DIMS = 2, 2, 16
CODEC = fisher(-200)
KLT, QUANTIZER = CODEC.keys.transforms[0], CODEC.keys.quantizer


def part_of(tokens: int, *, ids: bool = True, profile: dict[str, np.ndarray] | None = None) -> Part:
    rng = np.random.default_rng(tokens)
    side = Side(
        rng.integers(0, VOCABULARY, tokens).astype(np.int32) if ids else None,
        rng.gamma(0.3, size=tokens).astype(np.float32),
    )
    shape = (2 * LAYERS * HEADS, tokens, DIMS)
    return Part("BF16", shape, 0, tokens, HEADS, profile=profile or arrays_for(LAYERS, HEADS, DIMS), side=side)


def bits_of(part: Part, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-2, 2, (part.shape[0], 1, part.shape[2])))
    return from_float32((rng.standard_normal(part.shape) * scale).astype(np.float32), "BF16")


def sent(gpu: Any, bits: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors ``[S, H, T, D]`` in device memory, and their addresses ``[S]``."""
    stacked = torch.from_numpy(bits.reshape(-1, HEADS, *bits.shape[1:]).view(np.int16).copy()).to(gpu.device)
    return stacked, torch.arange(len(stacked), device=gpu.device) * (2 * stacked[0].numel()) + stacked.data_ptr()


def cut(part: Part, first: int, tokens: int) -> Part:
    return replace(part, shape=(part.shape[0], tokens, part.shape[2]), first=first)


def coordinates(part: Part, bits: np.ndarray) -> np.ndarray:
    assert isinstance(KLT, TokenKlt)
    return KLT.forward(to_float32(bits, "BF16"), part)[0]


@pytest.mark.parametrize(("tokens", "units"), [(1, 1), (2, 1), (63, 1), (200, 1), (128, 3)])
@pytest.mark.parametrize("ids", [True, False])
def test_coordinates(gpu: Any, tokens: int, units: int, ids: bool) -> None:
    """Within the rounding of halves, on units that begin anywhere; digests are the originals'."""
    part = part_of(tokens * units, ids=ids)
    bits = bits_of(part)
    assert isinstance(KLT, TokenKlt)
    matrices = klt.Matrices.of(KLT.model(part), gpu.device)
    given = klt.Tokens.of(gpu, matrices, part.side.tokens) if ids else None
    memory, starts = sent(gpu, bits)
    addresses = torch.stack([starts + u * tokens * DIMS * 2 for u in range(units)])
    faults = torch.zeros(units, dtype=torch.int32, device=gpu.device)
    turned = klt.turns(matrices.frequencies, part.total, gpu.device)
    stacks = klt.Stacks(addresses, (HEADS, tokens, DIMS), tokens * units * DIMS, 0, *turned)
    z, digests = klt.forward(gpu, matrices, stacks, given, faults)
    assert not faults.any()
    expected = coordinates(part, bits)
    assert (
        np.abs(z.cpu().numpy() / 2.0**matrices.analysis_exponent - expected).max()
        < 2e-3 * np.abs(expected).max() + 1e-9
    )
    per_tensor = bits.reshape(-1, HEADS, units, tokens, DIMS)
    for u in range(units):
        sums = [checksum(np.ascontiguousarray(tensor[:, u])) for tensor in per_tensor]
        assert unsigned(digests[u].cpu()) == sums
    del memory


def test_codes_are_the_cpus_for_the_same_coordinates(gpu: Any) -> None:
    assert isinstance(QUANTIZER, DeadZone)
    part = part_of(100)
    inner = replace(part, shape=(1, 100, part.shape[0] * DIMS))
    z = np.random.default_rng(0).laplace(size=inner.shape).astype(np.float32)
    z[0, 3, :9] = [0, -0.0, 1e-30, -1e-30, 200, -200, 12.5, -12.5, 13]
    levels, expected = QUANTIZER.encode(z, inner)
    numbers = levels.reshape(-1).astype(np.int32) - MIDDLE
    plane = QUANTIZER.scaled(QUANTIZER.planes(inner)[1], {"levels": levels}, inner)
    assert plane.scales is not None
    steps, columns, rows = (
        torch.from_numpy(a).to(gpu.device)
        for a in (QUANTIZER.steps(numbers).reshape(-1), plane.scales.columns, plane.scales.rows)
    )
    roundings = torch.full((64,), 0.37, device=gpu.device)
    faults = torch.zeros(1, dtype=torch.int32, device=gpu.device)
    codes = dead_zone.quantize(gpu, torch.from_numpy(z[0]).to(gpu.device), steps, columns, rows, roundings, faults)
    assert not faults.any()
    assert (codes.cpu().numpy().view(np.uint16) == expected[0]).all()
    centroids = torch.from_numpy(QUANTIZER.centroids(inner)).to(gpu.device)
    values = dead_zone.restore(gpu, codes, steps, columns, rows, centroids, None, 0, 0)
    exact = QUANTIZER.decode([levels, expected], inner)[0]
    assert (values.cpu().numpy() == exact.astype(np.float16)).all()


def test_every_class_has_its_own_rounding_and_rows_their_own_steps(gpu: Any) -> None:
    """A row's class and its step are two things."""
    z = np.random.default_rng(0).laplace(size=(40, 33)).astype(np.float32)
    columns = np.arange(33, dtype=np.int32) * 15
    rows = (np.arange(40, dtype=np.int32) - 20) * 8
    steps = np.linspace(0.01, 2, 40).astype(np.float32)
    roundings = np.linspace(0.1, 0.5, 64).astype(np.float32)
    given = [torch.from_numpy(a).to(gpu.device) for a in (z, steps, columns, rows, roundings)]
    faults = torch.zeros(1, dtype=torch.int32, device=gpu.device)
    codes = dead_zone.quantize(gpu, *given, faults).cpu().numpy().view(np.uint16)
    classes = np.clip((columns[None] - rows[:, None]) >> 3, 0, 63)
    magnitude = np.floor(np.abs(z) / steps[:, None] + roundings[classes])
    assert (codes == zigzag(np.where(z < 0, -magnitude, magnitude))).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_what_cannot_be_coded_is_a_fault_of_its_unit(gpu: Any, value: float) -> None:
    part = part_of(256)
    bits = bits_of(part)
    bits[3, 200, 5] = from_float32(np.array([value], np.float32), "BF16")[0]
    memory, starts = sent(gpu, bits)
    joint = Joint(gpu, CODEC.keys, part)
    addresses = torch.stack([starts, starts + 128 * DIMS * 2])
    done = joint.compress(addresses, (HEADS, 128, DIMS), 256 * DIMS, 0, joint.levels(0, 2, 128))
    assert done.faults.tolist() == [0, 1]
    del memory


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize(("tokens", "units"), [(1, 1), (63, 1), (200, 1), (128, 3)])
def test_there_and_back(gpu: Any, tokens: int, units: int, ids: bool) -> None:
    """Each side reads the other's streams: within bf16's rounding and what halves add."""
    part = part_of(tokens * units, ids=ids)
    bits = bits_of(part)
    memory, starts = sent(gpu, bits)
    joint = Joint(gpu, CODEC.keys, part)
    addresses = torch.stack([starts + u * tokens * DIMS * 2 for u in range(units)])
    levels = joint.levels(0, units, tokens)
    shape = (HEADS, tokens, DIMS)
    done = joint.compress(addresses, shape, units * tokens * DIMS, 0, levels)
    assert not done.faults.any()
    coded = done.coded
    out = torch.full_like(memory, 0x7FFF)
    back = addresses - memory.data_ptr() + out.data_ptr()
    arena = torch.cat([coded.arena, torch.zeros(1 << 16, dtype=torch.uint8, device=gpu.device)])
    unsound, sums, odd = joint.decompress(
        coded.places[:-1] + arena.data_ptr(), coded.sizes, 400, back, shape, units * tokens * DIMS, 0, levels
    )
    assert not unsound.any()
    assert not odd.any()
    assert torch.equal(sums, coded.checksums)
    mine = to_float32(out.cpu().numpy().view(np.uint16).reshape(bits.shape), "BF16")
    host = coded.arena.cpu().numpy()
    for u in range(units):
        piece = cut(part, u * tokens, tokens)
        inner = CODEC.keys.transforms[0].output(piece)
        plane = QUANTIZER.planes(inner)[1]
        side = {"levels": (levels[u] + MIDDLE).astype(np.uint8).reshape(1, -1, 1)}
        scaled = QUANTIZER.scaled(plane, side, inner)
        place, size = int(coded.places[u]), int(coded.sizes[u])
        stream = memoryview(host[place : place + size].tobytes())
        codes = CODEC.keys.entropy.decode(stream, scaled)
        assert CODEC.keys.entropy.encode(codes, scaled) == bytes(stream)
        z = coordinates(piece, bits[:, u * tokens : (u + 1) * tokens])
        assert_near_ties_alone(codes[0], z, levels[u])
        exact = CODEC.keys.transforms[0].inverse(QUANTIZER.decode([side["levels"], codes], inner), piece)
        got = mine[:, u * tokens : (u + 1) * tokens]
        scale = np.abs(exact).max(axis=(0, 2), keepdims=True)
        assert (np.abs(got - exact) <= np.abs(exact) * 2.0**-8 + scale * 2.0**-9).all()


def assert_near_ties_alone(codes: np.ndarray, z: np.ndarray, levels: np.ndarray) -> None:
    """Codes that differ from the CPU's lie within a hundredth of a row's largest value of a bound, and one apart."""
    assert isinstance(QUANTIZER, DeadZone)
    steps = QUANTIZER.steps(levels)
    scaled = np.abs(z) / steps + np.float32(0.37)
    magnitude = np.floor(scaled)
    got = (codes.astype(np.int64) + 1) >> 1
    differ = got != magnitude
    near = np.abs(scaled - np.maximum(got, magnitude))
    assert (np.abs(got - magnitude) <= 1 + 2e-3 * magnitude.max(1, keepdims=True)).all()
    assert (near[differ] <= (2e-3 * scaled.max(1, keepdims=True) + 0 * scaled)[differ] + 1e-6).all()

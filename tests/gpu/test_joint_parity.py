"""``fisher``'s chain on a GPU against the CPU: coordinates, codes but for near ties, values within bf16's rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from profiles import VOCABULARY, arrays_for

from kvpack.codecs.chain.base import Part, Scales
from kvpack.codecs.chain.quantizers.dead_zone import MIDDLE, DeadZone, reference
from kvpack.codecs.chain.quantizers.dead_zone.reference import MAX_SHIFT, magnitude_costs, thresholds
from kvpack.codecs.chain.symbols import zigzag
from kvpack.codecs.chain.transforms.token_klt import TokenKlt
from kvpack.codecs.context import DecodeContext
from kvpack.codecs.recipes import fisher
from kvpack.gpu.engine.fisher_kernels import FisherKernels
from kvpack.gpu.engine.staging import unsigned
from kvpack.gpu.kernels import dead_zone
from kvpack.gpu.kernels import token_klt as klt
from kvpack.numerics.checksum import checksum
from kvpack.numerics.floats import from_float32, to_float32

LAYERS, HEADS, DIMS = 2, 2, 16
CODEC = fisher(-200)
KLT, QUANTIZER = CODEC.keys.transforms[0], CODEC.keys.quantizer


def part_of(tokens: int, *, ids: bool = True, profile: dict[str, np.ndarray] | None = None) -> Part:
    rng = np.random.default_rng(tokens)
    tokens_known = rng.integers(0, VOCABULARY, tokens).astype(np.int32) if ids else None
    shape = (2 * LAYERS * HEADS, tokens, DIMS)
    context = DecodeContext(profile or arrays_for(LAYERS, HEADS, DIMS), tokens_known)
    return Part("BF16", shape, 0, tokens, HEADS, context=context)


def mass_of(tokens: int) -> np.ndarray:
    return np.random.default_rng(tokens).gamma(0.3, size=tokens).astype(np.float32)


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
    matrices = klt.Matrices.of(gpu, KLT.model(part), 4)
    given = klt.Tokens.of(gpu, matrices.prediction, part.context.tokens) if ids else None
    memory, starts = sent(gpu, bits)
    addresses = torch.stack([starts + u * tokens * DIMS * 2 for u in range(units)])
    faults = torch.zeros(units, dtype=torch.int32, device=gpu.device)
    turned = klt.turns(matrices.frequencies, part.length, gpu.device)
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
    """Tokens that scatter as the profile says, half and four times as much."""
    assert isinstance(QUANTIZER, DeadZone)
    part = part_of(100)
    inner = CODEC.keys.transforms[0].output(part)
    rng = np.random.default_rng(0)
    z = (rng.laplace(size=inner.shape) * rng.choice([0.5, 1, 4], (1, 100, 1))).astype(np.float32)
    z[0, 3, :9] = [0, -0.0, 1e-30, -1e-30, 200, -200, 12.5, -12.5, 13]
    expected = QUANTIZER.encode(z, inner)
    levels, shifts = (plane.reshape(-1).astype(np.int32) for plane in expected[:2])
    assert len(set(shifts)) > 3
    scales = QUANTIZER.scaled(QUANTIZER.planes(inner)[2], plane_codes(levels, 0 * shifts + MAX_SHIFT), inner).scales
    assert scales is not None
    steps, columns, rows = (
        torch.from_numpy(a).to(gpu.device)
        for a in (QUANTIZER.steps(levels - MIDDLE).reshape(-1), scales.columns, scales.rows)
    )
    choices = dead_zone.Choices.of(scales.tables, QUANTIZER.centroids(inner), gpu.device)
    faults = torch.zeros(1, dtype=torch.int32, device=gpu.device)
    given = torch.from_numpy(z[0]).to(gpu.device)
    codes, found, shifted = dead_zone.quantize(gpu, given, steps, columns, rows, choices, faults)
    assert not faults.any()
    assert (found.cpu().numpy() == shifts - MAX_SHIFT).all()
    assert (codes.cpu().numpy().view(np.uint16) == expected[2][0]).all()
    exact = QUANTIZER.decode(expected, inner)[0].astype(np.float16)
    for common, groups in ((exact.shape[1], 1), (exact.shape[1] - 6, 3)):
        values = dead_zone.restore(gpu, codes, steps, columns, shifted, choices, None, 0, 0, common, groups)
        own = np.split(exact[:, common:], groups, axis=1)
        assert (values.cpu().numpy() == np.concatenate([np.hstack([exact[:, :common], o]) for o in own], 1)).all()


def plane_codes(levels: np.ndarray, shifts: np.ndarray) -> dict[str, np.ndarray]:
    return {"levels": levels.astype(np.uint8), "shifts": shifts.astype(np.uint8)}


def test_every_class_has_its_own_thresholds_and_rows_their_own_steps(gpu: Any) -> None:
    """A row's class and its step are two things."""
    rng = np.random.default_rng(0)
    z = rng.laplace(size=(40, 33)).astype(np.float32)
    columns = np.arange(33, dtype=np.int32) * 15
    rows = (np.arange(40, dtype=np.int32) - 20) * 8
    steps = np.linspace(0.01, 2, 40).astype(np.float32)
    tables = rng.integers(1, 500, (64, 63)).astype(np.int32)
    centroids = rng.uniform(-0.2, 0.2, (64, 4)).astype(np.float32)
    choices = dead_zone.Choices.of(tables, centroids, gpu.device)
    given = [torch.from_numpy(a).to(gpu.device) for a in (z, steps, columns, rows)]
    faults = torch.zeros(1, dtype=torch.int32, device=gpu.device)
    codes, shifts, _ = dead_zone.quantize(gpu, *given, choices, faults)
    wanted, costs, scales = thresholds(tables, centroids), magnitude_costs(tables), Scales(columns, rows, tables)
    expected = reference.shifts(reference.magnitudes(z, steps[:, None], scales, wanted), scales, costs)
    assert (shifts.cpu().numpy() == expected).all()
    shifted = replace(scales, rows=rows - 8 * expected)
    magnitude = reference.magnitudes(z, steps[:, None], shifted, wanted)
    assert (codes.cpu().numpy().view(np.uint16) == zigzag(np.where(z < 0, -magnitude, magnitude))).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_what_cannot_be_coded_is_a_fault_of_its_unit(gpu: Any, value: float) -> None:
    part = part_of(256)
    bits = bits_of(part)
    bits[3, 200, 5] = from_float32(np.array([value], np.float32), "BF16")[0]
    memory, starts = sent(gpu, bits)
    joint = FisherKernels(gpu, CODEC.keys, part)
    addresses = torch.stack([starts, starts + 128 * DIMS * 2])
    done = joint.compress(addresses, (HEADS, 128, DIMS), 256 * DIMS, 0, joint.levels(0, 2, 128, mass_of(256)))
    assert done.faults.tolist() == [0, 1]
    del memory


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize(("tokens", "units"), [(1, 1), (63, 1), (200, 1), (128, 3)])
def test_there_and_back(gpu: Any, tokens: int, units: int, ids: bool) -> None:
    """Each side reads the other's streams: within bf16's rounding and what halves add."""
    part = part_of(tokens * units, ids=ids)
    bits = bits_of(part)
    memory, starts = sent(gpu, bits)
    joint = FisherKernels(gpu, CODEC.keys, part)
    addresses = torch.stack([starts + u * tokens * DIMS * 2 for u in range(units)])
    levels = joint.levels(0, units, tokens, mass_of(units * tokens))
    shape = (HEADS, tokens, DIMS)
    done = joint.compress(addresses, shape, units * tokens * DIMS, 0, levels)
    assert not done.faults.any()
    coded, shifts = done.coded, done.shifts.cpu().numpy()
    out = torch.full_like(memory, 0x7FFF)
    back = addresses - memory.data_ptr() + out.data_ptr()
    arena = torch.cat([coded.arena, torch.zeros(1 << 16, dtype=torch.uint8, device=gpu.device)])
    unsound, sums, nonfinite = joint.decompress(
        coded.places[:-1] + arena.data_ptr(), coded.sizes, 400, back, shape, units * tokens * DIMS, 0, levels, shifts
    )
    assert not unsound.any()
    assert not nonfinite.any()
    assert torch.equal(sums, coded.checksums)
    mine = to_float32(out.cpu().numpy().view(np.uint16).reshape(bits.shape), "BF16")
    host = coded.arena.cpu().numpy()
    for u in range(units):
        piece = cut(part, u * tokens, tokens)
        inner = CODEC.keys.transforms[0].output(piece)
        plane = QUANTIZER.planes(inner)[2]
        side = plane_codes((levels[u] + MIDDLE).reshape(1, -1, 1), (shifts[u] + MAX_SHIFT).reshape(1, -1, 1))
        scaled = QUANTIZER.scaled(plane, side, inner)
        place, size = int(coded.places[u]), int(coded.sizes[u])
        stream = memoryview(host[place : place + size].tobytes())
        codes = CODEC.keys.entropy.decode(stream, scaled)
        assert CODEC.keys.entropy.encode(codes, scaled) == bytes(stream)
        z = coordinates(piece, bits[:, u * tokens : (u + 1) * tokens])
        assert_near_ties_alone(codes[0], z, QUANTIZER.steps(levels[u]), scaled.scales, inner)
        exact = CODEC.keys.transforms[0].inverse(QUANTIZER.decode([*side.values(), codes], inner), piece)
        got = mine[:, u * tokens : (u + 1) * tokens]
        scale = np.abs(exact).max(axis=(0, 2), keepdims=True)
        assert (np.abs(got - exact) <= np.abs(exact) * 2.0**-8 + scale * 2.0**-9).all()


def assert_near_ties_alone(codes: np.ndarray, z: np.ndarray, steps: np.ndarray, scales: Any, inner: Part) -> None:
    """Codes are the CPU's for coordinates less than 2 thousandths of a row's largest one away."""
    assert isinstance(QUANTIZER, DeadZone)
    wanted = thresholds(scales.tables, QUANTIZER.centroids(inner))
    got, size = (codes.astype(np.int64) + 1) >> 1, np.abs(z)
    near = 2e-3 * size.max(1, keepdims=True) + 1e-6 * steps
    low, high = (reference.magnitudes(np.maximum(size + by, 0), steps, scales, wanted) for by in (-near, near))
    assert ((low <= got) & (got <= high)).all()

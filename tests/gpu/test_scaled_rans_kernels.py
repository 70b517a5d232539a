"""The GPU's ``scaled_rans`` against the CPU's: the same streams, each decodes the other's, unsound ones are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvpack.calibration.scales import CLASSES, tables
from kvpack.codecs.chain.base import PlaneSpec, Scales
from kvpack.codecs.chain.entropy.scaled_rans import ScaledRans
from kvpack.codecs.chain.symbols import LARGEST, SMALLEST, zigzag
from kvpack.gpu.kernels import scaled_rans as cuda
from kvpack.numerics.checksum import checksum

FREQUENCIES = tables(np.zeros((CLASSES, len(SMALLEST))))
SHAPES = [(1, 32), (1, 40), (63, 33), (200, 50), (300, 128), (2, 2048)]


def plane(shape: tuple[int, int], kind: str, seed: int) -> tuple[np.ndarray, Scales]:
    """Codes and scales of a plane ``[1, T, D]``."""
    tokens, dims = shape
    generator = np.random.default_rng(seed)
    columns = np.sort(generator.integers(0, 400, dims))[::-1].astype(np.int32)
    rows = (8 * generator.integers(-4, 5, tokens)).astype(np.int32)
    scales = Scales(np.random.default_rng(5).permutation(columns) if kind == "shuffled" else columns, rows, FREQUENCIES)
    deviation = 2.0 ** ((scales.classes() - 19.5) / 4)
    values = np.rint(generator.laplace(size=shape) * deviation)
    if kind == "large":
        values[generator.random(shape) < 0.05] = LARGEST
        values[generator.random(shape) < 0.05] = -LARGEST
    if kind == "zero":
        values[:] = 0
    return zigzag(np.clip(values, -LARGEST, LARGEST)), scales


def planes_of(shape: tuple[int, int], kind: str) -> tuple[list[np.ndarray], list[Scales]]:
    """Three planes with the same columns."""
    codes, scales = zip(*(plane(shape, kind, seed) for seed in range(3)), strict=True)
    return list(codes), [Scales(scales[0].columns, one.rows, one.tables) for one in scales]


def streams_for(codes: list[np.ndarray], scales: list[Scales]) -> list[bytes]:
    tokens, dims = codes[0].shape
    specs = [PlaneSpec("coefficients", (1, tokens, dims), 16, scales=one) for one in scales]
    return [ScaledRans().encode(plane[None], spec) for plane, spec in zip(codes, specs, strict=True)]


def decoded(gpu: Any, streams: list[bytes], classes: cuda.Classes) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Codes, faults and checksums, from streams one behind another."""
    places = np.cumsum([0, *(-(-len(s) // 16) * 16 for s in streams)])
    arena = np.full(places[-1] + cuda.slack(classes.tokens * classes.dims), 0xA5, np.uint8)
    for place, stream in zip(places, streams, strict=False):
        arena[place : place + len(stream)] = np.frombuffer(stream, np.uint8)
    memory = torch.from_numpy(arena).to(gpu.device)
    starts = torch.from_numpy(places[:-1] + memory.data_ptr()).to(gpu.device)
    lengths = [len(s) for s in streams]
    most = cuda.groups_of([s[:8] for s in streams], lengths, classes.tokens * classes.dims)
    codes, faults, sums = cuda.decode(gpu, starts, torch.tensor(lengths, device=gpu.device), classes, most)
    return codes.cpu().numpy().view(np.uint16), faults.cpu().numpy(), [int(s) % (1 << 64) for s in sums.cpu()]


@pytest.mark.parametrize("kind", ["laplace", "shuffled", "large", "zero"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_streams_and_back(gpu: Any, shape: tuple[int, int], kind: str) -> None:
    codes, scales = planes_of(shape, kind)
    expected = streams_for(codes, scales)
    classes = cuda.Classes.of(scales, cuda.Tables.of(FREQUENCIES, gpu.device), gpu.device)
    given = torch.from_numpy(np.stack(codes).view(np.int16)).to(gpu.device)
    coded = cuda.encode(gpu, given, classes)
    arena, places, sizes = (t.cpu().numpy() for t in (coded.arena, coded.places, coded.sizes))
    assert [arena[a : a + n].tobytes() for a, n in zip(places, sizes, strict=False)] == expected
    sums = [checksum(stream) for stream in expected]
    assert [int(s) % (1 << 64) for s in coded.checksums.cpu()] == sums
    back, faults, read = decoded(gpu, expected, classes)
    assert not faults.any()
    assert (back == np.stack(codes)).all()
    assert read == sums


@pytest.mark.parametrize("where", ["span", "raw size", "length", "state", "word", "raw", "cut", "empty", "huge length"])
def test_unsound_streams_are_found_and_others_are_not_disturbed(gpu: Any, where: str) -> None:
    codes, scales = planes_of((300, 128), "large")
    streams = streams_for(codes, scales)
    changed = bytearray(streams[1])
    groups = -(-codes[0].size // int.from_bytes(changed[:4], "little"))
    if where in ("cut", "empty"):
        changed = changed[:-1] if where == "cut" else bytearray()
    elif where == "raw":
        changed[-1] |= 0xFF  # bits beyond the last
    else:
        offset = {
            "span": 0,
            "raw size": 4,
            "length": 8,
            "huge length": 11,
            "state": 9 + 4 * groups,
            "word": 8 + 132 * groups + 100,
        }
        changed[offset[where]] ^= 0x55
    classes = cuda.Classes.of(scales, cuda.Tables.of(FREQUENCIES, gpu.device), gpu.device)
    back, faults, _ = decoded(gpu, [streams[0], bytes(changed), streams[2]], classes)
    assert (faults[[0, 2]] == 0).all()
    assert faults[1] or where == "raw"
    for i in (0, 2):
        assert (back[i] == codes[i]).all()

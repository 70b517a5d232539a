"""TurboQuant's kernels against the CPU: the same codes but for rare ties, values within bf16's rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvpack.codecs.chain.base import Part
from kvpack.codecs.chain.entropy.bitpack import pack, unpack
from kvpack.codecs.chain.quantizers.lloyd_max import LloydMax
from kvpack.codecs.chain.quantizers.lloyd_max.reference import centroids
from kvpack.codecs.chain.transforms.rotation import Rotation
from kvpack.gpu.kernels import lloyd_max as cuda
from kvpack.numerics.floats import from_float32, to_float32

MANY = pytest.mark.skipif(not torch.cuda.is_available(), reason="takes long on a stand-in for a GPU")


@pytest.mark.parametrize(("bits", "step"), [(3, 3), (1, 8), (2, 8), (3, 8), (4, 8)])
@pytest.mark.parametrize("dims", [64, 128])
@pytest.mark.parametrize("count", [1, 15, 63, 1000, pytest.param(20000, marks=MANY)])
def test_codes_norms_and_values(gpu: Any, count: int, dims: int, bits: int, step: int) -> None:
    generator = np.random.default_rng(count)
    values = generator.standard_normal((1, count, dims)).astype(np.float32)
    values *= np.exp(generator.uniform(-3, 3, (1, count, 1))).astype(np.float32)
    given = from_float32(values, "BF16")
    values = to_float32(given, "BF16")
    part = Part("BF16", values.shape, 0, count)
    rotated = Rotation(seed=1).forward(values, part)
    quantizer = LloydMax(bits=bits, prod=False, seed=2)
    expected, high, low = quantizer.encode(rotated, part)
    norms = (high.astype(np.uint16) << 10 | low).reshape(-1).view(np.float16)
    vectors = torch.from_numpy(given[0].view(np.int16)).view(torch.bfloat16).to(gpu.device)
    codes, mine = cuda.compress(gpu, vectors, 1, bits, step)
    assert (np.abs(mine.cpu().numpy().view(np.int16) - norms.view(np.int16)) <= 1).all()
    got = unpack(memoryview(codes.cpu().numpy().reshape(-1)), count * dims, step).reshape(count, dims)
    differ = got != expected[0]
    assert differ.mean() < 1e-3
    levels = centroids(bits, dims)
    bounds = (levels[1:] + levels[:-1]) / 2
    unit = rotated[0] / norms[:, None].astype(np.float32)
    assert (
        np.abs(unit[differ][:, None] - bounds).min(axis=1).max(initial=0) < 5e-4
    )  # a unit in norm's last place, at most
    packed = np.frombuffer(pack(expected.astype(np.uint8), step), np.uint8).reshape(count, -1)
    back = cuda.decompress(
        gpu,
        torch.from_numpy(packed.copy()).to(gpu.device),
        torch.from_numpy(norms.copy()).to(gpu.device),
        1,
        bits,
        step,
    )
    exact = Rotation(seed=1).inverse(quantizer.decode([expected, high, low], part), part)[0]
    error = np.abs(to_float32(back.view(torch.int16).cpu().numpy().view(np.uint16), "BF16") - exact)
    assert (error <= np.abs(exact) * 2.0**-8 + norms[:, None].astype(np.float32) * 1e-5).all()

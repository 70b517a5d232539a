"""KIVI's kernels against the CPU: the same codes, scales and zeros, and the same values, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvpack.codecs.chain.entropy.bitpack import pack
from kvpack.codecs.chain.quantizers.affine.reference import dequantize, quantize
from kvpack.gpu.kernels import affine as cuda
from kvpack.numerics.floats import from_float32, to_float32


@pytest.mark.parametrize("kind", ["normal", "equal", "large"])
@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize(("bits", "step"), [(2, 2), (4, 4), (2, 8), (3, 8), (4, 8)])
@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 63, 64), (3, 200, 128)], ids=str)
def test_codes_and_values(gpu: Any, shape: tuple[int, int, int], bits: int, step: int, axis: str, kind: str) -> None:
    generator = np.random.default_rng(shape[1])
    values = generator.standard_normal(shape).astype(np.float32) * {"normal": 1, "equal": 0, "large": 5e3}[kind] + 0.3
    given = from_float32(values, "BF16")
    codes, scales, zeros = quantize(to_float32(given, "BF16"), bits, 1 if axis == "token" else 2, cuda.GROUP)
    tensors = torch.from_numpy(given.view(np.int16)).view(torch.bfloat16).to(gpu.device)
    mine = cuda.compress(gpu, tensors, bits, axis, step)
    assert mine[0].cpu().numpy().tobytes() == pack(codes, step)
    for got, expected in zip(mine[1:], (scales, zeros), strict=True):
        assert (got.cpu().numpy().view(np.uint16) == expected.view(np.uint16)).all()
    back = cuda.decompress(gpu, *mine, bits, axis, step).view(torch.int16).cpu().numpy().view(np.uint16)
    axis_number = 1 if axis == "token" else 2
    assert (back == from_float32(dequantize(codes, scales, zeros, axis_number, cuda.GROUP), "BF16")).all()

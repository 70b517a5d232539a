"""TurboQuant's codes on a GPU: rotation, norms and codes of bf16 vectors in one kernel, and back.

Codes of 3 bits may be packed by the same kernel (``step`` 3); else a code takes a byte (``step`` 8).

The rotation is multiplied as two bf16 matrices that hold 16 of its bits, by tensor cores, with float32 sums. So a code
may differ from the CPU's where a coordinate lies next to a bound between two levels, and a norm by one unit in fp16's
last place; ``tests/gpu/test_rotated_kernels.py`` bounds both.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from kvpack.codecs.chain.quantizers.lloyd_max.reference import centroids
from kvpack.codecs.chain.random import rotation_matrix
from kvpack.gpu.kernels.constants import LLOYD_MAX
from kvpack.gpu.runtime.launch import Launcher

Tensor = torch.Tensor
WARPS, ROWS, PADDING = LLOYD_MAX["WARPS"], LLOYD_MAX["ROWS"], LLOYD_MAX["PADDING"]
BLOCKS = 1056
"""Blocks of a launch at most: as many for each of 132 multiprocessors, whose last ones end together."""


def supports(dims: int) -> bool:
    """Whether the kernels are made for vectors of this length."""
    return dims in (64, 128)


def _two(matrix: Tensor) -> Tensor:
    """A float32 matrix as two bf16 ones, the nearest and what it leaves."""
    near = matrix.to(torch.bfloat16)
    return torch.stack([near, (matrix - near.float()).to(torch.bfloat16)]).contiguous()


def _shared(dims: int) -> int:
    return 2 * dims * (dims + PADDING) * 2


@lru_cache(maxsize=8)
def _forward(device: str, dims: int, seed: int, bits: int) -> tuple[Tensor, Tensor]:
    """The rotation and the bounds between levels, on the device."""
    matrix = _two(torch.from_numpy(rotation_matrix(dims, seed).copy()))
    levels = centroids(bits, dims)
    return matrix.to(device), torch.from_numpy((levels[1:] + levels[:-1]) / np.float32(2)).to(device)


@lru_cache(maxsize=8)
def _backward(device: str, dims: int, seed: int, bits: int) -> tuple[Tensor, Tensor]:
    """The rotation's transpose, and for two codes their levels as two bf16 pairs, on the device."""
    matrix = _two(torch.from_numpy(rotation_matrix(dims, seed).T.copy()))
    both = _two(torch.from_numpy(centroids(bits, dims).copy())).view(torch.int16).numpy()
    levels = both.view(np.uint16).astype(np.uint64)
    pair = np.arange(1 << 2 * bits)
    low, high = levels[:, pair % (1 << bits)], levels[:, pair >> bits]
    pairs = low[0] | high[0] << np.uint64(16) | low[1] << np.uint64(32) | high[1] << np.uint64(48)
    return matrix.to(device), torch.from_numpy(pairs.view(np.int64)).to(device)


def compress(gpu: Launcher, vectors: Tensor, seed: int, bits: int = 3, step: int = 3) -> tuple[Tensor, Tensor]:
    """Codes ``[N, D * step / 8]`` uint8 and fp16 norms ``[N]`` of bf16 ``vectors`` ``[N, D]``."""
    count, dims = vectors.shape
    codes = torch.empty(count, dims * step // 8, dtype=torch.uint8, device=gpu.device)
    norms = torch.empty(count, dtype=torch.float16, device=gpu.device)
    gpu.launch("lloyd_max/rotated:compress", {"BITS": bits, "STEP": step, "DIMS": dims},
               (min(BLOCKS, -(-count // (WARPS * ROWS))), 1), 32 * WARPS, _shared(dims),
               vectors, count, *_forward(gpu.device, dims, seed, bits), codes, norms)  # fmt: skip
    return codes, norms


def decompress(gpu: Launcher, codes: Tensor, norms: Tensor, seed: int, bits: int = 3, step: int = 3) -> Tensor:
    """bf16 vectors ``[N, D]`` from :func:`compress`'s results."""
    count, dims = codes.shape[0], codes.shape[1] * 8 // step
    vectors = torch.empty(count, dims, dtype=torch.bfloat16, device=gpu.device)
    gpu.launch("lloyd_max/rotated:decompress", {"BITS": bits, "STEP": step, "DIMS": dims},
               (min(BLOCKS, -(-count // (WARPS * ROWS))), 1), 32 * WARPS, _shared(dims),
               codes, norms, count, *_backward(gpu.device, dims, seed, bits), vectors)  # fmt: skip
    return vectors

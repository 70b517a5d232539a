"""TurboQuant's codes on a GPU: one kernel rotates bf16 vectors and finds their norms and codes, another goes back.

A code takes ``step`` bits. Codes of 3 bits can be packed by the same kernel, with ``step`` 3; otherwise a code takes a
byte, and ``step`` is 8. In shapes, N is the number of vectors and D their length.

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
"""Most blocks of a launch: 8 for each of an H100's 132 multiprocessors, so that all of them end together."""


def supports(dims: int) -> bool:
    """Whether the kernels are made for vectors of ``dims`` elements: 64 or 128."""
    return dims in (64, 128)


def _two(matrix: Tensor) -> Tensor:
    """Split a float32 matrix into two bf16 ones ``[2, ...]``: the nearest one, and the nearest to the rest."""
    near = matrix.to(torch.bfloat16)
    return torch.stack([near, (matrix - near.float()).to(torch.bfloat16)]).contiguous()


def _shared(dims: int) -> int:
    """Return the bytes of shared memory for both matrices."""
    return 2 * dims * (dims + PADDING) * 2


@lru_cache(maxsize=8)
def _forward(device: str, dims: int, seed: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return the rotation as two matrices and the bounds between neighbouring levels, on the device."""
    matrix = _two(torch.from_numpy(rotation_matrix(dims, seed).copy()))
    levels = centroids(bits, dims)
    return matrix.to(device), torch.from_numpy((levels[1:] + levels[:-1]) / np.float32(2)).to(device)


@lru_cache(maxsize=8)
def _backward(device: str, dims: int, seed: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return the rotation's transpose and, for every pair of codes, their levels as two bf16 pairs, on the device."""
    matrix = _two(torch.from_numpy(rotation_matrix(dims, seed).T.copy()))
    both = _two(torch.from_numpy(centroids(bits, dims).copy())).view(torch.int16).numpy()
    levels = both.view(np.uint16).astype(np.uint64)
    pair = np.arange(1 << 2 * bits)
    low, high = levels[:, pair % (1 << bits)], levels[:, pair >> bits]
    pairs = low[0] | high[0] << np.uint64(16) | low[1] << np.uint64(32) | high[1] << np.uint64(48)
    return matrix.to(device), torch.from_numpy(pairs.view(np.int64)).to(device)


def compress(gpu: Launcher, vectors: Tensor, seed: int, bits: int = 3, step: int = 3) -> tuple[Tensor, Tensor]:
    """Quantize bf16 ``vectors`` ``[N, D]``.

    Args:
        gpu: where the vectors are.
        vectors: bf16 ``[N, D]``, contiguous.
        seed: seed of the rotation.
        bits: bits of a code that are used, 1 to 4.
        step: bits that a code takes, 8, or 3 if ``bits`` is 3.

    Returns:
        Codes uint8 ``[N, D * step / 8]`` and norms fp16 ``[N]``.

    """
    count, dims = vectors.shape
    codes = torch.empty(count, dims * step // 8, dtype=torch.uint8, device=gpu.device)
    norms = torch.empty(count, dtype=torch.float16, device=gpu.device)
    gpu.launch("lloyd_max/rotated:compress", {"BITS": bits, "STEP": step, "DIMS": dims},
               (min(BLOCKS, -(-count // (WARPS * ROWS))), 1), 32 * WARPS, _shared(dims),
               vectors, count, *_forward(gpu.device, dims, seed, bits), codes, norms)  # fmt: skip
    return codes, norms


def decompress(gpu: Launcher, codes: Tensor, norms: Tensor, seed: int, bits: int = 3, step: int = 3) -> Tensor:
    """Return bf16 vectors ``[N, D]`` from the codes and norms that :func:`compress` returns for the same settings."""
    count, dims = codes.shape[0], codes.shape[1] * 8 // step
    vectors = torch.empty(count, dims, dtype=torch.bfloat16, device=gpu.device)
    gpu.launch("lloyd_max/rotated:decompress", {"BITS": bits, "STEP": step, "DIMS": dims},
               (min(BLOCKS, -(-count // (WARPS * ROWS))), 1), 32 * WARPS, _shared(dims),
               codes, norms, count, *_backward(gpu.device, dims, seed, bits), vectors)  # fmt: skip
    return vectors

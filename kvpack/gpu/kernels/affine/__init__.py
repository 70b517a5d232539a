"""KIVI's codes on a GPU: ``affine`` with groups of 32, the CPU's to the bit, and back.

Codes of 2 and 4 bits may be packed by the same kernel (``step`` is their bits); else a code takes a byte (``step`` 8).
"""

from __future__ import annotations

import torch

from kvpack.gpu.kernels.constants import AFFINE
from kvpack.gpu.runtime.launch import Launcher

Tensor = torch.Tensor
GROUP = AFFINE["GROUP"]
AXES = {"token": "tokens", "channel": "channels"}


def supports(dims: int) -> bool:
    """Whether the kernels are made for vectors of this length."""
    return dims % GROUP == 0


def compress(gpu: Launcher, tensors: Tensor, bits: int, axis: str, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 ``[N, T, D * step / 8]``, scales and zeros fp16 of bf16 ``tensors`` ``[N, T, D]``.

    Groups run along ``axis``: of ``token`` scales are ``[N, ceil(T / 32), D]``, of ``channel`` ``[N, T, D / 32]``.
    """
    count, tokens, dims = tensors.shape
    codes = torch.empty(count, tokens, dims * step // 8, dtype=torch.uint8, device=gpu.device)
    shape = (count, -(-tokens // GROUP), dims) if axis == "token" else (count, tokens, dims // GROUP)
    scales, zeros = torch.empty(2, *shape, dtype=torch.float16, device=gpu.device)
    threads, block = (shape[1] * count * dims // 8, 128) if axis == "token" else (tensors.numel() // 8, 256)
    gpu.launch(f"affine/groups:compress_{AXES[axis]}", {"BITS": bits, "STEP": step, "DIMS": dims},
               (-(-threads // block), 1), block, 0, tensors, count, tokens, codes, scales, zeros)  # fmt: skip
    return codes, scales, zeros


def decompress(gpu: Launcher, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, axis: str, step: int) -> Tensor:
    """bf16 tensors ``[N, T, D]`` from :func:`compress`'s results."""
    count, tokens, width = codes.shape
    tensors = torch.empty(count, tokens, width * 8 // step, dtype=torch.bfloat16, device=gpu.device)
    defines = {"BITS": bits, "STEP": step, "DIMS": tensors.shape[2]}
    gpu.launch(f"affine/groups:decompress_{AXES[axis]}", defines,
               (-(-tensors.numel() // 8 // 256), 1), 256, 0, codes, scales, zeros, count, tokens, tensors)  # fmt: skip
    return tensors

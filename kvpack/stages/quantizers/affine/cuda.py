"""KIVI's codes on a GPU: ``affine`` with groups of 32 and ``bitpack`` in one kernel, the CPU's to the bit, and back."""

from __future__ import annotations

import torch

from kvpack.stages.device.launch import Launcher

Tensor = torch.Tensor
GROUP = 32
AXES = {"token": "tokens", "channel": "channels"}


def supports(bits: int, dims: int) -> bool:
    """Whether the kernels are made for such codes of vectors of this length."""
    return bits in (2, 4) and dims % GROUP == 0


def compress(gpu: Launcher, tensors: Tensor, bits: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes uint8 ``[N, T, D * bits / 8]``, scales and zeros fp16 of bf16 ``tensors`` ``[N, T, D]``.

    Groups run along ``axis``: of ``token`` scales are ``[N, ceil(T / 32), D]``, of ``channel`` ``[N, T, D / 32]``.
    """
    count, tokens, dims = tensors.shape
    codes = torch.empty(count, tokens, dims * bits // 8, dtype=torch.uint8, device=gpu.device)
    shape = (count, -(-tokens // GROUP), dims) if axis == "token" else (count, tokens, dims // GROUP)
    scales, zeros = torch.empty(2, *shape, dtype=torch.float16, device=gpu.device)
    threads, block = (shape[1] * count * dims // 8, 128) if axis == "token" else (tensors.numel() // 8, 256)
    gpu.launch(f"quantizers/affine/groups:compress_{AXES[axis]}", {"BITS": bits, "DIMS": dims},
               (-(-threads // block), 1), block, 0, tensors, count, tokens, codes, scales, zeros)  # fmt: skip
    return codes, scales, zeros


def decompress(gpu: Launcher, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, axis: str) -> Tensor:
    """bf16 tensors ``[N, T, D]`` from :func:`compress`'s results."""
    count, tokens, width = codes.shape
    tensors = torch.empty(count, tokens, width * 8 // bits, dtype=torch.bfloat16, device=gpu.device)
    gpu.launch(f"quantizers/affine/groups:decompress_{AXES[axis]}", {"BITS": bits, "DIMS": tensors.shape[2]},
               (-(-tensors.numel() // 8 // 256), 1), 256, 0, codes, scales, zeros, count, tokens, tensors)  # fmt: skip
    return tensors

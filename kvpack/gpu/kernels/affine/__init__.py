"""KIVI's codes on a GPU: the ``affine`` quantizer with groups of 32 values, the same as on the CPU, to the bit.

A code takes ``step`` bits. Codes of 2 or 4 bits can be packed by the same kernel, with ``step`` equal to their bits;
otherwise a code takes a byte, and ``step`` is 8. In shapes, N is the number of tensors, T and D their tokens and
dimensions.
"""

from __future__ import annotations

import torch

from kvpack.gpu.kernels.constants import AFFINE
from kvpack.gpu.runtime.launch import Launcher

Tensor = torch.Tensor
GROUP = AFFINE["GROUP"]
AXES = {"token": "tokens", "channel": "channels"}


def supports(dims: int) -> bool:
    """Whether the kernels are made for vectors of ``dims`` elements: the length must be a multiple of 32."""
    return dims % GROUP == 0


def compress(gpu: Launcher, tensors: Tensor, bits: int, axis: str, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize bf16 ``tensors`` ``[N, T, D]``.

    Args:
        gpu: where the tensors are.
        tensors: bf16 ``[N, T, D]``, contiguous.
        bits: bits of a code that are used, 1 to 8.
        axis: ``token`` if the 32 values of a group follow each other along tokens, ``channel`` if along dimensions.
        step: bits that a code takes, 2, 4 or 8.

    Returns:
        Codes uint8 ``[N, T, D * step / 8]``; scales and zeros, both fp16: ``[N, ceil(T / 32), D]`` for ``token``,
        ``[N, T, D / 32]`` for ``channel``.

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
    """Return bf16 tensors ``[N, T, D]`` from the codes, scales and zeros that :func:`compress` returns."""
    count, tokens, width = codes.shape
    tensors = torch.empty(count, tokens, width * 8 // step, dtype=torch.bfloat16, device=gpu.device)
    defines = {"BITS": bits, "STEP": step, "DIMS": tensors.shape[2]}
    gpu.launch(f"affine/groups:decompress_{AXES[axis]}", defines,
               (-(-tensors.numel() // 8 // 256), 1), 256, 0, codes, scales, zeros, count, tokens, tensors)  # fmt: skip
    return tensors

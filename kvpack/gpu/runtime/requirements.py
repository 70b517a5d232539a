"""What a GPU must have for kvpack's kernels, and the plain words for what one lacks.

The kernels multiply bf16 matrices by ``mma.m16n8k16``, convert floats to bf16 and add within a warp by single
instructions. All of these came with compute capability 8.0.
"""

from __future__ import annotations

from typing import Any

MIN_CAPABILITY = (8, 0)
"""The lowest compute capability that has every instruction the kernels use."""

MIN_SHARED = 99 << 10
"""Bytes of shared memory that a block may have on every GPU of compute capability 8.0 or later.

Kernels whose demand cannot be lowered ask for no more than this. GPUs for data centers have more: 163 KiB on 8.0 and
227 KiB on 9.0 and 10.0.
"""


def shared_memory_of(index: int) -> int:
    """Return the bytes of shared memory that a block may ask for on the GPU with this number."""
    return int(_properties(index).shared_memory_per_block_optin)


def shortcoming_of(index: int) -> str | None:
    """Return why kvpack's kernels cannot run on the GPU with this number, as a sentence without a full stop; or None.

    torch must see the GPU.
    """
    properties = _properties(index)
    capability = (properties.major, properties.minor)
    if capability < MIN_CAPABILITY:
        return (
            f"the GPU {properties.name} has compute capability {'{}.{}'.format(*capability)}, "
            f"and kvpack's kernels need {'{}.{}'.format(*MIN_CAPABILITY)} or later"
        )
    shared = shared_memory_of(index)
    if shared < MIN_SHARED:
        return (
            f"the GPU {properties.name} has {shared >> 10} KiB of shared memory for a block, "
            f"and kvpack's kernels need {MIN_SHARED >> 10} KiB"
        )
    return None


def _properties(index: int) -> Any:
    import torch

    return torch.cuda.get_device_properties(index)

"""Arrays to a device, and products of halves there: cuBLAS through torch; on a stand-in for a GPU in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Tensor = torch.Tensor


def sent(array: NDArray[Any], device: str) -> Tensor:
    """A copy of an array (which may be read-only) in device memory, without waiting for what is under way there."""
    return torch.from_numpy(np.array(array, order="C")).to(device, non_blocking=True)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of halves, float32."""
    if a.is_cuda:
        found: Tensor = torch.mm(a, b, out_dtype=torch.float32)
        return found
    return a.float() @ b.float()


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * (a @ b)`` of halves, rounded to halves."""
    if a.is_cuda:
        return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)
    return (scale * (a.float() @ b.float())).half()


def add_product(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Add ``scale * (a @ b)`` of halves to halves, rows of which may lie apart."""
    if out.is_cuda:
        out.addmm_(a, b, alpha=scale)
    else:
        out.copy_(out.float() + scale * (a.float() @ b.float()))

"""Products of half-precision matrices with float32 sums: cuBLAS through torch; exact enough on a stand-in for a GPU."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


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

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


def product(out: Tensor, a: Tensor, b: Tensor, *, scale: float = 1, add: bool = False) -> None:
    """``scale * (a @ b)`` of halves into ``out``, float32 or halves, rows of which may lie apart; or added to it."""
    if not out.is_cuda:
        found = scale * (a.float() @ b.float())
        out.copy_(out.float() + found if add else found)
    elif out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=int(add), alpha=scale, out=out)
    else:
        out.addmm_(a, b, beta=int(add), alpha=scale)

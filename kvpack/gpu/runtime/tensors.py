"""Arrays sent to a device, and products of fp16 matrices there: by cuBLAS on a GPU, in float32 on a stand-in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Tensor = torch.Tensor


def sent(array: NDArray[Any], device: str) -> Tensor:
    """Return a copy of an array in device memory, with the same shape and dtype.

    The array may be read-only, and may be changed afterwards. Work that is under way on the device is not waited for.
    """
    return torch.from_numpy(np.array(array, order="C")).to(device, non_blocking=True)


def product(out: Tensor, a: Tensor, b: Tensor, *, scale: float = 1, add: bool = False) -> None:
    """Write ``scale * (a @ b)`` into ``out``, or with ``add`` add it to what is there; sums are float32.

    Args:
        out: float32 or fp16 ``[M, N]``; its rows may lie apart.
        a: fp16 ``[M, K]``.
        b: fp16 ``[K, N]``.
        scale: factor of the product.
        add: whether the product is added to ``out``.

    """
    if not out.is_cuda:
        found = scale * (a.float() @ b.float())
        out.copy_(out.float() + found if add else found)
    elif out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=int(add), alpha=scale, out=out)
    else:
        out.addmm_(a, b, beta=int(add), alpha=scale)

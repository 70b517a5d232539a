"""``dead_zone`` on a GPU: given the same coefficients and steps, the same codes as on the CPU, and the same values."""

from __future__ import annotations

import torch

from kvpack.stages.device.launch import Launcher

Tensor = torch.Tensor


def _grid(rows: int) -> tuple[int, int]:
    return -(-rows // 8), 1


def quantize(
    gpu: Launcher, z: Tensor, steps: Tensor, columns: Tensor, classes: Tensor, roundings: Tensor, faults: Tensor
) -> Tensor:
    """Zigzag codes int16 (the bits of uint16) ``[N, R]`` of coefficients float32 ``[N, R]``.

    ``steps`` float32 ``[N]`` are in the coefficients' unit. A code's class is ``(columns[r] - classes[n]) >> 3``,
    within the K ``roundings`` (float32): magnitudes are rounded down after adding its. ``faults`` int32 ``[U]``, for
    equal shares of the rows, are set where a magnitude is too large.
    """
    rows, dims = z.shape
    codes = torch.empty(rows, dims, dtype=torch.int16, device=gpu.device)
    gpu.launch("quantizers/dead_zone/codes:quantize", {}, _grid(rows), 256, 0, z, rows, rows // len(faults), dims,
               steps, columns, classes, len(roundings), roundings, codes, faults)  # fmt: skip
    return codes


def restore(
    gpu: Launcher,
    codes: Tensor,
    steps: Tensor,
    columns: Tensor,
    classes: Tensor,
    centroids: Tensor,
    predicted: Tensor | None,
    predicted_exponent: int,
    exponent: int,
) -> Tensor:
    """Values times ``2**exponent``, halves ``[N, R]``: magnitudes at their bins' centroids ``[K, 4]`` times steps.

    ``predicted`` float32 ``[N, R]``, times ``2**-predicted_exponent``, is added.
    """
    rows, dims = codes.shape
    out = torch.empty(rows, dims, dtype=torch.float16, device=gpu.device)
    gpu.launch("quantizers/dead_zone/codes:restore", {}, _grid(rows), 256, 0, codes, rows, dims, steps, columns,
               classes, len(centroids), centroids, predicted, -predicted_exponent, exponent, out)  # fmt: skip
    return out

"""The ``dead_zone`` quantizer on a GPU: the same coefficients and steps give the same codes and values as on the CPU.

In shapes, N is the number of rows, R the number of coefficients of a row, U the number of units whose rows follow each
other, and K the number of classes, each of which has a frequency table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Floats
from kvpack.codecs.chain.quantizers.dead_zone.reference import (
    THRESHOLDS,
    magnitude_costs,
    thresholds,
)
from kvpack.gpu.kernels.constants import DEAD_ZONE
from kvpack.gpu.runtime.launch import Launcher
from kvpack.gpu.runtime.requirements import MIN_SHARED
from kvpack.gpu.runtime.tensors import sent

Tensor = torch.Tensor

WARPS = DEAD_ZONE["ROW_WARPS"]
SHARED = 64 << 10
"""Most bytes of shared memory for the rows of a block, so that a multiprocessor has room for three blocks at once."""


@dataclass(frozen=True)
class Choices:
    """What codes are chosen by and restored with, in device memory.

    Attributes:
        wanted: float32 ``[K, THRESHOLDS]``, what a scaled magnitude must reach to be coded as 0, 1, 2, ...
        costs: int32 ``[K, 32]`` with the bits of uint32, what a magnitude of each bucket costs.
        centroids: float32 ``[K, 4]``, where in its bin a magnitude of 0, 1, 2, or 3 and more is restored.

    """

    wanted: Tensor
    costs: Tensor
    centroids: Tensor

    @classmethod
    def of(cls, tables: NDArray[Any], centroids: Floats, device: str) -> Choices:
        """Return the choices that follow from a profile's frequency tables and centroids, on the device."""
        costs = magnitude_costs(tables).astype(np.uint32).view(np.int32)
        return cls(sent(thresholds(tables, centroids), device), sent(costs, device), sent(centroids, device))

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory for the thresholds and costs."""
        return 4 * (self.wanted.numel() + self.costs.numel())


def supports(rank: int, tables: int, max_shared: int = MIN_SHARED) -> bool:
    """Whether the kernels take rows of ``rank`` coefficients, coded by so many tables.

    The tables and at least one row's magnitudes must fit into shared memory: into ``max_shared`` bytes, by default into
    what every GPU has that kvpack uses.
    """
    return 2 * rank + 4 * (THRESHOLDS + DEAD_ZONE["BUCKETS"]) * tables <= max_shared


def quantize(
    gpu: Launcher, z: Tensor, steps: Tensor, columns: Tensor, classes: Tensor, choices: Choices, faults: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize coefficients.

    A coefficient's class is ``(columns[r] - classes[n]) >> 3``, but never outside the K tables.

    Args:
        gpu: where the arrays are.
        z: float32 ``[N, R]``, the coefficients.
        steps: float32 ``[N]``, the width of a row's bins, in the coefficients' unit.
        columns: int32 ``[R]``.
        classes: int32 ``[N]``.
        choices: what codes are chosen by.
        faults: int32 ``[U]``, one for each of U equal shares of the rows; set to 1 where a magnitude is too large.

    Returns:
        Zigzag codes int16 ``[N, R]`` with the bits of uint16; shifts int32 ``[N]``; and int32 ``[N]``, the classes
        after these shifts.

    """
    rows, dims = z.shape
    codes = torch.empty(rows, dims, dtype=torch.int16, device=gpu.device)
    shifts, shifted = torch.empty(2, rows, dtype=torch.int32, device=gpu.device)
    room = min(SHARED, gpu.max_shared - choices.nbytes)
    warps = max(1, min(WARPS, room // (2 * dims)))
    gpu.launch("dead_zone/codes:quantize", {"PAIRS": 0}, (-(-rows // warps), 1), 32 * warps,
               choices.nbytes + 2 * dims * warps, z, rows, rows // len(faults), dims, steps, columns, classes,
               len(choices.wanted), choices.wanted, choices.costs, codes, shifts, shifted, faults)  # fmt: skip
    return codes, shifts, shifted


def restore(
    gpu: Launcher,
    codes: Tensor,
    steps: Tensor,
    columns: Tensor,
    classes: Tensor,
    choices: Choices,
    predicted: Tensor | None,
    predicted_exponent: int,
    exponent: int,
    common: int,
    groups: int,
) -> Tensor:
    """Return values times ``2**exponent``, fp16 ``[N, G * (common + own)]``.

    A value is the magnitude at its bin's centroid, times the row's step, plus its prediction. Of the R values of a row
    the first ``common`` are for all G groups, and the others are ``own`` values for each group. The result has the
    common values once for each group, before the group's own values.

    Args:
        gpu: where the arrays are.
        codes: int16 ``[N, R]`` with the bits of uint16, as :func:`quantize` returns them.
        steps: float32 ``[N]``, the width of a row's bins.
        columns: int32 ``[R]``.
        classes: int32 ``[N]``, after the shifts.
        choices: where in its bin a magnitude is restored.
        predicted: float32 ``[N, R]``, predictions times ``2**predicted_exponent``; or None.
        predicted_exponent: see ``predicted``.
        exponent: see above.
        common: number of the common values.
        groups: number of groups, G.

    """
    rows, dims = codes.shape
    out = torch.empty(rows, groups * common + dims - common, dtype=torch.float16, device=gpu.device)
    pairs = int(common % 2 == 0 and (dims - common) // groups % 2 == 0)
    gpu.launch("dead_zone/codes:restore", {"PAIRS": pairs}, (-(-rows // WARPS), 1), 32 * WARPS, 0, codes,
               rows, dims, steps, columns, classes, len(choices.centroids), choices.centroids, predicted,
               -predicted_exponent, exponent, common, groups, out)  # fmt: skip
    return out

"""``dead_zone`` on a GPU: given the same coefficients and steps, the same codes as on the CPU, and the same values."""

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
"""Bytes of shared memory a block has for rows, so that three are under way at once."""


@dataclass(frozen=True)
class Choices:
    """What codes are chosen by, and read at, in device memory: ``wanted`` float32 ``[K, THRESHOLDS]``, ``costs`` int32
    (the bits of uint32) ``[K, 32]`` and ``centroids`` float32 ``[K, 4]``.
    """  # fmt: skip

    wanted: Tensor
    costs: Tensor
    centroids: Tensor

    @classmethod
    def of(cls, tables: NDArray[Any], centroids: Floats, device: str) -> Choices:
        """From a profile's tables and centroids."""
        costs = magnitude_costs(tables).astype(np.uint32).view(np.int32)
        return cls(sent(thresholds(tables, centroids), device), sent(costs, device), sent(centroids, device))

    @property
    def nbytes(self) -> int:
        """Shared memory that what codes are chosen by takes."""
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
    """Zigzag codes int16 (the bits of uint16) ``[N, R]`` of coefficients float32 ``[N, R]``, and shifts int32 ``[N]``.

    ``steps`` float32 ``[N]`` are in the coefficients' unit. A code's class is ``(columns[r] - classes[n]) >> 3``; the
    third result are the ``classes`` that the shifts make of them. ``faults`` int32 ``[U]``, for equal shares of the
    rows, are set where a magnitude is too large.
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
    """Values times ``2**exponent``, halves ``[N, G * (common + own)]``: magnitudes at their centroids times steps.

    Of R coordinates the first are ``common``; a row has them once for each group, before the group's own share of the
    rest. ``predicted`` float32 ``[N, R]``, times ``2**-predicted_exponent``, is added.
    """
    rows, dims = codes.shape
    out = torch.empty(rows, groups * common + dims - common, dtype=torch.float16, device=gpu.device)
    pairs = int(common % 2 == 0 and (dims - common) // groups % 2 == 0)
    gpu.launch("dead_zone/codes:restore", {"PAIRS": pairs}, (-(-rows // WARPS), 1), 32 * WARPS, 0, codes,
               rows, dims, steps, columns, classes, len(choices.centroids), choices.centroids, predicted,
               -predicted_exponent, exponent, common, groups, out)  # fmt: skip
    return out

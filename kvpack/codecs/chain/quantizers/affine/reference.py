"""Affine quantisation of groups along an axis in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Codes, Floats

Halves = NDArray[np.float16]


def quantize(values: Floats, bits: int, axis: int, group: int) -> tuple[Codes, Halves, Halves]:
    """Quantize ``values`` ``[H, T, D]`` to codes of the same shape, a scale per group and a zero per group.

    Scales and zeros have the shape of ``values`` with ``axis`` divided by ``group``; the last group may be shorter.
    zero = min, scale = (max - min) / (2**bits - 1), and code = round((x - zero) / scale). Scale and zero are rounded
    to fp16 before codes are computed.
    """
    size = values.shape[axis]
    if values.size == 0:
        shape = list(values.shape)
        shape[axis] = -(-size // group)
        return np.zeros(values.shape, np.uint8), np.zeros(shape, np.float16), np.zeros(shape, np.float16)
    starts = np.arange(0, size, group)
    low = np.minimum.reduceat(values, starts, axis=axis)
    high = np.maximum.reduceat(values, starts, axis=axis)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scale = ((high - low) / np.float32(2**bits - 1)).astype(np.float16)
        zero = (low + np.float32(0)).astype(np.float16)  # Adding 0 turns -0 into 0.
        steps = _spread(scale, axis, group, size)
        steps = np.where(steps > 0, steps, np.float32(np.inf))
        codes = np.rint((values - _spread(zero, axis, group, size)) / steps)
        return np.clip(np.nan_to_num(codes), 0, 2**bits - 1).astype(np.uint8), scale, zero


def dequantize(codes: Codes, scale: Halves, zero: Halves, axis: int, group: int) -> Floats:
    """Undo :func:`quantize`; returns float32 ``[H, T, D]``."""
    size = codes.shape[axis]
    with np.errstate(over="ignore", invalid="ignore"):
        return codes.astype(np.float32) * _spread(scale, axis, group, size) + _spread(zero, axis, group, size)


def _spread(parameters: NDArray[Any], axis: int, group: int, size: int) -> Floats:
    """Repeat the parameter of each group along ``axis`` for each of its elements."""
    index = np.arange(size) // group
    return np.take(parameters, index, axis=axis).astype(np.float32)

"""Calibration of AQUA-KV (arXiv 2501.19392, section 3): predictors between layers, and the grids of HIGGS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Floats, Part
from kvpack.codecs.chain.predictors.cross_layer import CrossLayer
from kvpack.codecs.chain.quantizers.higgs import Higgs
from kvpack.codecs.context import DecodeContext
from kvpack.numerics.jit import njit

RIDGE = 1e-3
"""Ridge penalty, relative to the mean variance of the inputs."""

TRAINING_TOKENS = 8192


def gaussian_grid(points: int, seed: int = 0) -> Floats:
    """Return a grid that quantizes a pair of standard Gaussians with least squared error, ``[points, 2]`` float32.

    Lloyd's algorithm finds it from a seeded sample (HIGGS, arXiv 2411.17525, section 4.1).
    """
    random = np.random.Generator(np.random.PCG64(seed))
    pairs = random.standard_normal((1 << 16, 2))
    grid = pairs[:points].copy()
    for _ in range(60):
        _lloyd(pairs, grid)
    return grid.astype(np.float32)


@njit
def _lloyd(pairs: NDArray[Any], grid: NDArray[Any]) -> None:
    """Move each grid point to the mean of the pairs that are nearest to it."""
    sums, counts = np.zeros_like(grid), np.zeros(len(grid))
    for i in range(len(pairs)):
        best, nearest = np.inf, 0
        for k in range(len(grid)):
            distance = (pairs[i, 0] - grid[k, 0]) ** 2 + (pairs[i, 1] - grid[k, 1]) ** 2
            if distance < best:
                best, nearest = distance, k
        sums[nearest] += pairs[i]
        counts[nearest] += 1
    for k in range(len(grid)):
        if counts[k] > 0:
            grid[k] = sums[k] / counts[k]


def predictors(
    keys: Floats, values: Floats, quantizer: Higgs, grids: Mapping[str, NDArray[Any]], section: str
) -> dict[str, Floats]:
    """Return the predictors' weights and biases, from ridge regression layer by layer on the decoder's data.

    ``keys`` (before RoPE) and ``values`` are ``[L, N, C]``. Each layer is quantized with its new predictor, and its
    reconstruction is the input of the next layer's predictor, as in the paper.
    """
    found_keys, rebuilt_keys = _fit(keys, None, quantizer, grids, f"{section}.keys")
    found_values, _ = _fit(values, rebuilt_keys, quantizer, grids, f"{section}.values")
    return found_keys | found_values


def _fit(
    rows: Floats, reference: Floats | None, quantizer: Higgs, grids: Mapping[str, NDArray[Any]], section: str
) -> tuple[dict[str, Floats], Floats]:
    layers, tokens, channels = rows.shape
    inputs = channels if reference is None else 2 * channels
    weight = np.zeros((layers - 1, inputs, channels), np.float32)
    bias = np.zeros((layers - 1, channels), np.float32)
    profile = {**grids, f"{section}.weight": weight, f"{section}.bias": bias}
    predictor, rebuilt = CrossLayer(section), np.zeros_like(rows)
    whole = Part("F32", rows.shape, 0, tokens, context=DecodeContext(profile))
    for row in range(layers):
        if row:
            x = rebuilt[row - 1] if reference is None else np.concatenate([reference[row], rebuilt[row - 1]], axis=1)
            weight[row - 1], bias[row - 1] = _ridge(x, rows[row])
        expected = predictor.predict(row, rebuilt, reference, whole)
        one = Part("F32", (1, tokens, channels), 0, tokens, row=row, context=DecodeContext(profile))
        rebuilt[row] = (expected + quantizer.decode(quantizer.encode(rows[row : row + 1] - expected, one), one))[0]
    return {f"{section}.weight": weight, f"{section}.bias": bias}, rebuilt


def _ridge(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return the weight and bias with ``x @ weight + bias`` nearest to ``y``, rounded to fp16 as in a profile."""
    centre, target = x.mean(0, dtype=np.float64), y.mean(0, dtype=np.float64)
    inputs = x - centre
    gram = inputs.T @ inputs
    gram += RIDGE * gram.trace() / len(gram) * np.eye(len(gram))
    weight = np.linalg.solve(gram, inputs.T @ (y - target)).astype(np.float16).astype(np.float32)
    return weight, (target - centre @ weight).astype(np.float16).astype(np.float32)

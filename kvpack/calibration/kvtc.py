"""Calibration of KVTC (arXiv 2511.01815, section 3): a PCA of all layers' keys, one of all values, and bit plans."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Floats
from kvpack.numerics.jit import njit

GROUP_SIZES = np.array([1, 16, 64, 256, 1024])
BITS = np.array([2, 4, 8])
SIDE_BITS = 32
"""Bits of the shift and the scale of each token and group."""

SAMPLE_TOKENS = 128
"""Number of tokens on which the quantisation error is measured for the plans."""


@dataclass(frozen=True)
class Principal:
    """Mean ``[P]`` and orthonormal basis ``[P, P]``, both float32; the leading components come first."""

    mean: Floats
    basis: Floats


def principal_components(sample: Floats, device: str = "cpu") -> Principal:
    """Return the principal components of ``sample`` ``[N, P]``.

    They come from an eigendecomposition of the covariance, in O(N P^2 + P^3) time and O(P^2) memory.
    """
    data = torch.from_numpy(sample)
    mean = data.double().mean(0).float()
    covariance = torch.zeros(data.shape[1], data.shape[1], device=device)
    for rows in torch.split(data, 4096):
        centred = (rows - mean).to(device)
        covariance += centred.T @ centred
    vectors = torch.linalg.eigh(covariance / len(data)).eigenvectors.flip(1)
    return Principal(mean.numpy(), vectors.cpu().contiguous().numpy())


def plans(coefficients: Floats, rates: dict[str, float]) -> dict[str, NDArray[np.int32]]:
    """Return the best groups ``[G, 2]`` for each rate in bits per element: size and bits, in the order of components.

    ``coefficients`` ``[N, P]`` are samples in the basis. A plan minimizes the measured squared error within
    ``rate * P`` bits per token, side information included. Its groups have :data:`GROUP_SIZES` components, and each
    group is stored in :data:`BITS` or dropped. KVTC solves this by dynamic programming over components and budget.
    Here, a Lagrange multiplier replaces the budget, which gives the same plans on the convex hull of rate and error.
    """
    tokens, components = coefficients.shape
    chosen = coefficients[:: max(1, tokens // SAMPLE_TOKENS)][:SAMPLE_TOKENS]
    errors = np.empty((components, len(GROUP_SIZES), len(BITS)))
    _measure(np.ascontiguousarray(chosen.T, np.float64), GROUP_SIZES, BITS, errors)
    energy = np.concatenate([[0.0], np.cumsum(np.square(chosen, dtype=np.float64).mean(0))])
    return {name: _within(rate * components, errors, energy) for name, rate in rates.items()}


def _within(budget: float, errors: NDArray[Any], energy: NDArray[Any]) -> NDArray[np.int32]:
    """Return the plan of the smallest multiplier that keeps to the budget, by bisection of its logarithm."""
    low, high = -40.0, math.log(max(float(energy[-1]), 1e-30)) + 1
    best = _trimmed(_plan(errors, energy, math.exp(high), GROUP_SIZES, BITS, SIDE_BITS))
    for _ in range(60):
        middle = (low + high) / 2
        plan = _trimmed(_plan(errors, energy, math.exp(middle), GROUP_SIZES, BITS, SIDE_BITS))
        if sum(int(size) * int(bits) + SIDE_BITS for size, bits in plan if bits) <= budget:
            best, high = plan, middle
        else:
            low = middle
    return best


def _trimmed(plan: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the plan without the dropped groups at its end."""
    stored = np.flatnonzero(plan[:, 1])
    return plan[: stored[-1] + 1 if len(stored) else 0]


@njit
def _measure(data: NDArray[Any], sizes: NDArray[Any], bits: NDArray[Any], errors: NDArray[Any]) -> None:
    """Write the mean squared error per token of each run ``data[i : i + size]`` and number of bits into ``errors``."""
    components, tokens = data.shape
    for i in range(components):
        for s in range(len(sizes)):
            end = i + sizes[s]
            if end > components:
                errors[i, s, :] = np.inf
                continue
            errors[i, s, :] = 0.0
            for t in range(tokens):
                low = high = data[i, t]
                for k in range(i + 1, end):
                    low, high = min(low, data[k, t]), max(high, data[k, t])
                for b in range(len(bits)):
                    if high > low:
                        errors[i, s, b] += _error(data, i, end, t, low, high, bits[b])
            errors[i, s, :] /= tokens


@njit
def _error(data: NDArray[Any], start: int, end: int, t: int, low: float, high: float, bits: int) -> float:
    """Return the squared error of one group, stored as integers over its range or as E4M3 around its middle."""
    total = 0.0
    if bits < 8:
        step = (high - low) / (2**bits - 1)
        for k in range(start, end):
            x = (data[k, t] - low) / step
            total += (x - np.floor(x + 0.5)) ** 2
        return float(total * step * step)
    middle, scale = (low + high) / 2, (high - low) / 896
    for k in range(start, end):
        x = abs(data[k, t] - middle) / scale
        exponent = math.frexp(x)[1]
        step = math.ldexp(1.0, max(exponent - 4, -9))
        total += (x - np.floor(x / step + 0.5) * step) ** 2
    return float(total * scale * scale)


@njit
def _plan(
    errors: NDArray[Any], energy: NDArray[Any], multiplier: float, sizes: NDArray[Any], bits: NDArray[Any], side: int
) -> NDArray[np.int32]:
    """Return the groups ``[G, 2]`` that minimize error + multiplier * bits over all components."""
    components = len(errors)
    cost = np.empty(components + 1)
    choice = np.zeros((components, 2), np.int32)
    cost[components] = 0.0
    for i in range(components - 1, -1, -1):
        cost[i], choice[i, 0], choice[i, 1] = energy[i + 1] - energy[i] + cost[i + 1], 1, 0
        for s in range(len(sizes)):
            end = i + sizes[s]
            if end > components:
                continue
            for b in range(len(bits)):
                total = errors[i, s, b] + multiplier * (sizes[s] * bits[b] + side) + cost[end]
                if total < cost[i]:
                    cost[i], choice[i, 0], choice[i, 1] = total, sizes[s], bits[b]
    groups = np.empty((components, 2), np.int32)
    at = count = 0
    while at < components:
        if count > 0 and choice[at, 1] == 0 and groups[count - 1, 1] == 0:
            groups[count - 1, 0] += 1
        else:
            groups[count] = choice[at]
            count += 1
        at += choice[at, 0]
    return groups[:count].copy()

"""Tensor error: how far reconstructed keys or values lie from the original, element by element."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from kvpack.numerics.floats import Bits, to_float32

BLOCK = 1 << 19
"""The number of elements that are converted to float64 at a time."""


@dataclass(frozen=True)
class Reconstruction:
    """The error of one tensor, or of several merged.

    It is kept as float64 sums, so that merging the parts of a tensor gives the figures of the whole. Without elements
    there is no error, and the cosine is 1.

    Attributes:
        elements: The number of elements compared.
        energy: The sum of x^2 over the original's elements.
        error_energy: The sum of (x - y)^2; infinite where an element that is not finite differs.
        max_abs_error: The greatest |x - y|, in the tensor's own unit.
        cosine_sum: The sum over vectors of D times their cosine.
        bit_exact: Whether every bit pattern is the same.

    """

    elements: int = 0
    energy: float = 0.0
    error_energy: float = 0.0
    max_abs_error: float = 0.0
    cosine_sum: float = 0.0
    bit_exact: bool = True

    @property
    def nmse(self) -> float:
        """``sum (x - y)^2 / sum x^2``; 0 for no error, and inf for error where the original is all zero."""
        return ratio(self.error_energy, self.energy)

    @property
    def cosine(self) -> float:
        """The mean cosine of the vectors ``[h, t]``, weighted by their number of elements."""
        return self.cosine_sum / self.elements if self.elements else 1.0

    @classmethod
    def merge(cls, parts: Iterable[Reconstruction]) -> Reconstruction:
        """The figures of all parts together; parts are ranges of tokens, heads or layers."""
        parts = list(parts)
        return cls(
            sum(part.elements for part in parts),
            sum(part.energy for part in parts),
            sum(part.error_energy for part in parts),
            max((part.max_abs_error for part in parts), default=0.0),
            sum(part.cosine_sum for part in parts),
            all(part.bit_exact for part in parts),
        )


def ratio(error: float, reference: float) -> float:
    """``error / reference``; 0 for no error at all, and inf where there is error and no reference."""
    if error == 0.0:
        return 0.0
    return error / reference if reference else inf


def measure_reconstruction(original: Bits, other: Bits, dtype: str) -> Reconstruction:
    """Compare the bit patterns ``[H, T, D]`` of two tensors of ``dtype`` (``BF16``, ``F16`` or ``F32``).

    Elements that are not finite and have equal bits are no error and are left out of the sums. Where their bits
    differ, ``nmse`` and ``max_abs_error`` are infinite and the cosine of their vector is 0. Vectors that are zero on
    both sides have cosine 1, and vectors that are zero on one side have cosine 0.
    """
    if not original.size:
        return Reconstruction()  # whatever the lengths of its axes are
    heads, tokens, dims = original.shape
    step = max(1, BLOCK // dims)
    together = max(1, step // tokens)
    cuts = [
        (slice(head, head + together), slice(first, first + step))
        for head in range(0, heads, together)
        for first in range(0, tokens, step)
    ]
    return Reconstruction.merge(
        _block(original[cut].reshape(-1, dims), other[cut].reshape(-1, dims), dtype) for cut in cuts
    )


def _block(x_bits: Bits, y_bits: Bits, dtype: str) -> Reconstruction:
    """The figures of vectors ``[N, D]``."""
    with np.errstate(invalid="ignore"):
        x = to_float32(x_bits, dtype).astype(np.float64)
    finite = np.isfinite(x)
    if np.array_equal(x_bits, y_bits):
        x[~finite] = 0.0
        return Reconstruction(x.size, float(np.vdot(x, x)), cosine_sum=float(x.size))
    with np.errstate(invalid="ignore"):
        y = to_float32(y_bits, dtype).astype(np.float64)
    finite &= np.isfinite(y)
    lost = ~finite & (x_bits != y_bits)
    x[~np.isfinite(x)] = 0.0
    y[~finite] = 0.0
    difference = np.where(finite, x - y, 0.0)
    cosines = np.where(lost.any(axis=1), 0.0, _cosines(x, y))
    return Reconstruction(
        x.size,
        float(np.vdot(x, x)),
        inf if lost.any() else float(np.vdot(difference, difference)),
        inf if lost.any() else float(np.abs(difference).max(initial=0.0)),
        float(cosines.sum()) * x.shape[1],
        bit_exact=False,
    )


def _cosines(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cosine of each row of ``[N, D]`` with its counterpart, ``[N]``, within [-1, 1]."""
    xx, yy, xy = (np.einsum("nd,nd->n", a, b) for a, b in ((x, x), (y, y), (x, y)))
    norms = np.sqrt(xx * yy)
    cosines = np.divide(xy, norms, out=np.where(xx == yy, 1.0, 0.0), where=norms > 0)
    bounded: NDArray[np.float64] = np.clip(cosines, -1.0, 1.0)
    return bounded

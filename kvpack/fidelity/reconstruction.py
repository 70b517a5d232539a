"""How far a reconstructed tensor is from the original, element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.floats import to_float32

Bits = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Reconstruction:
    """Errors of a reconstruction y of x, kept as sums so that tensors can be merged.

    ``error`` and ``energy`` are the sums of (x - y)^2 and of x^2 over finite elements; ``cosines`` the sum over
    vectors [h, t] of the cosine between x and y. Non-finite elements that are bit-equal on both sides count as
    no error; others make every error infinite.
    """

    error: float
    energy: float
    max_abs_error: float
    cosines: float
    vectors: int
    bit_exact: bool

    @property
    def nmse(self) -> float:
        """Normalised mean squared error: error over energy, 0 where both are 0."""
        if self.error == 0:
            return 0.0
        return self.error / self.energy if self.energy else math.inf

    @property
    def cosine(self) -> float:
        """Mean cosine similarity of vectors; 1 where there are none."""
        return self.cosines / self.vectors if self.vectors else 1.0

    def to_json(self) -> dict[str, Any]:
        """Figures; an infinite one is null."""
        return {
            "nmse": finite(self.nmse),
            "max_abs_error": finite(self.max_abs_error),
            "cosine": finite(self.cosine),
            "bit_exact": self.bit_exact,
        }


def finite(value: float) -> float | None:
    """JSON has no infinity and no NaN: null stands for both."""
    return value if math.isfinite(value) else None


def compare_tensors(original: Bits, other: Bits, dtype: str) -> Reconstruction:
    """Compare bit patterns ``[H, T, D]`` of floats of ``dtype`` (BF16, F16, F32)."""
    same = original == other
    x, y = to_float32(original, dtype).astype(np.float64), to_float32(other, dtype).astype(np.float64)
    vectors = x.shape[0] * x.shape[1]
    sound = np.isfinite(x) & np.isfinite(y)
    if not (sound | same).all():
        return Reconstruction(math.inf, 0.0, math.inf, 0.0, vectors, bit_exact=False)
    x, y = np.where(sound, x, 0.0), np.where(sound, y, 0.0)
    difference = np.abs(x - y)
    return Reconstruction(
        error=float(np.square(difference).sum()),
        energy=float(np.square(x).sum()),
        max_abs_error=float(difference.max(initial=0.0)),
        cosines=float(_cosines(x, y).sum()),
        vectors=vectors,
        bit_exact=bool(same.all()),
    )


def _cosines(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine of each vector along the last axis; two zero vectors agree, one zero vector does not."""
    dot = (x * y).sum(-1)
    norms = np.sqrt(np.square(x).sum(-1)) * np.sqrt(np.square(y).sum(-1))
    equal = (x == y).all(-1)
    return np.where(equal, 1.0, dot / np.where(norms > 0, norms, 1.0))


def merge(parts: Sequence[Reconstruction]) -> Reconstruction:
    """The figures of several tensors together."""
    return Reconstruction(
        error=sum(p.error for p in parts),
        energy=sum(p.energy for p in parts),
        max_abs_error=max((p.max_abs_error for p in parts), default=0.0),
        cosines=sum(p.cosines for p in parts),
        vectors=sum(p.vectors for p in parts),
        bit_exact=all(p.bit_exact for p in parts),
    )

"""``rotation``: multiplies every vector by one seeded random rotation, the same for all tokens, heads and layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvpack.codecs.chain.base import Floats, Part, Transform
from kvpack.codecs.chain.random import rotation_matrix


@dataclass(frozen=True)
class Rotation(Transform):
    """Multiplies each vector of D dimensions by a Haar-random matrix (TurboQuant, algorithm 1, line 2)."""

    name: ClassVar[str] = "rotation"
    version: ClassVar[int] = 1

    seed: int

    def __post_init__(self) -> None:
        """Check the seed."""
        if not 0 <= self.seed < 1 << 63:
            raise ValueError("seed is 0 to 2**63 - 1")

    def forward(self, values: Floats, part: Part) -> Floats:
        """Return ``x @ R.T``, ``[H, T, D]``."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(values @ rotation_matrix(values.shape[-1], self.seed).T)

    def inverse(self, values: Floats, part: Part) -> Floats:
        """Return ``y @ R``, ``[H, T, D]``."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(values @ rotation_matrix(values.shape[-1], self.seed))

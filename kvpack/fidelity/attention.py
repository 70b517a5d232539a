"""The figures of attention fidelity, and the checks that queries fit a layer.

:mod:`kvpack.fidelity.meter` measures these figures, and ``docs/fidelity.md`` explains them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import FormatError
from kvpack.fidelity.reconstruction import ratio

Doubles = NDArray[np.float64]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Attention:
    """How attention over a reconstructed cache differs from attention over the original.

    A row of attention belongs to one query head and one probe query.

    Attributes:
        rows: The number of rows measured.
        kl: The mean over rows of KL(p || p^) in nats.
        kl_p99: The 99th percentile over rows of the same.
        topk_overlap: The mean share of a row's 16 most-attended tokens that stay among them. Where fewer than 16
            tokens are visible, all of them do.
        energy: The sum over rows of ||o||^2, of the outputs from the original.
        error_energy: The sum over rows of ||o - o^||^2.
        skipped: The number of rows left out because they are not finite in the original itself.

    """

    rows: int = 0
    kl: float = 0.0
    kl_p99: float = 0.0
    topk_overlap: float = 1.0
    energy: float = 0.0
    error_energy: float = 0.0
    skipped: int = 0

    @property
    def output_error(self) -> float:
        """The relative L2 error of the attention output, ``sqrt(sum ||o - o^||^2 / sum ||o||^2)``."""
        return sqrt(ratio(self.error_energy, self.energy))

    @classmethod
    def merge(cls, layers: Iterable[Attention]) -> Attention:
        """Summarise layers: the means of ``kl`` and ``topk_overlap``, the largest ``kl_p99``, and sums of the rest."""
        parts = [layer for layer in layers if layer.rows]
        if not parts:
            return cls()
        return cls(
            sum(part.rows for part in parts),
            sum(part.kl for part in parts) / len(parts),
            max(part.kl_p99 for part in parts),
            sum(part.topk_overlap for part in parts) / len(parts),
            sum(part.energy for part in parts),
            sum(part.error_energy for part in parts),
            sum(part.skipped for part in parts),
        )


class RowFigures(NamedTuple):
    """Figures of each measured row, arrays ``[N]``.

    They are KL in nats, the overlap of the most-attended tokens, ||o||^2, and ||o - o^||^2.
    """

    kl: Doubles
    overlap: Doubles
    energy: Doubles
    error: Doubles

    def summarise(self, asked: int) -> Attention:
        """The figures over all rows, of which ``asked`` were to be measured."""
        measured = self.kl.size
        if not measured:
            return Attention(skipped=asked)
        return Attention(
            measured,
            float(self.kl.mean()),
            float(np.quantile(self.kl, 0.99, method="higher")),
            float(self.overlap.mean()),
            float(self.energy.sum()),
            float(self.error.sum()),
            asked - measured,
        )


def require_fit(queries: Sequence[int], positions: NDArray[Any], keys: Shape, values: Shape) -> None:
    """Check that probe queries of shape ``[H_q, P, D]`` fit keys ``[H, T, D]`` and values ``[H, T, D_v]``.

    Raises:
        FormatError: The shapes do not belong together, or a position is not that of a token.

    """
    if len(keys) != 3 or len(values) != 3 or keys[:2] != values[:2]:
        raise FormatError(f"keys {list(keys)} and values {list(values)} are not of the same heads and tokens")
    if len(queries) != 3 or queries[2] != keys[2]:
        raise FormatError(f"queries {list(queries)} do not fit keys {list(keys)}: head_dim differs")
    if (queries[0] % keys[0]) if keys[0] else queries[0]:
        raise FormatError(f"{queries[0]} query heads are not a multiple of {keys[0]} key-value heads")
    if positions.shape != (queries[1],):
        shape = list(positions.shape)
        raise FormatError(f"{queries[1]} probe queries a head, but query positions of shape {shape}")
    if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < keys[1]:
        low, high = int(positions.min()), int(positions.max())
        raise FormatError(f"query positions {low} to {high} are not within the cache's {keys[1]} tokens")

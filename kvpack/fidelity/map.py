"""Where the loss is: errors of every layer at ranges of neighbouring tokens, for the heat maps of a page.

They come out of the same walk over the windows as the other figures, and only where somebody asks for them. Sums over
ranges are all that is kept, so memory does not depend on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.fidelity.attention import Doubles
from kvpack.numerics.floats import Bits, to_float32


@dataclass(frozen=True)
class Bins:
    """Ranges of ``width`` neighbouring tokens each, of which the last may be shorter.

    Attributes:
        tokens: The number of tokens of the longest tensor.
        width: The number of tokens in a range, at least 1.

    """

    tokens: int
    width: int

    @classmethod
    def of(cls, tokens: int, most: int) -> Bins:
        """Cut ``tokens`` tokens into at most ``most`` ranges of equal width."""
        return cls(tokens, max(1, -(-tokens // most)))

    @property
    def count(self) -> int:
        """The number of ranges."""
        return -(-self.tokens // self.width)

    def add(self, sums: Doubles, first: int, figures: NDArray[Any]) -> None:
        """Add figures ``[..., t]`` of the tokens from ``first`` on to the sums ``[..., count]`` of their ranges."""
        tokens = figures.shape[-1]
        if tokens:
            begin, end = first // self.width, (first + tokens - 1) // self.width + 1
            starts = np.maximum(np.arange(begin, end) * self.width - first, 0)
            sums[..., begin:end] += np.add.reduceat(figures, starts, axis=-1)


@dataclass(frozen=True)
class AttentionMap:
    """Where a layer's attention differs.

    Attributes:
        moved: For every range of tokens, how much attention moved to it or away from it: ``|P - P^|``, where P is the
            sum of the weights that a row gives to the range, as a mean over the rows that see the range. NaN where no
            row does.
        last: ``[G]``, the last position of every group of neighbouring probe queries, ascending.
        output: ``[G]``, the relative L2 error of the attention outputs of the queries in a group. NaN where none of
            its rows was measured.

    """

    moved: Doubles
    last: NDArray[np.int64]
    output: Doubles


@dataclass(frozen=True)
class LayerMap:
    """The errors of one layer by token: NMSE of keys and of values ``[B]``, NaN where there are no elements."""

    index: int
    keys: Doubles
    values: Doubles
    attention: AttentionMap | None


@dataclass(frozen=True)
class LossMap:
    """The errors of all layers, by ranges of tokens."""

    bins: Bins
    layers: tuple[LayerMap, ...]

    def to_json(self) -> dict[str, Any]:
        """The map as lists by layer; None where nothing was measured. Infinite errors stay infinite."""
        return {
            "tokens": self.bins.tokens,
            "bin_tokens": self.bins.width,
            "layers": [
                {
                    "index": layer.index,
                    "keys_nmse": _plain(layer.keys),
                    "values_nmse": _plain(layer.values),
                    "attention_moved": _plain(layer.attention.moved) if layer.attention else None,
                    "query_positions": layer.attention.last.tolist() if layer.attention else None,
                    "output_error": _plain(layer.attention.output) if layer.attention else None,
                }
                for layer in self.layers
            ],
        }


class TensorMap:
    """The error of one tensor by ranges of tokens, window by window."""

    def __init__(self, bins: Bins) -> None:
        """Begin without any tokens."""
        self._bins = bins
        self._energy, self._error = np.zeros(bins.count), np.zeros(bins.count)

    def add(self, first: int, original: Bits, other: Bits, dtype: str) -> None:
        """Take in the bit patterns ``[H, t, D]`` of both tensors from token ``first`` on.

        As in :func:`~kvpack.fidelity.reconstruction.measure_reconstruction`, an element that is not finite is left out
        where its bits are the same, and is an infinite error where they are not.
        """
        for ours, theirs in zip(original, other, strict=True):  # head by head, which is as much as is held in float64
            exact = np.array_equal(ours, theirs)
            x = to_float32(ours, dtype).astype(np.float64)
            finite = np.isfinite(x)
            x[~finite] = 0.0
            self._bins.add(self._energy, first, np.einsum("td,td->t", x, x))
            if exact:
                continue
            y = to_float32(theirs, dtype).astype(np.float64)
            finite &= np.isfinite(y)
            gaps = np.where(finite, x - np.where(finite, y, 0.0), 0.0)
            error = np.einsum("td,td->t", gaps, gaps)
            error[(~finite & (ours != theirs)).any(-1)] = np.inf
            self._bins.add(self._error, first, error)

    def result(self) -> Doubles:
        """The NMSE of every range ``[B]``, NaN where the original is zero or absent and there is no error."""
        found: Doubles = np.full_like(self._error, np.nan)
        np.divide(self._error, self._energy, out=found, where=self._energy > 0)
        found[(self._energy == 0) & (self._error > 0)] = np.inf
        return found


def map_attention(
    bins: Bins,
    positions: NDArray[np.int64],
    moved: Doubles,
    energy: Doubles,
    error: Doubles,
    measured: NDArray[np.bool_],
) -> AttentionMap:
    """Sum up a layer's rows of attention by token.

    Args:
        bins: The ranges of tokens.
        positions: ``[R]``, the position of each row's query.
        moved: ``[H, R, B]``, the attention that moved to each range or away from it.
        energy: ``[H, R]``, ||o||^2 of the outputs from the original.
        error: ``[H, R]``, ||o - o^||^2.
        measured: ``[H, R]``, the rows that count.

    """
    sees = positions[:, None] >= np.arange(bins.count) * bins.width
    rows = measured[..., None] & sees
    means = np.full(bins.count, np.nan)
    np.divide(np.where(rows, moved, 0.0).sum((0, 1)), rows.sum((0, 1)), out=means, where=rows.any((0, 1)))
    groups = [group for group in np.array_split(np.unique(positions), bins.count) if group.size]
    output = np.array([_relative(energy, error, measured & np.isin(positions, group)) for group in groups])
    return AttentionMap(means, np.array([group[-1] for group in groups], np.int64), output)


def _relative(energy: Doubles, error: Doubles, rows: NDArray[np.bool_]) -> float:
    """The root of error over energy of some rows; NaN without any."""
    lost, whole = float(error[rows].sum()), float(energy[rows].sum())
    if lost == 0.0:
        return 0.0 if rows.any() else float("nan")
    return float(np.sqrt(lost / whole)) if whole else float("inf")


def _plain(figures: Sequence[float] | Doubles) -> list[float | None]:
    """The figures as JSON has them, with None for NaN."""
    return [None if isnan(figure) else float(figure) for figure in figures]

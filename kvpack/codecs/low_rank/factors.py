"""Finds the two factors by singular value decomposition and rounds both with the same step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Floats, UnrepresentableError
from kvpack.codecs.chain.symbols import LARGEST
from kvpack.codecs.low_rank import cpu
from kvpack.codecs.low_rank.reference import bucket_costs
from kvpack.codecs.low_rank.tables import UNIT, tables

Array = NDArray[Any]

CUT = 1.0
"""Least root mean square of a direction's coefficients, in steps; weaker directions are dropped."""

BASIS_PRICE, COEFFICIENT_PRICE = 0.3, 0.0
"""Price of a bit in squared steps, in the basis and in the coefficients."""

RIDGE = 1e-4


@dataclass(frozen=True)
class Factor:
    """One rounded factor.

    Attributes:
        codes: ``[N, K]`` int32.
        columns: class of each column, ``[K]``.
        rows: what each row adds to the class of a column, ``[N]``.

    """

    codes: Array
    columns: Array
    rows: Array


def factorize(values: Floats, rows: Array, most: int) -> tuple[Factor, Factor]:
    """Return the basis ``[P, K]`` and the coefficients ``[T, K]`` of ``values`` ``[T, P]``; K is at least 1.

    All are in units of steps. ``rows`` ``[T]`` is what each token adds to the classes of its coefficients. What each
    element adds to the classes of the basis is from ``-most`` to ``most - 1``. The basis is rounded first; then the
    coefficients are fitted to the rounded basis.

    Raises:
        UnrepresentableError: Values are too large for the step.

    """
    with np.errstate(over="ignore", invalid="ignore"):
        found = _directions(values)
    spread = np.clip(_spreads(found), -most, most - 1)
    basis = _rounded(found, spread, BASIS_PRICE)
    live = (basis.codes != 0).any(0)
    live[0] |= not live.any()
    basis = Factor(np.ascontiguousarray(basis.codes[:, live]), basis.columns[live], spread)
    return basis, _rounded(_fitted(values, unit_columns(basis.codes)), rows, COEFFICIENT_PRICE)


def unit_columns(codes: Array) -> Floats:
    """Return ``codes`` ``[P, K]`` with each column divided by its norm."""
    norms = np.sqrt(np.square(codes.astype(np.float32)).sum(0, dtype=np.float64))
    return np.asarray(codes / np.maximum(norms, 1), np.float32)


def _directions(values: Floats) -> Floats:
    """Return the right singular vectors of ``values`` ``[T, P]`` times their singular values, ``[P, K]``."""
    tokens, size = values.shape
    wide = tokens <= size
    gram = values @ values.T if wide else values.T @ values
    if not np.isfinite(gram).all():
        raise UnrepresentableError("values too large for the step")
    energy, vectors = np.linalg.eigh(gram)
    live = energy > CUT**2 * min(tokens, size)
    live[-1] = True
    energy, vectors = np.maximum(energy[live][::-1], 0), vectors[:, live][:, ::-1]
    found = values.T @ vectors if wide else vectors * np.sqrt(energy)
    return np.ascontiguousarray(found, np.float32)


def _rounded(values: Floats, rows: Array, price: float) -> Factor:
    """Round ``values`` ``[N, K]`` to a factor.

    Codes are chosen with classes estimated from the scatter of each column. The class of a column is then the one that
    codes it in fewest bits.
    """
    if not (np.abs(values) <= LARGEST).all():
        raise UnrepresentableError("factors too large for the step")
    costs = bucket_costs(tables())
    scatter = np.sqrt(np.mean(np.square(values * np.exp2(-rows / 4)[:, None].astype(np.float32)), axis=0))
    columns = np.rint(UNIT + 4 * np.log2(np.maximum(scatter, 1e-6))).astype(np.int64)
    codes = cpu.choose(values, rows, columns, costs, price)
    return Factor(codes, cpu.column_costs(codes, rows, costs).argmin(1), rows)


def _fitted(values: Floats, basis: Floats) -> Floats:
    """Return coefficients ``[T, K]`` whose product with ``basis`` ``[P, K]`` is nearest to ``values`` ``[T, P]``."""
    gram = basis.T @ basis + RIDGE * np.eye(basis.shape[1], dtype=np.float32)
    return np.ascontiguousarray(np.linalg.solve(gram, (values @ basis).T).T, np.float32)


def _spreads(values: Floats) -> Array:
    """Return the scatter ``[N]`` of each row of ``values`` ``[N, K]`` relative to the others, in quarter octaves."""
    deviation = np.sqrt(np.maximum(np.mean(np.square(values), axis=0), 1e-30))
    own = np.sqrt(np.mean(np.square(values / deviation), axis=1))
    found: Array = np.rint(4 * np.log2(np.maximum(own, 1e-6))).astype(np.int64)
    return found

"""Finds the factors: a singular value decomposition, both sides rounded with the same step."""

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
"""Directions whose coefficients scatter by less than this many steps are left out."""

BASIS_PRICE, COEFFICIENT_PRICE = 0.3, 0.0
"""Squared steps that a bit must save, in either factor."""

RIDGE = 1e-4


@dataclass(frozen=True)
class Factor:
    """Codes ``[N, K]`` int32, the class of each column ``[K]``, and how much each row adds to it ``[N]``."""

    codes: Array
    columns: Array
    rows: Array


def factorize(values: Floats, rows: Array, most: int) -> tuple[Factor, Factor]:
    """Basis ``[P, K]`` and coefficients ``[T, K]`` for ``values`` ``[T, P]``, all in steps; K is at least 1.

    ``rows`` ``[T]`` is what each token adds to its coefficients' classes; the basis's own are within ``most``. The
    basis is rounded first, and the coefficients are fitted to what it became.

    Raises:
        UnrepresentableError: values too large for the step.

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
    """``codes`` ``[P, K]`` as directions: each column divided by its norm."""
    norms = np.sqrt(np.square(codes.astype(np.float32)).sum(0, dtype=np.float64))
    return np.asarray(codes / np.maximum(norms, 1), np.float32)


def _directions(values: Floats) -> Floats:
    """``[P, K]``: the right singular vectors of ``values`` ``[T, P]`` times their singular values."""
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
    """``values`` ``[N, K]`` as codes, chosen by the classes of their scatter; then classes by what they cost."""
    if not (np.abs(values) <= LARGEST).all():
        raise UnrepresentableError("factors too large for the step")
    costs = bucket_costs(tables())
    scatter = np.sqrt(np.mean(np.square(values * np.exp2(-rows / 4)[:, None].astype(np.float32)), axis=0))
    columns = np.rint(UNIT + 4 * np.log2(np.maximum(scatter, 1e-6))).astype(np.int64)
    codes = cpu.choose(values, rows, columns, costs, price)
    return Factor(codes, cpu.column_costs(codes, rows, costs).argmin(1), rows)


def _fitted(values: Floats, basis: Floats) -> Floats:
    """Coefficients ``[T, K]`` whose product with ``basis`` ``[P, K]`` is nearest to ``values`` ``[T, P]``."""
    gram = basis.T @ basis + RIDGE * np.eye(basis.shape[1], dtype=np.float32)
    return np.ascontiguousarray(np.linalg.solve(gram, (values @ basis).T).T, np.float32)


def _spreads(values: Floats) -> Array:
    """How widely each row of ``values`` ``[N, K]`` scatters beside the others, in quarter octaves."""
    deviation = np.sqrt(np.maximum(np.mean(np.square(values), axis=0), 1e-30))
    own = np.sqrt(np.mean(np.square(values / deviation), axis=1))
    found: Array = np.rint(4 * np.log2(np.maximum(own, 1e-6))).astype(np.int64)
    return found

"""``higgs``: rotates vectors randomly and quantizes pairs of coordinates to the nearest point of a Gaussian grid.

This is HIGGS (arXiv 2411.17525) as AQUA-KV uses it (arXiv 2501.19392), with one norm per vector. The grids have 2
dimensions and 16, 64 or 256 points; the first layer always has 256. A seeded Haar rotation replaces the Hadamard
transform, because a vector's length need not be a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Codes, Floats, Part, PlaneSpec, Quantizer, UnrepresentableError
from kvpack.codecs.chain.quantizers.float_split import join, split, split_planes
from kvpack.codecs.chain.random import rotation_matrix
from kvpack.codecs.context import NO_HINTS, StackHints
from kvpack.codecs.protocol import Need
from kvpack.errors import MismatchError
from kvpack.numerics.jit import njit

FIRST_BITS = 4


@dataclass(frozen=True)
class Higgs(Quantizer):
    """HIGGS quantizer with 4 bits per element in the first row and ``bits`` bits (2 to 4) in the others.

    It uses the profile's grids ``higgs.{4**bits}`` ``[4**bits, 2]``.
    """

    name: ClassVar[str] = "higgs"
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROFILE})

    bits: int
    seed: int

    def __post_init__(self) -> None:
        """Check the configuration."""
        if not 2 <= self.bits <= FIRST_BITS or not 0 <= self.seed < 1 << 63:
            raise ValueError("bits is 2 to 4 and seed not negative")

    def planes(self, part: Part) -> list[PlaneSpec]:
        """Return the planes ``first`` for row 0, ``codes`` for the other rows, and the norms."""
        rows, tokens, dims = part.shape
        pairs = (dims + 1) // 2
        first = int(part.row == 0 and rows > 0)
        return [
            PlaneSpec("first", (first, tokens, pairs), 2 * FIRST_BITS),
            PlaneSpec("codes", (rows - first, tokens, pairs), 2 * self.bits),
            *split_planes("F16", (rows, tokens, 1), "norm/"),
        ]

    def encode(self, data: NDArray[Any], part: Part, hints: StackHints = NO_HINTS) -> list[Codes]:
        """Quantize float32 values ``[H, T, D]`` to planes.

        Raises:
            UnrepresentableError: fp16 cannot represent the norm of a vector.

        """
        dims = part.shape[2]
        with np.errstate(over="ignore", invalid="ignore"):
            norm = np.sqrt(np.square(data).sum(-1, keepdims=True)).astype(np.float16)
        if not np.isfinite(norm).all():
            raise UnrepresentableError("vector norms beyond fp16")
        unit = data / np.where(norm > 0, norm, np.float16(1)).astype(np.float32)
        turned = (unit @ rotation_matrix(dims, self.seed).T) * np.float32(np.sqrt(dims))
        pairs = np.ascontiguousarray(np.pad(turned, ((0, 0), (0, 0), (0, dims % 2))), np.float32)
        pairs = pairs.reshape(*part.shape[:2], (dims + 1) // 2, 2)
        codes = []
        for rows, grid in self._split(pairs, part):
            found = np.zeros(rows.shape[:-1], np.uint8)
            _nearest(rows.reshape(-1, 2), grid, found.reshape(-1))
            codes.append(found)
        return [*codes, *split(norm.view(np.uint16), "F16")]

    def decode(self, codes: list[Codes], part: Part) -> Floats:
        """Return the values, float32 ``[H, T, D]``."""
        dims = part.shape[2]
        norm = join(codes[2:4], "F16").view(np.float16).astype(np.float32)
        grids = [grid for _, grid in self._split(np.zeros((part.shape[0], 0)), part)]
        pairs = np.concatenate([grid[plane] for grid, plane in zip(grids, codes[:2], strict=True)])
        turned = pairs.reshape(*part.shape[:2], dims + dims % 2)[..., :dims]
        with np.errstate(over="ignore", invalid="ignore"):
            unit = (turned / np.float32(np.sqrt(max(dims, 1)))) @ rotation_matrix(dims, self.seed)
            return np.asarray(unit * norm, np.float32)

    def _split(self, rows: NDArray[Any], part: Part) -> list[tuple[NDArray[Any], Floats]]:
        """Return row 0 and the other rows, each with its grid."""
        first = int(part.row == 0 and len(rows) > 0)
        parts = ((rows[:first], FIRST_BITS), (rows[first:], self.bits))
        return [(some, _grid(part, bits)) for some, bits in parts]


def _grid(part: Part, bits: int) -> Floats:
    grid = part.floats(f"higgs.{4**bits}", 4**bits, 2)
    if not np.isfinite(grid).all():
        raise MismatchError(f"the profile's higgs.{4**bits} has points that are not finite: calibrate again")
    return grid


@njit
def _nearest(pairs: NDArray[Any], grid: NDArray[Any], codes: NDArray[Any]) -> None:
    """Write the index of the nearest grid point of each pair into ``codes``; ties take the first point."""
    for i in range(pairs.shape[0]):
        best = np.inf
        for k in range(grid.shape[0]):
            x, y = pairs[i, 0] - grid[k, 0], pairs[i, 1] - grid[k, 1]
            distance = x * x + y * y
            if distance < best:
                best = distance
                codes[i] = k

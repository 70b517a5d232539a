"""Packs a profile's matrices as ``rans`` streams: the profile itself is quantised and entropy-coded.

The G * S rows of a matrix are split into G groups of S consecutive rows, and each group has one step per column. The
profile holds ``{name}.step`` ``[G, C]`` float32, ``{name}.codes`` (a ``rans`` stream as uint8) and ``{name}.rows``
(the number of rows). The values are ``(code - 128) * step``, ``[G * S, C]``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Floats, Part, PlaneSpec
from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.errors import CorruptError, MismatchError
from kvpack.numerics.jit import njit

_MIDDLE = 128
_ROUNDS = 2


def pack_matrix(matrix: Floats, step: Floats, price: float = 0.0) -> dict[str, NDArray[Any]]:
    """Pack ``matrix`` ``[G * S, C]`` with positive steps ``step`` ``[G, C]``; codes are clipped to a byte.

    Each value gets either the nearest code or the next one towards zero: the one with the lower cost. The cost is the
    squared error in steps plus ``price`` per bit. Bits are estimated from the current codes of the same column and
    group.
    """
    groups, columns = step.shape
    blocks = matrix.reshape(groups, -1, columns) / step[:, None]
    codes = np.clip(np.rint(blocks) + _MIDDLE, 0, 255).astype(np.uint8)
    for _ in range(_ROUNDS if price else 0):
        _towards_zero(blocks, codes, price)
    stream = Rans().encode(codes, PlaneSpec("", codes.shape, 8))
    return {"step": step.astype(np.float32), "codes": np.frombuffer(stream, np.uint8), "rows": _ints(matrix.shape[0])}


@njit
def _towards_zero(blocks: Floats, codes: NDArray[np.uint8], price: float) -> None:
    """Run one round of the choice that :func:`pack_matrix` makes, over ``[G, S, C]``; updates ``codes``."""
    groups, rows, columns = codes.shape
    for g in range(groups):
        counts = np.full((columns, 256), 0.02)
        for s in range(rows):
            for c in range(columns):
                counts[c, codes[g, s, c]] += 1
        bits = -np.log2(counts / (rows + 0.02 * 256))
        for s in range(rows):
            for c in range(columns):
                value = blocks[g, s, c]
                near = min(max(np.rint(value) + _MIDDLE, 0), 255)
                if near != _MIDDLE:
                    less = near - 1 if near > _MIDDLE else near + 1
                    cost = (value - (near - _MIDDLE)) ** 2 + price * bits[c, int(near)]
                    other = (value - (less - _MIDDLE)) ** 2 + price * bits[c, int(less)]
                    codes[g, s, c] = np.uint8(less if other < cost else near)


def _ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


MOST_PER_BYTE = 1 << 10
"""The most elements that a packed matrix may have for each byte of it, so that a tiny profile stays small in memory."""


def unpack_matrix(part: Part, name: str) -> Floats:
    """Return the matrix ``name`` of the part's profile, ``[G * S, C]`` float32.

    Raises:
        MismatchError: The profile does not have it, or it does not decode.

    """
    step, codes = part.floats(f"{name}.step", None, None), part.octets(f"{name}.codes")
    count = int(part.integers(f"{name}.rows", 1, least=1, most=1 << 24)[0])
    if not step.size or count % len(step) or count * step.shape[1] > MOST_PER_BYTE * (len(codes) + step.nbytes):
        raise MismatchError(f"the profile's {name!r} is not a packed matrix")
    shape = (len(step), count // len(step), step.shape[1])
    try:
        found = Rans().decode(memoryview(codes.tobytes()), PlaneSpec("", shape, 8))
    except CorruptError as error:
        raise MismatchError(f"the profile's {name!r}: {error}") from None
    with np.errstate(over="ignore", invalid="ignore"):
        values = (found.astype(np.float32) - _MIDDLE) * step[:, None]
    if not np.isfinite(values).all():
        raise MismatchError(f"the profile's {name!r} has elements that are not finite: calibrate again")
    return np.ascontiguousarray(values.reshape(count, -1))

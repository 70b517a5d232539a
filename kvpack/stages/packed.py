"""Matrices of a profile as ``rans`` streams: what a codec learns is itself quantised and entropy-coded.

``{name}.step`` ``[G, C]`` float32 and ``{name}.codes`` uint8 bytes: groups of consecutive rows, each with a step a
column; values are ``(code - 128) * step``, rows ``[G * S, C]``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import CorruptError, MismatchError
from kvpack.stages.base import Floats, Part, PlaneSpec
from kvpack.stages.entropy.rans import Rans

_MIDDLE = 128


def pack_matrix(matrix: Floats, step: Floats) -> dict[str, NDArray[Any]]:
    """``step`` ``[G, C]`` of positive numbers; ``matrix`` ``[G * S, C]``. Codes are clipped to a byte."""
    groups, columns = step.shape
    blocks = matrix.reshape(groups, -1, columns)
    codes = np.clip(np.rint(blocks / step[:, None]) + _MIDDLE, 0, 255).astype(np.uint8)
    stream = Rans().encode(codes, PlaneSpec("", codes.shape, 8))
    return {"step": step.astype(np.float32), "codes": np.frombuffer(stream, np.uint8), "rows": _ints(matrix.shape[0])}


def _ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def unpack_matrix(part: Part, name: str) -> Floats:
    """The matrix of the part's profile of that name.

    Raises:
        MismatchError: it is not there, or does not decode.

    """
    step, codes, rows = (part.array(f"{name}.{field}") for field in ("step", "codes", "rows"))
    count = int(rows[0]) if rows.shape == (1,) else 0
    sound = step.ndim == 2 and step.size and codes.dtype == np.uint8
    if not sound or not 1 <= count <= 1 << 24 or count % len(step):
        raise MismatchError(f"the profile's {name!r} is not a packed matrix")
    shape = (len(step), count // len(step), step.shape[1])
    try:
        found = Rans().decode(memoryview(codes.tobytes()), PlaneSpec("", shape, 8))
    except CorruptError as error:
        raise MismatchError(f"the profile's {name!r}: {error}") from None
    values = (found.astype(np.float32) - _MIDDLE) * step[:, None]
    return np.ascontiguousarray(values.reshape(count, -1))

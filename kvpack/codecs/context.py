"""What is known of a cache beside its keys and values: to everybody, and to the encoder alone.

Neither inherits from the other: what decodes is never given hints, so that nothing which the file does not hold can
decide how it is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class DecodeContext:
    """What the encoder and the decoder both know.

    ``profile`` holds the arrays of a calibration profile by name. ``tokens`` ``[N]`` int32 are the token ids of the
    text from its first token on, at least through the rows that are coded. Either may be None.
    """

    profile: Mapping[str, NDArray[Any]] | None = None
    tokens: NDArray[np.int32] | None = None


@dataclass(frozen=True, eq=False)
class Hints:
    """What the encoder alone knows; what it decides by them stands in the file.

    ``mass`` ``[T]`` float32 is each token's attention mass, the mean over layers and heads. ``frequencies`` ``[N]``
    float32 are the radians a position by which RoPE turned dimensions i and i + N of keys. ``weights`` say by tensor,
    ``[H, D]`` float32, how much an error of each element matters. Any of them may be None.
    """

    mass: Floats | None = None
    frequencies: Floats | None = None
    weights: Mapping[str, Floats] | None = None


@dataclass(frozen=True, eq=False)
class StackHints:
    """The hints for one array that is coded: as :class:`Hints`, but ``weights`` are of its rows, ``[R, D]``."""

    mass: Floats | None = None
    frequencies: Floats | None = None
    weights: Floats | None = None


NO_HINTS = StackHints()

"""What is known of a cache besides its keys and values: to encoder and decoder, or to the encoder alone.

Neither class inherits from the other. A decoder is never given hints, so decoding can depend only on what the file
holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.model import LanguageModel, Replay

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class DecodeContext:
    """What the encoder and the decoder both know.

    ``profile`` holds the arrays of a calibration profile by name. ``tokens`` ``[N]`` int32 are the token ids of the
    text from its first token on, at least up to the last coded row. ``model`` is the language model that made the
    cache, and ``replay`` is the cache as that model computes it again. Any of them may be None.
    """

    profile: Mapping[str, NDArray[Any]] | None = None
    tokens: NDArray[np.int32] | None = None
    model: LanguageModel | None = None
    replay: Replay | None = None


@dataclass(frozen=True, eq=False)
class Hints:
    """What only the encoder knows. The file stores what the encoder decides from it.

    ``mass`` ``[T]`` float32 is each token's attention mass, the mean over layers and heads. ``frequencies`` ``[N]``
    float32 are the radians a position by which RoPE rotated dimensions i and i + N of keys. ``weights``, by tensor,
    ``[H, D]`` float32, say how much an error of each element matters. Any of them may be None.
    """

    mass: Floats | None = None
    frequencies: Floats | None = None
    weights: Mapping[str, Floats] | None = None


@dataclass(frozen=True, eq=False)
class StackHints:
    """The hints for one coded array, as in :class:`Hints`, but with ``weights`` of the array's rows, ``[R, D]``."""

    mass: Floats | None = None
    frequencies: Floats | None = None
    weights: Floats | None = None


NO_HINTS = StackHints()

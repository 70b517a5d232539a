"""Relative weights of errors of the elements, from probe queries if there are any, else from the part itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Floats, Part

KEYS_BESIDE_VALUES = 2**0.5
"""Without probes: weight of a relative error of the keys over that of a layer's values, by trial (docs/fisher.md)."""

LEAST = 1e-90

ROWS = 8
"""Rows whose variance is computed at a time, to save memory."""


def element_weights(data: Floats, part: Part, weights: Floats | None) -> NDArray[np.float64]:
    """Return the weights ``[R, D]`` of the elements of ``data`` ``[R, T, D]``.

    The weighted elements have variance 1 on average. If the side information of the part has no weights, all keys have
    one weight, because logits add their errors without scaling, and the values of each layer have one weight.
    """
    tokens = max(part.shape[1], 1)
    energy: NDArray[np.float64] = np.empty((part.shape[0], part.shape[2]))
    for first in range(0, len(data), ROWS):
        some = data[first : first + ROWS]
        mean = some.mean(1, dtype=np.float64)
        energy[first : first + ROWS] = some.var(1, dtype=np.float64) + np.square(mean) / tokens
    found = None if weights is None else weights.astype(np.float64)
    if found is None:
        layers = energy.reshape(-1, max(part.heads, 1) * part.shape[2])
        each = np.maximum(layers.mean(1), LEAST).repeat(max(part.heads, 1))
        each[: part.keys] = max(float(energy[: part.keys].mean()), LEAST) / KEYS_BESIDE_VALUES**2 if part.keys else 1
        found = np.broadcast_to(each[:, None] ** -0.5, energy.shape)
    return np.asarray(found / np.sqrt(max(float(np.mean(energy * np.square(found))), LEAST)), np.float64)

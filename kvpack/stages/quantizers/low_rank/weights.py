"""How much an error of each element matters, beside the others: what probes tell, else what the part itself does."""

from __future__ import annotations

import numpy as np

from kvpack.stages.base import Floats, Part


def element_weights(data: Floats, part: Part, pairs: int) -> Floats:
    """Weights ``[R, D]``, in which a part's elements have variance 1 on average.

    ``data`` ``[R, T, D]``, keys before RoPE; its leading ``pairs`` are dimensions i and i + ``pairs``, which share a
    weight because RoPE turns them into each other. Without probes an error of a key counts as such, an
    error of a value beside its layer's deviation.
    """
    rows = part.shape[0]
    centred = data - data.mean(1, keepdims=True) if data.size else data
    energy = np.mean(np.square(centred, dtype=np.float32), axis=1, dtype=np.float64) if data.size else data[:, 0]
    found = part.side.weights
    if found is None or found.shape != energy.shape:
        layers = energy.reshape(rows // max(part.heads, 1), -1)
        each = np.ones_like(layers) * np.maximum(layers.mean(1, keepdims=True), 1e-30)
        each = each.reshape(energy.shape)
        each[: part.keys] = max(energy[: part.keys].mean(), 1e-30) if part.keys else 1
        found = each**-0.5
    found = np.maximum(found, 1e-12 * found.max(initial=1e-30))
    mean = float(np.mean(energy * np.square(found))) if energy.size else 1.0
    return np.asarray(found / max(mean, 1e-30) ** 0.5, np.float64).astype(np.float32)

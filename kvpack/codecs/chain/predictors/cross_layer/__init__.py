"""``cross_layer``: each layer from what was decoded of others, by linear regression (AQUA-KV, arXiv 2501.19392).

Keys of a layer from the previous layer's keys; values from this layer's keys and the previous layer's values.
Inputs are the decoder's own reconstructions, so that errors do not pile up unseen (the paper, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvpack.codecs.chain.base import Floats, Part, Predictor
from kvpack.codecs.protocol import Need, Scope
from kvpack.errors import MismatchError


@dataclass(frozen=True)
class CrossLayer(Predictor):
    """With the profile's ``{section}.weight`` ``[L - 1, I, C]`` and ``{section}.bias`` ``[L - 1, C]``.

    I is C for keys and 2 C for values (keys first). Layer 0 is predicted to be zero.
    """

    name: ClassVar[str] = "cross_layer"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROFILE})
    scope: ClassVar[Scope] = Scope.KIND

    section: str

    def predict(self, row: int, rows: Floats, reference: Floats | None, part: Part) -> Floats:
        """``inputs @ weight + bias``; ``[1, T, C]``."""
        layers, tokens, channels = part.shape
        weight, bias = part.array(f"{self.section}.weight"), part.array(f"{self.section}.bias")
        inputs = channels if reference is None else 2 * channels
        if weight.shape != (layers - 1, inputs, channels) or bias.shape != (layers - 1, channels):
            raise MismatchError(f"the profile is for other layers than this cache's {layers} of {channels} channels")
        if row == 0:
            return np.zeros((1, tokens, channels), np.float32)
        x = rows[row - 1] if reference is None else np.concatenate([reference[row], rows[row - 1]], axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(x @ weight[row - 1] + bias[row - 1])[None]

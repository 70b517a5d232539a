"""``cross_layer``: predicts each layer from decoded data by linear regression (AQUA-KV, arXiv 2501.19392).

The keys of a layer are predicted from the keys of the previous layer. Its values are predicted from its keys and
from the values of the previous layer. The inputs are the decoder's own reconstructions, so that the encoder sees
errors accumulate (section 3.2 of the paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvpack.codecs.chain.base import Floats, Part, Predictor
from kvpack.codecs.protocol import Need, Scope


@dataclass(frozen=True)
class CrossLayer(Predictor):
    """Linear prediction of each layer.

    It uses the profile's ``{section}.weight`` ``[L - 1, I, C]`` and ``{section}.bias`` ``[L - 1, C]``. The number of
    inputs I is C for keys and 2 * C for values (keys first). The prediction of layer 0 is zero.
    """

    name: ClassVar[str] = "cross_layer"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROFILE})
    scope: ClassVar[Scope] = Scope.KIND

    section: str

    def predict(self, row: int, rows: Floats, reference: Floats | None, part: Part) -> Floats:
        """Return ``inputs @ weight + bias``, ``[1, T, C]``."""
        layers, tokens, channels = part.shape
        inputs = channels if reference is None else 2 * channels
        weight = part.floats(f"{self.section}.weight", layers - 1, inputs, channels)
        bias = part.floats(f"{self.section}.bias", layers - 1, channels)
        if row == 0:
            return np.zeros((1, tokens, channels), np.float32)
        x = rows[row - 1] if reference is None else np.concatenate([reference[row], rows[row - 1]], axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(x @ weight[row - 1] + bias[row - 1])[None]

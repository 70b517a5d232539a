"""``merge_heads``: concatenates the heads of each layer, so that a row is a layer and a vector holds all its heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from kvpack.codecs.chain.base import Floats, Part, Transform
from kvpack.codecs.protocol import Scope


@dataclass(frozen=True)
class MergeHeads(Transform):
    """Permutes ``[L * H, T, D]`` to ``[L, T, H * D]``, without arithmetic."""

    name: ClassVar[str] = "merge_heads"
    version: ClassVar[int] = 1
    scope: ClassVar[Scope] = Scope.KIND

    def output(self, part: Part) -> Part:
        """Return the description with one row per layer."""
        rows, tokens, dims = part.shape
        heads = max(part.heads, 1)
        return replace(part, shape=(rows // heads, tokens, heads * dims), heads=1)

    def forward(self, values: Floats, part: Part) -> Floats:
        """Return ``[L, T, H * D]``: the heads of each layer concatenated."""
        rows, tokens, dims = part.shape
        split = values.reshape(rows // max(part.heads, 1), max(part.heads, 1), tokens, dims)
        return np.ascontiguousarray(split.transpose(0, 2, 1, 3)).reshape(self.output(part).shape)

    def inverse(self, values: Floats, part: Part) -> Floats:
        """Return ``[L * H, T, D]``: the heads as separate rows again."""
        rows, tokens, dims = part.shape
        split = values.reshape(rows // max(part.heads, 1), tokens, max(part.heads, 1), dims)
        return np.ascontiguousarray(split.transpose(0, 2, 1, 3)).reshape(part.shape)

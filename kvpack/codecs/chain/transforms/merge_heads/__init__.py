"""``merge_heads``: a stack's heads side by side, so that one row is one layer and one vector all its heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from kvpack.codecs.chain.base import Floats, Part, Transform
from kvpack.codecs.protocol import Scope


@dataclass(frozen=True)
class MergeHeads(Transform):
    """``[L * H, T, D]`` to ``[L, T, H * D]``: a permutation, no arithmetic."""

    name: ClassVar[str] = "merge_heads"
    version: ClassVar[int] = 1
    scope: ClassVar[Scope] = Scope.KIND

    def output(self, part: Part) -> Part:
        """One row a layer."""
        rows, tokens, dims = part.shape
        heads = max(part.heads, 1)
        return replace(part, shape=(rows // heads, tokens, heads * dims), heads=1)

    def forward(self, values: Floats, part: Part) -> Floats:
        """Heads of a layer side by side."""
        rows, tokens, dims = part.shape
        split = values.reshape(rows // max(part.heads, 1), max(part.heads, 1), tokens, dims)
        return np.ascontiguousarray(split.transpose(0, 2, 1, 3)).reshape(self.output(part).shape)

    def inverse(self, values: Floats, part: Part) -> Floats:
        """Heads one after another again."""
        rows, tokens, dims = part.shape
        split = values.reshape(rows // max(part.heads, 1), tokens, max(part.heads, 1), dims)
        return np.ascontiguousarray(split.transpose(0, 2, 1, 3)).reshape(part.shape)

"""``anchor_delta``: codes an anchor every few tokens, and other tokens as differences from their anchor.

This is the quantizer of CacheGen (arXiv 2310.07240, section 5.2). One row is one layer. Each vector is scaled by its
largest magnitude, which is stored in fp16. Anchors have 8 bits per element. The number of bins of the differences is
larger in the leading layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Codes, Floats, Part, PlaneSpec, Quantizer, UnrepresentableError
from kvpack.codecs.chain.quantizers.float_split import join, split, split_planes
from kvpack.codecs.context import NO_HINTS, StackHints
from kvpack.codecs.protocol import Scope

ANCHOR_LEVELS = 127
"""Largest code of an anchor: codes are -127 to 127."""


def quantize(values: Floats, levels: NDArray[np.int64]) -> tuple[Codes, NDArray[np.float16]]:
    """Quantize ``values`` ``[L, T, C]`` to codes from 0 to 2 * levels and scales ``[L, T, 1]``; ``levels`` is ``[L]``.

    The scale is the vector's largest magnitude, and code = round(x / scale * levels) + levels.
    """
    with np.errstate(over="ignore"):
        scale: NDArray[np.float16] = np.abs(values).max(axis=2, keepdims=True, initial=0).astype(np.float16)
    steps = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)
    most = levels.astype(np.float32)[:, None, None]
    return np.clip(np.rint(values / steps * most) + most, 0, 2 * most).astype(np.uint8), scale


def dequantize(codes: Codes, scale: NDArray[np.float16], levels: NDArray[np.int64]) -> Floats:
    """Undo :func:`quantize`; returns float32 ``[L, T, C]``."""
    most = levels.astype(np.float32)[:, None, None]
    unit = (codes.astype(np.float32) - most) / np.maximum(most, np.float32(1))
    return np.asarray(unit * scale.astype(np.float32), np.float32)


@dataclass(frozen=True)
class AnchorDelta(Quantizer):
    """Quantizer with an anchor every ``group`` tokens and ``bins`` bins (3 to 256) per difference.

    The leading layers have ``leading_bins`` bins instead. ``leading`` is the number of leading layers of a model with
    32 layers; it is scaled to the model's depth and rounded.
    """

    name: ClassVar[str] = "anchor_delta"
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    scope: ClassVar[Scope] = Scope.KIND

    leading_bins: int
    bins: int
    leading: int
    group: int

    def __post_init__(self) -> None:
        """Check the configuration."""
        if not all(3 <= bins <= 256 for bins in (self.leading_bins, self.bins)):
            raise ValueError("bins are 3 to 256")
        if not 0 <= self.leading <= 32 or not 2 <= self.group <= 65536:
            raise ValueError("leading is 0 to 32 and group is 2 to 65536")

    def _levels(self, layers: int) -> NDArray[np.int64]:
        """Return the largest code of each layer, ``[L]``: bins // 2 - 1 as in the authors' code, at least 1."""
        leading = (layers * self.leading + 16) // 32
        bins = np.where(np.arange(layers) < leading, self.leading_bins, self.bins)
        levels: NDArray[np.int64] = np.maximum(bins // 2 - 1, 1)
        return levels

    def planes(self, part: Part) -> list[PlaneSpec]:
        """Return the planes ``anchors`` and ``deltas``, each followed by its scales."""
        layers, tokens, channels = part.shape
        anchors = -(-tokens // self.group)
        most = 2 * int(self._levels(layers).max(initial=1))
        return [
            PlaneSpec("anchors", (layers, anchors, channels), 8),
            *split_planes("F16", (layers, anchors, 1), "anchor_scale/"),
            PlaneSpec("deltas", (layers, tokens - anchors, channels), most.bit_length()),
            *split_planes("F16", (layers, tokens - anchors, 1), "delta_scale/"),
        ]

    def encode(self, data: NDArray[Any], part: Part, hints: StackHints = NO_HINTS) -> list[Codes]:
        """Quantize float32 values ``[L, T, C]`` to planes.

        Raises:
            UnrepresentableError: The scale of a vector is beyond the range of fp16.

        """
        layers, tokens, _ = part.shape
        eight = np.full(layers, ANCHOR_LEVELS)
        anchors, anchor_scale = quantize(data[:, :: self.group], eight)
        owner, others = self._tokens(tokens)
        with np.errstate(over="ignore", invalid="ignore"):
            delta = data[:, others] - dequantize(anchors, anchor_scale, eight)[:, owner]
        if not np.isfinite(anchor_scale).all() or not np.isfinite(delta).all():
            raise UnrepresentableError("vectors beyond fp16")
        deltas, delta_scale = quantize(delta, self._levels(layers))
        if not np.isfinite(delta_scale).all():
            raise UnrepresentableError("vectors beyond fp16")
        return [
            anchors,
            *split(anchor_scale.view(np.uint16), "F16"),
            deltas,
            *split(delta_scale.view(np.uint16), "F16"),
        ]

    def decode(self, codes: list[Codes], part: Part) -> Floats:
        """Return the values ``[L, T, C]``: anchors, and anchor plus difference for the tokens after each anchor."""
        layers, tokens, _ = part.shape
        owner, others = self._tokens(tokens)
        values = np.empty(part.shape, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            scale = join(codes[1:3], "F16").view(np.float16)
            anchors = dequantize(codes[0], scale, np.full(layers, ANCHOR_LEVELS))
            scale = join(codes[4:6], "F16").view(np.float16)
            values[:, :: self.group] = anchors
            values[:, others] = anchors[:, owner] + dequantize(codes[3], scale, self._levels(layers))
        return values

    def _tokens(self, tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the index of each other token's anchor, and the positions of the tokens that are not anchors."""
        token = np.arange(tokens)
        others = token[token % self.group != 0]
        return others // self.group, others

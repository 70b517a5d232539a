"""The codec ``local``: it applies ``low_rank`` to all layers of a window that have the same shape."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Self

from kvpack.cache import PartSpec
from kvpack.codecs.chain.codec import ChainCodec
from kvpack.codecs.low_rank import LowRank
from kvpack.codecs.protocol import Traits


class LowRankCodec(ChainCodec):
    """A codec that learns its basis from each window.

    It needs no profile, and layers may differ. Keys and values of the same dtype, shape and length form one array, so a
    window has one array for each shape. Its JSON form is that of a chain (``docs/format.md``, Stacks).
    """

    @cached_property
    def traits(self) -> Traits:
        """Return the codec's traits. See :class:`kvpack.codecs.protocol.Codec`."""
        return replace(super().traits, alike=False)

    def stack_key(self, part: PartSpec) -> object:
        """Return a key. Parts of a block that have equal keys form one array."""
        return part.tensor.dtype, part.shape, part.length

    def with_step(self, log_step: int) -> Self | None:
        """Return the same codec at another step."""
        if not isinstance(self.keys.quantizer, LowRank):
            return None
        chain = replace(self.keys, quantizer=replace(self.keys.quantizer, log_step=log_step))
        return replace(self, keys=chain, values=chain)

"""The codec ``local``: ``low_rank`` over all layers of a window that are of one shape."""

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

    It needs no profile, and layers may differ: keys and values of the same dtype, shape and length are one array, so a
    window has an array for each shape. Its JSON form is that of a chain (``docs/format.md``, Stacks).
    """

    @cached_property
    def traits(self) -> Traits:
        """See :class:`kvpack.codecs.protocol.Codec`."""
        return replace(super().traits, alike=False)

    def stack_key(self, part: PartSpec) -> object:
        """Parts of a block that have the same key are one array."""
        return part.tensor.dtype, part.shape, part.length

    def with_step(self, log_step: int) -> Self | None:
        """The same at another step."""
        if not isinstance(self.keys.quantizer, LowRank):
            return None
        chain = replace(self.keys, quantizer=replace(self.keys.quantizer, log_step=log_step))
        return replace(self, keys=chain, values=chain)

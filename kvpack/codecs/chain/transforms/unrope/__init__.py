"""``unrope``: undoes rotary position embedding (RoPE, arXiv 2104.09864) of keys, whose rank is lower without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvpack.codecs.chain.base import Floats, Part, Transform
from kvpack.codecs.chain.rotary import rotate
from kvpack.codecs.protocol import Need
from kvpack.errors import MismatchError


@dataclass(frozen=True)
class Unrope(Transform):
    """Undoes RoPE with the profile's ``rope.inv_freq``; if that array is empty, keys stay unchanged."""

    name: ClassVar[str] = "unrope"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROFILE})

    def forward(self, values: Floats, part: Part) -> Floats:
        """Turn keys after RoPE into keys before RoPE, ``[H, T, D]``."""
        return rotate(values, _frequencies(part), part.position, -1)

    def inverse(self, values: Floats, part: Part) -> Floats:
        """Turn keys before RoPE into keys after RoPE, ``[H, T, D]``."""
        return rotate(values, _frequencies(part), part.position, 1)


def _frequencies(part: Part) -> Floats:
    frequencies = part.floats("rope.inv_freq", None)
    if 2 * len(frequencies) > part.shape[2]:
        raise MismatchError("the profile's rotary embedding is not this model's")
    return frequencies


__all__ = ["Unrope", "rotate"]

"""``token_klt``: keys and values of all layers as one vector a token, less what its tokens tell, in a few coordinates.

x is centred, whitened by the Fisher information of the model's predictions, and projected on the leading
eigenvectors of what a function of the token ids leaves (Karhunen-Loeve transform), then what those leave on the
leading ones of each group of layers. ``docs/fisher.md`` derives
it. Keys are taken before RoPE.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from kvpack.codecs.chain.base import Floats, Part, Transform
from kvpack.codecs.chain.rotary import turns
from kvpack.codecs.chain.transforms.token_klt import cpu
from kvpack.codecs.chain.transforms.token_klt.model import TokenModel, model_of
from kvpack.codecs.protocol import Need, Scope
from kvpack.errors import MismatchError


@dataclass(frozen=True)
class TokenKlt(Transform):
    """With the profile's arrays ``{section}.*``, as ``docs/profile-format.md`` lists them."""

    name: ClassVar[str] = "token_klt"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROFILE, Need.TOKENS})
    scope: ClassVar[Scope] = Scope.CACHE

    section: str

    def model(self, part: Part) -> TokenModel:
        """What the part's profile says, if it is for such a cache.

        Raises:
            MismatchError: it is not.

        """
        rows, _, dims = part.shape
        model = model_of(part, self.section)
        if model.mean.shape[1] != rows * dims or 2 * len(model.frequencies) > dims:
            raise MismatchError(
                f"the profile is for {model.mean.shape[1]} elements a token, this cache has {rows * dims}"
            )
        return model

    def output(self, part: Part) -> Part:
        """One row of the model's coordinates."""
        return replace(part, shape=(1, part.shape[1], self.model(part).rank), heads=1)

    def forward(self, values: Floats, part: Part) -> Floats:
        """``(x - mean) @ analysis - prediction``; ``[1, T, R]``."""
        model = self.model(part)
        rows, tokens, dims = part.shape
        flat = np.empty((tokens, rows, dims), np.float32)
        cpu.gather(values, *turns(model.frequencies, part.position, tokens), flat)
        with np.errstate(over="ignore", invalid="ignore"):
            return model.coordinates(flat.reshape(tokens, -1), part)[None]

    def inverse(self, values: Floats, part: Part) -> Floats:
        """``(z + prediction) @ synthesis + mean``."""
        model = self.model(part)
        rows, tokens, dims = part.shape
        with np.errstate(over="ignore", invalid="ignore"):
            flat = model.rows(values[0], part)
        out = np.empty((rows, tokens, dims), np.float32)
        cpu.scatter(flat.reshape(tokens, rows, dims), *turns(model.frequencies, part.position, tokens), out)
        return out


__all__ = ["TokenKlt", "TokenModel", "model_of"]

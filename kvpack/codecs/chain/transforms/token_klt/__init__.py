"""``token_klt``: reduces all keys and values of a token to a few coordinates and subtracts a prediction from token ids.

The keys (before RoPE) and values of all layers form one vector x per token. It is centred and whitened by the Fisher
information of the model's predictions. A function of the token ids predicts it. The transform projects on the leading
eigenvectors of the prediction's residual (Karhunen-Loeve transform). What these common directions leave is projected
on the leading eigenvectors of each group of layers. ``docs/fisher.md`` derives the method.
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
    """Karhunen-Loeve transform with the profile's arrays ``{section}.*``, listed in ``docs/profile-format.md``."""

    name: ClassVar[str] = "token_klt"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROFILE, Need.TOKENS})
    scope: ClassVar[Scope] = Scope.CACHE

    section: str

    def model(self, part: Part) -> TokenModel:
        """Return the unpacked model of the part's profile.

        Raises:
            MismatchError: The profile is for a cache of another shape.

        """
        rows, _, dims = part.shape
        model = model_of(part, self.section)
        if model.mean.shape[1] != rows * dims or 2 * len(model.frequencies) > dims:
            raise MismatchError(
                f"the profile is for {model.mean.shape[1]} elements a token, this cache has {rows * dims}"
            )
        return model

    def output(self, part: Part) -> Part:
        """Return the description with one row of the model's coordinates per token."""
        return replace(part, shape=(1, part.shape[1], self.model(part).rank), heads=1)

    def forward(self, values: Floats, part: Part) -> Floats:
        """Return ``(x - mean) @ analysis - prediction``, ``[1, T, R]``."""
        model = self.model(part)
        rows, tokens, dims = part.shape
        flat = np.empty((tokens, rows, dims), np.float32)
        cpu.gather(values, *turns(model.frequencies, part.position, tokens), flat)
        with np.errstate(over="ignore", invalid="ignore"):
            return model.coordinates(flat.reshape(tokens, -1), part)[None]

    def inverse(self, values: Floats, part: Part) -> Floats:
        """Return ``(z + prediction) @ synthesis + mean``, ``[H, T, D]``."""
        model = self.model(part)
        rows, tokens, dims = part.shape
        with np.errstate(over="ignore", invalid="ignore"):
            flat = model.rows(values[0], part)
        out = np.empty((rows, tokens, dims), np.float32)
        cpu.scatter(flat.reshape(tokens, rows, dims), *turns(model.frequencies, part.position, tokens), out)
        return out


__all__ = ["TokenKlt", "TokenModel", "model_of"]

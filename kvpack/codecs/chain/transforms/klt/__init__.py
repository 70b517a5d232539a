"""``klt``: projects the stack of each token on the profile's orthonormal basis (KVTC, arXiv 2511.01815).

All layers and heads of a token form one vector of P = L * H * D elements. The Karhunen-Loeve transform subtracts the
mean of the calibration set and projects on the leading eigenvectors of its covariance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from kvpack.codecs.chain.base import Floats, Part, Transform
from kvpack.codecs.protocol import Need, Scope
from kvpack.errors import MismatchError


@dataclass(frozen=True)
class Klt(Transform):
    """Karhunen-Loeve transform to R coordinates per token, ``[1, T, R]``.

    It uses the profile's ``{section}.mean`` ``[P]`` and ``{section}.basis`` ``[P, R]``.
    """

    name: ClassVar[str] = "klt"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROFILE})
    scope: ClassVar[Scope] = Scope.KIND

    section: str

    def _arrays(self, part: Part) -> tuple[Floats, Floats]:
        size = part.shape[0] * part.shape[2]
        mean, basis = part.floats(f"{self.section}.mean", None), part.floats(f"{self.section}.basis", None, None)
        if len(mean) != size or len(basis) != size:
            raise MismatchError(f"the profile is for {mean.size} elements a token, this cache has {size}")
        return mean, basis

    def output(self, part: Part) -> Part:
        """Return the description with one row and R coordinates per token."""
        return replace(part, shape=(1, part.shape[1], self._arrays(part)[1].shape[1]), heads=1)

    def forward(self, values: Floats, part: Part) -> Floats:
        """Return ``(x - mean) @ basis``, ``[1, T, R]``."""
        mean, basis = self._arrays(part)
        flat: Floats = np.ascontiguousarray(values.transpose(1, 0, 2)).reshape(part.shape[1], mean.size)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray((flat - mean) @ basis, np.float32)[None]

    def inverse(self, values: Floats, part: Part) -> Floats:
        """Return ``z @ basis.T + mean``, ``[H, T, D]``."""
        mean, basis = self._arrays(part)
        rows, tokens, dims = part.shape
        with np.errstate(over="ignore", invalid="ignore"):
            flat: Floats = values[0] @ basis.T + mean
        return np.ascontiguousarray(flat.reshape(tokens, rows, dims).transpose(1, 0, 2))

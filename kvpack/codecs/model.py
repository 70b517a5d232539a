"""What codecs ask of a language model that runs again. ``kvpack.capture.replay`` has the model itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvpack.cache import PartSpec, TensorInfo
from kvpack.errors import MismatchError
from kvpack.numerics.floats import Bits

Cache = Mapping[str, Bits]
"""Keys and values of all layers by their names in a capture, as bit patterns ``[H, T, D]``."""


class Steps(Protocol):
    """A model that reads a text token by token."""

    def logits(self, token: int) -> NDArray[np.float32]:
        """Read one more token, and return the logits ``[V]`` of the token that follows it."""

    def rewind(self, count: int) -> None:
        """Forget all tokens but the first ``count``."""


class LanguageModel(Protocol):
    """A language model that can compute a cache again and predict tokens."""

    @property
    def vocabulary(self) -> int:
        """Return the number of logits, V."""

    @property
    def dtype(self) -> str:
        """Return torch's name of the dtype in which the model computes, such as ``bfloat16``."""

    def cache(
        self, tokens: NDArray[np.int32], steps: Sequence[int], first: Callable[[Cache], None] | None = None
    ) -> Cache:
        """Run over ``tokens`` ``[T]`` in forward passes of ``steps`` tokens each, and return the cache.

        ``first`` is given the cache as it is after the first pass. If it raises an error, no other pass is made.
        """

    def steps(self, count: int) -> Steps:
        """Return a reader of a text of ``count`` tokens that has read none."""


class Replay:
    """A cache as the model computes it again on this machine.

    ``differing`` are the labels of the parts that did not come back bit for bit. This is an error unless the caller has
    asked for an ``approximate`` result. ``sampled`` is the share of the sampled elements that this machine computes
    otherwise than the one that wrote the file.
    """

    def __init__(self, cache: Cache, *, approximate: bool = False, sampled: float = 0.0) -> None:
        """Wrap a cache."""
        self._cache, self._approximate, self.sampled = cache, approximate, sampled
        self._lock = threading.Lock()
        self.differing: list[str] = []

    def whole(self, tensor: TensorInfo) -> Bits:
        """Return what the model computes for a tensor, ``[H, T, D]``.

        Raises:
            MismatchError: The model has no such tensor, or one of another shape or dtype.

        """
        found = self._cache.get(tensor.name)
        if found is None or found.shape != tensor.shape or found.itemsize != tensor.itemsize:
            has = "none" if found is None else f"{list(found.shape)}, {8 * found.itemsize} bits per element"
            raise MismatchError(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, the model computes {has}")
        return found

    def part(self, part: PartSpec) -> Bits:
        """Return what the model computes for a part, ``[H, t, D]``. The errors are those of :meth:`whole`."""
        return self.whole(part.tensor)[:, part.first : part.first + part.tokens]

    def differs(self, label: str) -> None:
        """Note that a part is not what it was when the file was written.

        Raises:
            MismatchError: The caller has not asked for an approximate result.

        """
        if not self._approximate:
            raise MismatchError(
                f"{label} does not come back bit for bit: this machine computes the cache otherwise than the one that "
                "wrote the file; take an approximation with --approximate"
            )
        with self._lock:
            self.differing.append(label)

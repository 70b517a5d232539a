"""The language model that codecs ask for (:mod:`kvpack.codecs.model`), by transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from kvpack.capture.model import Identity, Model
from kvpack.capture.run import run_steps
from kvpack.codecs.model import Cache
from kvpack.numerics.floats import from_torch

Progress = Callable[[int, int], None]


class ReplayModel:
    """A loaded model that computes caches again. It may be used by several threads, one after another."""

    def __init__(self, model: Model) -> None:
        """Wrap a model."""
        self.model = model
        self.progress: Progress | None = None
        """A function that is called with the number of tokens that were read and the number in all."""

    @property
    def identity(self) -> Identity:
        """Return which model it is."""
        return self.model.identity

    @property
    def dtype(self) -> str:
        """Return torch's name of the dtype in which the model computes."""
        return self.model.dtype

    @property
    def vocabulary(self) -> int:
        """Return the number of logits."""
        return int(self.model.config.vocab_size)

    def cache(
        self, tokens: NDArray[np.int32], steps: Sequence[int], first: Callable[[Cache], None] | None = None
    ) -> Cache:
        """Run over ``tokens`` ``[T]`` as a capture does. See :class:`kvpack.codecs.model.LanguageModel`."""

        def each(done: int, cache: DynamicCache) -> None:
            if first is not None and done == steps[0]:
                first(_bits(cache))
            if self.progress:
                self.progress(done, len(tokens))

        return _bits(run_steps(self.model, tokens.tolist(), steps, each))

    def steps(self, count: int) -> TokenSteps:
        """Return a reader of a text of ``count`` tokens that has read none."""
        return TokenSteps(self.model, count, self.progress)


class TokenSteps:
    """A model that reads a text token by token. See :class:`kvpack.codecs.model.Steps`."""

    def __init__(self, model: Model, count: int, progress: Progress | None) -> None:
        """Begin a text of ``count`` tokens."""
        self._model, self._count, self._progress = model, count, progress
        self._cache = DynamicCache(config=model.network.config)

    def logits(self, token: int) -> NDArray[np.float32]:
        """Read one more token, and return the logits ``[V]`` of the token that follows it."""
        ids = torch.tensor([[token]], device=self._model.network.device)
        with torch.inference_mode():
            found: NDArray[np.float32] = self._model.logits(ids, self._cache)[0, -1].float().cpu().numpy()
        if self._progress:
            self._progress(self._cache.get_seq_length(), self._count)
        return found

    def rewind(self, count: int) -> None:
        """Forget all tokens but the first ``count``."""
        if count == 0:
            self._cache = DynamicCache(config=self._model.network.config)
        elif count < self._cache.get_seq_length():
            self._cache.crop(count - self._cache.get_seq_length())  # less than nothing: so many from the end


def _bits(cache: DynamicCache) -> Cache:
    """Return the bit patterns ``[H, T, D]`` of a cache, in main memory, without copying them if they are there."""
    found = {}
    for i, layer in enumerate(cache.layers):
        for kind, tensor in (("keys", layer.keys), ("values", layer.values)):
            found[f"layers.{i}.{kind}"] = from_torch(tensor[0])
    return found

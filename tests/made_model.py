"""A made-up language model in integer arithmetic, which computes the same on every machine, for ``replay``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from conftest import write_tensors
from reference_replay import Computed

from kvpack.codecs.model import Cache

LAYERS, HEADS, DIMS = 3, 2, 8


class MadeModel:
    """Keys, values and logits follow from a token and from the one before it. ``drift`` says at which calls logits err.

    It has a vocabulary of 300 tokens, and bf16 caches of 3 layers with 2 heads of 8 dimensions.
    """

    vocabulary = 300
    dtype = "bfloat16"

    def __init__(self, drift: Callable[[int], bool] = lambda _: False) -> None:
        self.read: list[int] = []
        self.calls = 0
        self._drift = drift

    def logits(self, token: int) -> np.ndarray:
        self.read.append(token)
        self.calls += 1
        seed = token + (1000 * self.calls if self._drift(self.calls) else 0)
        return (hashed(seed, self.vocabulary) >> np.uint64(44)).astype(np.float32) / np.float32(1 << 16)

    def rewind(self, count: int) -> None:
        assert count <= len(self.read)
        del self.read[count:]

    def steps(self, count: int) -> MadeModel:
        assert count > 0
        return self

    def cache(
        self, ids: np.ndarray, steps: Sequence[int], first: Callable[[Cache], None] | None = None
    ) -> dict[str, np.ndarray]:
        assert sum(steps) == len(ids)
        every = made_cache(ids)
        if first:
            first({name: bits[:, : steps[0]] for name, bits in every.items()})
        return every


def hashed(seed: int, count: int) -> np.ndarray:
    """Some 64-bit numbers that follow from a seed."""
    z = (np.arange(count, dtype=np.uint64) + np.uint64(seed * 1009)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return z ^ (z >> np.uint64(31))


def made_cache(ids: np.ndarray) -> dict[str, np.ndarray]:
    """The model's cache: bit patterns of bf16 between 1/4 and 2, with signs."""
    cache = {}
    for layer in range(LAYERS):
        for kind in ("keys", "values"):
            seed = 2 * layer + (kind == "keys")
            rows = [hashed(int(token) * 8 + seed, HEADS * DIMS).reshape(HEADS, DIMS) for token in ids]
            bits = np.stack(rows, axis=1) >> np.uint64(48)
            cache[f"layers.{layer}.{kind}"] = ((bits & np.uint64(0x81FF)) + np.uint64(0x3E80)).astype(np.uint16)
    return cache


def computed() -> Computed:
    """The same model for the second decoder."""
    return Computed(made_cache, lambda before: MadeModel().logits(before[-1] if before else 0))


def write_made(path: Path, tokens: int = 140) -> Path:
    """A capture by this model, as another machine has computed it: most elements of some layers differ a little."""
    ids = (hashed(1, tokens) >> np.uint64(40)).astype(np.int64) % MadeModel.vocabulary
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for i, (name, bits) in enumerate(made_cache(ids).items()):
        noise = (hashed(2 + i, bits.size) >> np.uint64(60)).astype(np.int64).reshape(bits.shape) - 8
        noise[:, ::50, 0] *= 20 if i > 1 else 1
        tensors[name] = ("BF16", (bits + (noise if i % 3 else 0)).astype(np.uint16))
    tensors["tokens"] = ("I32", ids.astype(np.int32))
    tensors["extra"] = ("F32", np.float32([0.5, 1.5]).view(np.uint32))
    schedule = {"prefill": [100, tokens - 110], "decode": 10}
    return write_tensors(path, tensors, {"schedule": json.dumps(schedule), "dtype": '"bfloat16"'})

"""Runs the model over a corpus and keeps its keys, before RoPE, and values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.calibration.rotary import inverse_frequencies
from kvpack.capture import CaptureOptions, Model, run_tokens
from kvpack.errors import UnsupportedError, UsageError
from kvpack.stages.base import Floats
from kvpack.stages.transforms.unrope import rotate

SKIPPED = 4
"""First tokens of a sequence that are left out: attention sinks, unlike all others (arXiv 2309.17453)."""

Halves = NDArray[np.float16]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CorpusOptions:
    """How many tokens to run in all, shared evenly by the texts, in sequences of ``context`` tokens."""

    tokens: int = 131072
    context: int = 2048


@dataclass(frozen=True)
class Sample:
    """S sequences of T tokens: keys before RoPE and values ``[S, T, L * H * D]`` float16, layer by layer.

    ``tokens`` ``[S, T]`` int32 are their ids, ``mass`` ``[S, T]`` float32 their attention mass, mean over layers and
    heads. ``layers`` is L, ``channels`` H * D; ``documents`` says what they come from, for the profile's metadata.
    """

    keys: Halves
    values: Halves
    tokens: NDArray[np.int32]
    mass: Floats
    layers: int
    channels: int
    frequencies: Floats
    documents: list[dict[str, Any]]

    def rows(self, kind: str, most: int) -> Floats:
        """At most ``most`` keys or values ``[N, L * H * D]`` float32, taken evenly, the first tokens left out."""
        kept = getattr(self, kind)[:, SKIPPED:]
        stride = -(-kept.shape[0] * kept.shape[1] // most)
        return np.asarray(kept.reshape(-1, kept.shape[2])[::stride], np.float32)


def collect(
    model: Model, texts: Sequence[tuple[str, str]], options: CorpusOptions, progress: Progress | None = None
) -> Sample:
    """Run ``texts`` (name, text). Sequences are spread evenly over each text, and do not overlap.

    Raises:
        UsageError: a text too short for one sequence, or options that the model cannot follow.
        UnsupportedError: a rotary embedding that kvpack cannot undo, or layers of different shapes.

    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if options.context <= SKIPPED or options.tokens < options.context * len(texts):
        raise UsageError(
            f"--tokens is at least one sequence of {max(options.context, SKIPPED + 1)} for each of {len(texts)} texts"
        )
    if limit is not None and options.context > limit:
        raise UsageError(f"sequences of {options.context} tokens, but the model has {limit} positions: use --context")
    sequences, documents = [], []
    for name, text in texts:
        mine = _sequences(name, model.tokenizer(text).input_ids, options, len(texts))
        sequences += mine
        digest = hashlib.sha256(text.encode()).hexdigest()
        documents.append({"name": Path(name).name, "sha256": digest, "sequences": len(mine)})
    frequencies = inverse_frequencies(model)
    keys, values, mass = [], [], []
    for i, ids in enumerate(sequences):
        cache = run_tokens(model, ids, CaptureOptions(queries=0))
        shape = cache.keys[0].shape
        if any(tensor.shape != shape for tensor in (*cache.keys, *cache.values)):
            raise UsageError(f"{model.name} has layers of different shapes: no codec with a profile can code them")
        keys.append(_flat([rotate(layer.float().numpy(), frequencies, 0, -1) for layer in cache.keys]))
        values.append(_flat([layer.float().numpy() for layer in cache.values]))
        mass.append(cache.attention_mass.float().mean((0, 1)).numpy())
        if progress:
            progress(i + 1, len(sequences))
    layers, channels = len(cache.keys), shape[0] * shape[2]
    arrays = np.stack(keys), np.stack(values), np.array(sequences, np.int32), np.stack(mass)
    return Sample(*arrays, layers, channels, frequencies, documents)


def _sequences(name: str, ids: list[int], options: CorpusOptions, texts: int) -> list[list[int]]:
    count = min(options.tokens // texts, len(ids)) // options.context
    if not count:
        raise UsageError(f"{name}: {len(ids)} tokens, fewer than one sequence of {options.context}")
    stride = len(ids) // count
    return [ids[i * stride : i * stride + options.context] for i in range(count)]


def _flat(layers: list[Floats]) -> Halves:
    """Layers ``[H, T, D]`` to ``[T, L * H * D]``.

    Raises:
        UnsupportedError: values beyond float16.

    """
    flat = np.concatenate([layer.transpose(1, 0, 2).reshape(layer.shape[1], -1) for layer in layers], axis=1)
    if np.abs(flat).max(initial=0) > np.finfo(np.float16).max:
        raise UnsupportedError("the model's keys or values are beyond float16: cannot calibrate for it")
    return flat.astype(np.float16)

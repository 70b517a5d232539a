"""Runs the model over a corpus and collects its keys (before RoPE) and values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.calibration.rotary import inverse_frequencies, rotated
from kvpack.calibration.work import Work
from kvpack.capture import CaptureOptions, Model, prefill, run_tokens
from kvpack.codecs.chain.base import Floats
from kvpack.errors import UnsupportedError, UsageError

SKIPPED = 4
"""Number of first tokens of a sequence that are skipped: attention sinks differ from all others (arXiv 2309.17453)."""

HELD_BACK = 8
"""One in this many sequences is held back from learning."""

Halves = NDArray[np.float16]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CorpusOptions:
    """Size of the corpus: ``tokens`` in total, split evenly between the texts, in sequences of ``context`` tokens."""

    tokens: int = 65536
    context: int = 2048


@dataclass(frozen=True)
class Sample:
    """The cache of S sequences of T tokens, with P = 2 * L * H * D elements per token.

    Attributes:
        both: all layers' keys before RoPE, then all layers' values, ``[S, T, P]`` float16.
        tokens: token ids, ``[S, T]`` int32.
        mass: for each sequence held back, the attention mass of its tokens, mean over layers and heads, ``[T]``
            float32.
        layers: number of layers, L.
        channels: elements of a layer's keys per token, H * D.
        frequencies: RoPE's frequencies in radians per position, empty without RoPE.
        documents: the texts that the sequences come from, for the profile's metadata.

    """

    both: Halves
    tokens: NDArray[np.int32]
    mass: dict[int, Floats]
    layers: int
    channels: int
    frequencies: Floats
    documents: list[dict[str, Any]]

    @property
    def held(self) -> list[int]:
        """Indices of the sequences held back, on which the learnt codec is measured."""
        return _held_back(len(self.tokens))

    @property
    def learnt(self) -> list[int]:
        """Indices of the sequences to learn from: all that are not held back, or the only one."""
        held = self.held
        return [s for s in range(len(self.tokens)) if s not in held] or held

    @property
    def size(self) -> int:
        """Number of elements per token, P."""
        return int(self.both.shape[2])

    def kind(self, name: str) -> Halves:
        """Return the ``keys`` or the ``values``, ``[S, T, L * H * D]``."""
        half = self.size // 2
        return self.both[:, :, :half] if name == "keys" else self.both[:, :, half:]

    def rows(self, kind: str, most: int) -> Floats:
        """Return at most ``most`` evenly spaced rows of keys or values, ``[N, L * H * D]`` float32.

        The first ``SKIPPED`` tokens of each sequence are left out.
        """
        kept = self.kind(kind)[:, SKIPPED:]
        stride = -(-kept.shape[0] * kept.shape[1] // most)
        return np.asarray(kept.reshape(-1, kept.shape[2])[::stride], np.float32)


def collect(
    model: Model,
    texts: Sequence[tuple[str, str]],
    options: CorpusOptions,
    progress: Progress | None = None,
    work: Work | None = None,
) -> Sample:
    """Run the model over ``texts``, pairs of name and text, and return the sample.

    The sequences are spread evenly over each text and do not overlap. Sequences that ``work`` has already are not run
    again.

    Raises:
        UsageError: There are too few tokens for one sequence of each text, a text is too short for one, the model does
            not have enough positions, or its layers differ in shape.
        UnsupportedError: kvpack cannot undo the model's rotary embedding, or values are beyond float16.

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
    frequencies, work = inverse_frequencies(model), work or Work()
    first = run_tokens(model, sequences[0], CaptureOptions(queries=0))
    layers, (heads, _, dims) = len(first.keys), first.keys[0].shape
    size = 2 * layers * heads * dims
    both = work.growing("both", (len(sequences), options.context, size), np.float16)
    mass = work.growing("mass", (len(sequences), options.context), np.float32)
    done = work.growing("done", (len(sequences),), np.uint8)
    held = _held_back(len(sequences))
    for i, ids in enumerate(sequences):
        if not done[i]:
            if i in held or i == 0:
                cache = run_tokens(model, ids, CaptureOptions(queries=0)) if i else first
                mass[i] = cache.attention_mass.float().mean((0, 1)).numpy()
                both[i] = _rows(model, cache.keys, cache.values, frequencies)
            else:
                both[i] = _rows(model, *prefill(model, ids), frequencies)
            done[i] = 1
        if progress:
            progress(i + 1, len(sequences))
    tokens = np.array(sequences, np.int32)
    return Sample(both, tokens, {i: mass[i] for i in held}, layers, heads * dims, frequencies, documents)


def _rows(model: Model, keys: list[torch.Tensor], values: list[torch.Tensor], frequencies: Floats) -> Halves:
    """Return the rows ``[T, P]`` of a sequence.

    Raises:
        UsageError: The layers have different shapes.
        UnsupportedError: Keys or values are beyond the range of float16.

    """
    if any(tensor.shape != keys[0].shape for tensor in (*keys, *values)):
        raise UsageError(f"{model.name} has layers of different shapes: no codec with a profile can code them")
    found = [torch.stack(kind).to(model.network.device).float() for kind in (keys, values)]
    flat = torch.cat([rotated(found[0], frequencies, -1), found[1]]).permute(2, 0, 1, 3)
    if flat.abs().max() > torch.finfo(torch.float16).max:
        raise UnsupportedError("the model's keys or values are beyond float16: cannot calibrate for it")
    rows: Halves = flat.reshape(len(flat), -1).half().cpu().numpy()
    return rows


def _held_back(count: int) -> list[int]:
    return list(range(HELD_BACK // 2, count, HELD_BACK)) or [0]


def _sequences(name: str, ids: list[int], options: CorpusOptions, texts: int) -> list[list[int]]:
    count = min(options.tokens // texts, len(ids)) // options.context
    if not count:
        raise UsageError(f"{name}: {len(ids)} tokens, fewer than one sequence of {options.context}")
    stride = len(ids) // count
    return [ids[i * stride : i * stride + options.context] for i in range(count)]

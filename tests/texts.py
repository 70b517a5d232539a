"""Captures of made-up texts for tests of stores: every row is a function of the tokens up to its own, as in a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvpack.formats.source import Capture

LAYERS, HEADS, DIMS = 2, 2, 4
MODEL = {"name": "made-up", "weights_sha256": "5" * 64, "head_dim": DIMS, "num_hidden_layers": LAYERS}


def rows(tokens: Sequence[int], layer: int, kind: str, salt: int = 0) -> np.ndarray:
    """Bit patterns ``[H, T, D]`` of finite bf16 numbers."""
    state, states = 0, []
    for token in tokens:
        state = (state * 6364136223846793005 + int(token) + 1) % (1 << 64)
        states.append(state)
    seeds = np.array(states, np.uint64)[None, :, None]
    place = np.arange(HEADS * DIMS, dtype=np.uint64).reshape(HEADS, 1, DIMS)
    offset = np.uint64(1000 * layer + 100 * (kind == "keys") + 7919 * salt)
    with np.errstate(over="ignore"):
        mixed = (seeds + (place + offset) * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    return (0x3F00 + ((mixed >> np.uint64(40)) & np.uint64(0x80FF))).astype(np.uint16)


def text(
    tokens: Sequence[int],
    decode: int | None = 0,
    *,
    chunks: Sequence[int] | None = None,
    salt: int = 0,
    **documents: Any,
) -> Capture:
    """A capture in memory of these tokens, the last ``decode`` of them made by decode steps; None: it does not say.

    ``documents`` replace those of its metadata, and ``salt`` changes every row.
    """
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for layer in range(LAYERS):
        for kind in ("keys", "values"):
            tensors[f"layers.{layer}.{kind}"] = ("BF16", rows(tokens, layer, kind, salt))
    tensors["tokens"] = ("I32", np.array(tokens, np.int32).view(np.uint32))
    found: dict[str, Any] = {"model": MODEL, "rope": {"rope_theta": 10000.0}, "dtype": "bfloat16"}
    if decode is not None:
        prefilled = len(tokens) - decode
        found["schedule"] = {"prefill": list(chunks or [prefilled] * (prefilled > 0)), "decode": decode}
    found |= documents
    return Capture.of("text", tensors, {name: json.dumps(value) for name, value in found.items() if value is not None})


def holds(capture: Capture, tokens: Sequence[int], salt: int = 0) -> bool:
    """Whether a capture has exactly the rows of these tokens."""
    return capture.read("tokens").view(np.int32).tolist() == list(tokens) and all(
        np.array_equal(capture.read(f"layers.{layer}.{kind}"), rows(tokens, layer, kind, salt))
        for layer in range(LAYERS)
        for kind in ("keys", "values")
    )

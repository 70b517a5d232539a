"""Measures the entropy of a text under a model in bits per token, which is the sequence bound of its KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache

from kvpack.capture.model import Model
from kvpack.errors import UsageError

CHUNK = 256


def token_bits(
    model: Model, tokens: Sequence[int], progress: Callable[[int, int], None] | None = None
) -> tuple[float, int]:
    """Return the mean of -log2 p(token | all tokens before it), and the number of predicted tokens.

    The first token is not predicted. Logits are computed for ``CHUNK`` positions at a time and converted to float32.

    Raises:
        UsageError: There are fewer than two tokens, or more than the model has positions.

    """
    ids = torch.tensor([tokens], device=model.network.device)
    count = ids.shape[1]
    limit = getattr(model.config, "max_position_embeddings", None)
    if count < 2:
        raise UsageError("the text has fewer than two tokens: nothing to predict")
    if limit is not None and count > limit:
        raise UsageError(f"{count} tokens, but the model has {limit} positions: use --max-tokens")
    cache = DynamicCache(config=model.network.config)
    nats = 0.0
    with torch.inference_mode():
        for at in range(0, count - 1, CHUNK):
            stop = min(at + CHUNK, count - 1)
            logits = model.logits(ids[:, at:stop], cache)[0].float()
            chosen = logits.log_softmax(-1).gather(1, ids[0, at + 1 : stop + 1, None])
            nats -= float(chosen.double().sum())
            if progress:
                progress(stop, count - 1)
    return nats / math.log(2) / (count - 1), count - 1

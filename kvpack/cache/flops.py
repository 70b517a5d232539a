"""Count the floating-point operations (FLOPs) of computing a cache again from its tokens.

A multiplication and an addition are two operations. A prefill takes, of every token, ``2 * weights``: each weight of a
matrix is multiplied once and added once (Kaplan et al., arXiv 2001.08361, table 1). Attention takes, in each layer and
for every position that a token attends to, ``4 * query heads * head dimension``: two for each element of the product of
query and key, two for each of the sum of values (Hoffmann et al., arXiv 2203.15556, appendix F). A token attends to
itself and to all tokens before it, and only these pairs are counted; a kernel that computes others and masks them does
more.

Not counted: the input embedding, which is a look-up; norms, activations, softmax and RoPE; and the output head, because
a cache needs no predictions. ``parameters`` of a capture include biases and the weights of norms, which are counted as
if they were matrices; they are a small part (of SmolLM2-135M, 0.03 percent). Where a model routes each token to a few
of its experts, the count is too high, because it takes all of them.

This module uses only the standard library, so that ``kvpack inspect`` starts fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvpack.cache.metadata import CaptureMetadata

MAX_NUMBER = 1 << 56
"""Larger numbers in a capture or a configuration are not believed."""

GATED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Model types of transformers that have Llama's shape: four matrices of attention and three of a gated MLP."""


@dataclass(frozen=True)
class Network:
    """What decides how many operations a model takes.

    Attributes:
        layers: The number of layers with attention.
        query_heads: The number of query heads in a layer.
        head_dim: The dimension of a head.
        weights: The number of weights that every token is multiplied by, without embedding and output head.
        output_head: The number of weights of the output head, which a prediction takes.

    """

    layers: int
    query_heads: int
    head_dim: int
    weights: int
    output_head: int

    def prefill(self, tokens: int) -> int:
        """Return the operations that compute the cache of ``tokens`` tokens from the first token on.

        They are the same in one pass, in chunks and token by token.
        """
        attended = tokens * (tokens + 1) // 2
        return 2 * self.weights * tokens + 4 * self.layers * self.query_heads * self.head_dim * attended

    def prediction(self, tokens: int) -> int:
        """Return the operations of a run over ``tokens`` tokens that also predicts the token after each of them.

        An arithmetic decoder that takes the model's own probabilities makes such a run, token by token, to find out
        what the tokens are.
        """
        return self.prefill(tokens) + 2 * self.output_head * tokens


def network_of_capture(metadata: CaptureMetadata) -> Network | None:
    """Return the network that a capture names, or None where it does not record all the numbers.

    The numbers are ``num_hidden_layers``, ``num_attention_heads``, ``head_dim``, ``hidden_size``, ``vocab_size``,
    ``parameters`` (all weights) and ``embedding_parameters`` (embedding and output head, counted once where they are
    one matrix) of the document ``model``.
    """
    model = metadata.model
    layers, heads, dims = (_count(model, n) for n in ("num_hidden_layers", "num_attention_heads", "head_dim"))
    every, embedding = _count(model, "parameters"), _count(model, "embedding_parameters")
    hidden, vocabulary = _count(model, "hidden_size"), _count(model, "vocab_size")
    if not (layers and heads and dims and every and embedding and hidden and vocabulary) or embedding >= every:
        return None
    return Network(layers, heads, dims, every - embedding, hidden * vocabulary)


def network_of_config(config: Mapping[str, Any]) -> Network | None:
    """Return the network of a transformers configuration of Llama's shape, or None for others.

    A layer has the matrices of queries and of the output ``[hidden, heads * head_dim]``, of keys and values ``[hidden,
    KV heads * head_dim]``, and the three of a gated MLP ``[hidden, intermediate]``. Norms and biases are not counted.
    """
    hidden, intermediate = _count(config, "hidden_size"), _count(config, "intermediate_size")
    layers, heads = _count(config, "num_hidden_layers"), _count(config, "num_attention_heads")
    vocabulary = _count(config, "vocab_size")
    if config.get("model_type") not in GATED or not (hidden and intermediate and layers and heads and vocabulary):
        return None
    kv_heads = _count(config, "num_key_value_heads") or heads
    dims = _count(config, "head_dim") or hidden // heads
    layer = 2 * hidden * heads * dims + 2 * hidden * kv_heads * dims + 3 * hidden * intermediate
    return Network(layers, heads, dims, layers * layer, hidden * vocabulary)


def _count(document: Mapping[str, Any], name: str) -> int | None:
    value = document.get(name)
    return value if type(value) is int and 1 <= value <= MAX_NUMBER else None

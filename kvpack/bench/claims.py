"""Computes what a sequence bound claims for a model: bits per token raw and with TurboQuant, and a token's entropy.

arXiv 2604.15356 compares the bits of a TurboQuant-compressed position to the entropy of one token under the model,
"beyond the per-vector Shannon limit". With a given entropy, the ratio depends only on the model's shape. The bound is
reached only by storing the tokens and computing the cache again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvpack.errors import FormatError

PAPER_TOKEN_BITS = 4.3
"""Bits per token that arXiv 2604.15356 assumes for its headline ratio (3.3 to 4.3)."""

PAPER_TURBOQUANT_BITS = 3.0
"""Bits per element that the paper assumes for TurboQuant, without norms."""

MAX_FIELD = 1 << 24


@dataclass(frozen=True)
class Shape:
    """The shape of a model's cache: numbers of layers, query heads and KV heads, and the head dimension."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, path: Path) -> Shape:
        """Read the shape from a transformers ``config.json``; of several configurations, the text decoder's is used.

        Raises:
            FormatError: The file is not JSON, or not a configuration with these numbers.

        """
        try:
            config = json.loads(path.read_text())
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise FormatError(f"{path}: not a JSON file ({error})") from None
        if not isinstance(config, dict):
            raise FormatError(f"{path}: not a model configuration")
        config = config.get("text_config", config)
        layers = _number(config, path, "num_hidden_layers", "n_layer")
        heads = _number(config, path, "num_attention_heads", "n_head")
        if config.get("kv_lora_rank") is not None:
            raise FormatError(f"{path}: caches latents (multi-head latent attention), not keys and values by head")
        kv_heads = heads if config.get("num_key_value_heads") is None else _number(config, path, "num_key_value_heads")
        if config.get("head_dim") is not None:
            return cls(layers, heads, kv_heads, _number(config, path, "head_dim"))
        return cls(layers, heads, kv_heads, _number(config, path, "hidden_size", "n_embd") // heads)


def _number(config: dict[str, Any], path: Path, *names: str) -> int:
    for name in names:
        value = config.get(name)
        if value is not None:
            if type(value) is not int or not 1 <= value <= MAX_FIELD:
                raise FormatError(f"{path}: {name} is {value!r}, not a number from 1 to {MAX_FIELD}")
            return value
    raise FormatError(f"{path}: has no {names[0]}: not the config.json of a transformer?")


@dataclass(frozen=True)
class Claim:
    """Bits per token position with one way of counting heads, and the ratios between them."""

    heads: int
    raw_bits: int
    turboquant_bits: float
    token_bits: float

    @property
    def over_turboquant(self) -> float:
        """Ratio of TurboQuant's bits to the token's entropy, which is the paper's headline ratio."""
        return self.turboquant_bits / self.token_bits

    @property
    def over_raw(self) -> float:
        """Ratio of the uncompressed bits to the token's entropy."""
        return self.raw_bits / self.token_bits

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the ratios."""
        return {**asdict(self), "over_turboquant": self.over_turboquant, "over_raw": self.over_raw}


def claim(
    shape: Shape,
    heads: int,
    *,
    token_bits: float = PAPER_TOKEN_BITS,
    bits: float = PAPER_TURBOQUANT_BITS,
    norm_bits: float = 0.0,
    raw: int = 16,
) -> Claim:
    """Count the bits of a position with ``heads`` heads per layer, each with ``head_dim`` elements of keys and values.

    An element has ``raw`` bits uncompressed and ``bits`` bits in TurboQuant. TurboQuant also stores a norm of
    ``norm_bits`` bits for each vector, which the paper leaves out.
    """
    vectors = 2 * shape.layers * heads
    elements = vectors * shape.head_dim
    return Claim(heads, elements * raw, elements * bits + vectors * norm_bits, token_bits)

"""Computes what a sequence bound claims for a model: bits per token raw and with TurboQuant, and a token's entropy.

arXiv 2604.15356 compares the bits of a TurboQuant-compressed position to the entropy of one token under the model,
"beyond the per-vector Shannon limit". With a given entropy, the ratio depends only on the model's shape. The bound is
reached only by storing the tokens and computing the cache again, so a :class:`Line` that says so carries that price.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvpack.cache.flops import Network, network_of_config
from kvpack.cache.untrusted import parse_json
from kvpack.errors import FormatError
from kvpack.formats.input import read_file

PAPER_TOKEN_BITS = 4.3
"""Bits per token that arXiv 2604.15356 assumes for its headline ratio (3.3 to 4.3)."""

PAPER_TURBOQUANT_BITS = 3.0
"""Bits per element that the paper assumes for TurboQuant, without norms."""

PACKED_TURBOQUANT_BITS = 3.25
"""Bits per element of TurboQuant at 3 bits with a 16-bit norm for 64 elements, packed and not entropy-coded."""

RAW_BITS = 16
"""Bits per element of an uncompressed cache in bf16 or fp16."""

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
        """Read the shape from a transformers ``config.json``, as :func:`read_config` does."""
        return read_config(path)[0]

    @property
    def name(self) -> str:
        """What the shape is, in words."""
        return f"{self.layers} layers, {self.query_heads} query heads, {self.kv_heads} KV heads of {self.head_dim}"


def read_config(path: Path) -> tuple[Shape, Network | None]:
    """Read a transformers ``config.json``, as :func:`parse_config` does."""
    return parse_config(read_file(path), str(path))


def parse_config(raw: bytes, path: str) -> tuple[Shape, Network | None]:
    """Parse a ``config.json``: the cache's shape, and what decides the operations of a prefill if known.

    Of several configurations in the file, the text decoder's is used. Messages call the file ``path``.

    Raises:
        FormatError: The file is not JSON, or not a configuration with these numbers.

    """
    config = parse_json(raw, path)
    if isinstance(config, dict):
        config = config.get("text_config", config)
    if not isinstance(config, dict):
        raise FormatError(f"{path}: not a model configuration")
    layers = _number(config, path, "num_hidden_layers", "n_layer")
    heads = _number(config, path, "num_attention_heads", "n_head")
    if config.get("kv_lora_rank") is not None:
        raise FormatError(f"{path}: caches latents (multi-head latent attention), not keys and values by head")
    kv_heads = heads if config.get("num_key_value_heads") is None else _number(config, path, "num_key_value_heads")
    if config.get("head_dim") is not None:
        dims = _number(config, path, "head_dim")
    else:
        dims = _number(config, path, "hidden_size", "n_embd") // heads
    return Shape(layers, heads, kv_heads, dims), network_of_config(config)


def _number(config: dict[str, Any], path: str, *names: str) -> int:
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
    raw: int = RAW_BITS,
) -> Claim:
    """Count the bits of a position with ``heads`` heads per layer, each with ``head_dim`` elements of keys and values.

    An element has ``raw`` bits uncompressed and ``bits`` bits in TurboQuant. TurboQuant also stores a norm of
    ``norm_bits`` bits for each vector, which the paper leaves out.
    """
    vectors = 2 * shape.layers * heads
    elements = vectors * shape.head_dim
    return Claim(heads, elements * raw, elements * bits + vectors * norm_bits, token_bits)


@dataclass(frozen=True)
class Line:
    """A line of the table: a way to store a cache, its ratios to other ways, and what it costs to read.

    Attributes:
        model: The model.
        stored: What is stored.
        bits: The bits per token.
        over_raw: The bits of the uncompressed cache over these.
        over_turboquant: The bits of TurboQuant, as many an element as were asked for, over these.
        over_packed: The bits of TurboQuant at :data:`PACKED_TURBOQUANT_BITS` an element over these.
        runs_model: Whether reading runs the model. The two prices are 0 where it does not.
        flops: The floating-point operations per token of running the model, None where they are not known.
        seconds: The seconds of the prefill that reading makes, None where it was not measured.
        how: ``computed`` from the model's shape, ``assumed`` where an entropy was, or ``measured``.

    """

    model: str
    stored: str
    bits: float
    over_raw: float
    over_turboquant: float
    over_packed: float
    runs_model: bool
    flops: float | None
    seconds: float | None
    how: str

    def to_json(self) -> dict[str, Any]:
        """Return all attributes by name."""
        return asdict(self)


@dataclass(frozen=True)
class Basis:
    """What the ratios of a model's lines refer to.

    ``elements`` is the number of elements of keys and values per token. ``raw_bits`` and ``turboquant_bits`` are the
    bits of a token uncompressed and in the TurboQuant that was asked for.
    """

    model: str
    elements: int
    raw_bits: float
    turboquant_bits: float

    def line(self, stored: str, bits: float, how: str) -> Line:
        """Return the line of something that is read without running the model."""
        return self._line(stored, bits, how, runs_model=False, flops=0.0, seconds=0.0)

    def replay(self, stored: str, bits: float, how: str, flops: float | None, seconds: float | None) -> Line:
        """Return the line of something that is read by running the model, with its price."""
        return self._line(stored, bits, how, runs_model=True, flops=flops, seconds=seconds)

    def _line(
        self, stored: str, bits: float, how: str, *, runs_model: bool, flops: float | None, seconds: float | None
    ) -> Line:
        ratios = (self.raw_bits / bits, self.turboquant_bits / bits)
        packed = self.elements * PACKED_TURBOQUANT_BITS / bits
        return Line(self.model, stored, bits, *ratios, packed, runs_model, flops, seconds, how)


def lines(
    model: str, shape: Shape, found: Mapping[str, Claim], network: Network | None, context: int, how: str
) -> list[Line]:
    """Return the lines of a configuration from its claims, of which each counts heads in one way.

    Prices are those of a cache of ``context`` tokens, and unknown where ``network`` is None. Where tokens are stored by
    their entropy, the model runs token by token to find out what they are, and then over all of them to compute the
    cache.
    """
    plain = network.prefill(context) / context if network else None
    both = (network.prediction(context) + network.prefill(context)) / context if network else None
    table = []
    for counting, one in found.items():
        basis = Basis(model, 2 * shape.layers * one.heads * shape.head_dim, one.raw_bits, one.turboquant_bits)
        whose = f"{one.heads} {counting}"
        bits = one.turboquant_bits / basis.elements
        table += [
            basis.line(f"raw, {whose}", one.raw_bits, "computed"),
            basis.line(f"TurboQuant, {bits:g} bits per element", one.turboquant_bits, "computed"),
        ]
        if bits != PACKED_TURBOQUANT_BITS:
            packed = basis.elements * PACKED_TURBOQUANT_BITS
            table.append(basis.line(f"TurboQuant, {PACKED_TURBOQUANT_BITS:g} bits per element", packed, "computed"))
        table += [
            basis.replay("tokens as 32-bit integers, replayed", 32, "computed", plain, None),
            basis.replay("tokens by their entropy, replayed", one.token_bits, how, both, None),
        ]
    return table

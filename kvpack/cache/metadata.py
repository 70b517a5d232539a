"""The metadata of a capture, parsed in this one place.

A capture is a safetensors file. Its ``__metadata__`` maps strings to strings, and every value is a JSON document
(``docs/capture-format.md`` lists them). The file may come from anywhere, so nothing in it is trusted: parsing never
raises, and whatever is not as the format says is treated as if it were absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from math import isfinite
from typing import Any, TypeGuard

from kvpack.cache.untrusted import is_unicode

MAX_DEPTH = 64
"""Documents with lists or objects nested more deeply than this are treated as absent."""

MAX_HEAD_DIM = 1 << 20
"""A larger head dimension is not believed."""

MAX_TOKENS = 1 << 31
"""A schedule of more tokens is not believed."""


@dataclass(frozen=True)
class NeedleEntry:
    """One fact that ``kvpack capture --needles`` planted in the text.

    The text holds ``question + answer``. ``position`` is the index of the fact's first token in the capture.
    """

    question: str
    answer: str
    position: int


@dataclass(frozen=True)
class Schedule:
    """How a model computed a cache: the numbers of tokens of its prefill chunks, then decode steps of one token each.

    It shows in the bits: the same tokens by another schedule give keys and values that differ in their last places.
    """

    prefill: tuple[int, ...]
    decode: int

    @cached_property
    def prefilled(self) -> int:
        """The number of tokens that were prefilled."""
        return sum(self.prefill)

    @property
    def tokens(self) -> int:
        """The number of tokens that the model ran over."""
        return self.prefilled + self.decode

    def steps(self) -> Iterator[int]:
        """Yield the number of tokens of every forward pass, in order."""
        yield from self.prefill
        yield from repeat(1, self.decode)


@dataclass(frozen=True)
class CaptureMetadata:
    """What a capture says of its model, in Python types. :func:`parse_metadata` makes it.

    Attributes:
        model: The document ``model`` as it stands; empty where the capture has none.
        rope: The document ``rope`` as it stands (transformers' ``rope_parameters``); None where keys are not
            rotated or where the capture does not say.
        common_scale: The attention scale (the factor of q . k) of every layer that ``layer_scales`` does not name.
        layer_scales: The attention scale by layer index. Every scale is finite and above zero.
        needles: The facts planted in the text, empty where there are none. It is None where the capture has a
            document ``needles`` that is not as the format says.
        schedule: How the model was run, or None where the capture does not say.
        dtype: torch's name of the dtype that the model computed in, or None where the capture does not say.
        implementation: transformers' name of the attention, or None where the capture does not say.

    """

    model: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] | None = None
    common_scale: float | None = None
    layer_scales: Mapping[int, float] = field(default_factory=dict)
    needles: tuple[NeedleEntry, ...] | None = ()
    schedule: Schedule | None = None
    dtype: str | None = None
    implementation: str | None = None

    @property
    def model_name(self) -> str | None:
        """The model's name with unprintable characters replaced by ``?``, or None where there is none."""
        return _printable(self.model.get("name"))

    @property
    def weights_sha256(self) -> str | None:
        """The SHA-256 of the model's weights as the capture spells it, or None where it names no weights."""
        return _printable(self.model.get("weights_sha256"))

    @property
    def config_sha256(self) -> str | None:
        """The SHA-256 of the model's ``config.json``, or None where the capture names none, as for GGUF files."""
        return _printable(self.model.get("config_sha256"))

    @property
    def head_dim(self) -> int | None:
        """The number of dimensions of a key, or None where ``model`` does not say."""
        value = self.model.get("head_dim")
        return value if _is_index(value) and 0 < value <= MAX_HEAD_DIM else None

    @property
    def partial_rotary_factor(self) -> float | None:
        """The share of a key's dimensions that RoPE rotates, above 0 and at most 1.

        It is 1 where ``rope`` does not mention it, and None where there is no ``rope`` or its entry makes no sense.
        """
        if self.rope is None:
            return None
        factor = _positive(self.rope.get("partial_rotary_factor", 1))
        return factor if factor is not None and factor <= 1 else None

    @property
    def rotary_dimensions(self) -> int | None:
        """How many of a key's first dimensions RoPE rotates, or None where the capture does not say."""
        head_dim, factor = self.head_dim, self.partial_rotary_factor
        return None if head_dim is None or factor is None else int(head_dim * factor)

    def schedule_of(self, tokens: int) -> Schedule | None:
        """How a text of so many tokens was run, or None where the capture does not say it of all of them."""
        return self.schedule if self.schedule is not None and self.schedule.tokens == tokens else None

    def attention_scale(self, layer: int) -> float | None:
        """The factor of q . k in a layer, or None where the capture does not say."""
        return self.layer_scales.get(layer, self.common_scale)


def parse_metadata(metadata: Mapping[str, str]) -> CaptureMetadata:
    """Parse the ``__metadata__`` of a capture or of a ``.kvp`` file made from one. It never raises."""
    model, rope, attention = (_mapping(parse_value(metadata.get(name))) for name in ("model", "rope", "attention"))
    attention = attention or {}
    scale = attention.get("scale")
    by_layer = enumerate(scale) if isinstance(scale, list) else ()
    return CaptureMetadata(
        model=model or {},
        rope=rope,
        common_scale=_positive(scale),
        layer_scales={layer: found for layer, value in by_layer if (found := _positive(value)) is not None},
        needles=_needles(metadata),
        schedule=_schedule(parse_value(metadata.get("schedule"))),
        dtype=_printable(parse_value(metadata.get("dtype"))),
        implementation=_printable(attention.get("implementation")),
    )


def parse_values(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Every value of the metadata by its key, in the order of keys; a value that is not JSON stays a string."""
    return {key: parse_value(value, otherwise=value) for key, value in sorted(metadata.items())}


def parse_value(text: object, otherwise: Any = None) -> Any:
    """Parse one JSON document, or return ``otherwise`` where it is none that can be read.

    Numbers that are not finite (``NaN``, ``Infinity``, ``1e999``) become None. A document that is nested more deeply
    than :data:`MAX_DEPTH` cannot be read, and neither can one that has an integer of thousands of digits, or text that
    is not Unicode (half of a surrogate pair).
    """
    if not isinstance(text, str):
        return otherwise
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return otherwise
    return value if _is_shallow(value) and is_unicode(value, text.encode(errors="surrogatepass")) else otherwise


def _finite(text: str) -> float | None:
    value = float(text)
    return value if isfinite(value) else None


def _is_shallow(value: Any) -> bool:
    """Whether no list or object lies deeper than :data:`MAX_DEPTH`, counted without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for outer in level for item in _items(outer) if isinstance(item, list | dict)]
        if not level:
            return True
    return False


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _is_index(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _positive(value: Any) -> float | None:
    """A finite number above zero as a float, or None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # An integer may be larger than every float.
        return None
    return number if isfinite(number) and number > 0 else None


def _schedule(value: Any) -> Schedule | None:
    """The schedule, or None where a number is missing or is not believed."""
    prefill, decode = (value.get("prefill"), value.get("decode")) if isinstance(value, dict) else (None, None)
    if not isinstance(prefill, list) or not all(_is_index(size) and size for size in prefill) or not _is_index(decode):
        return None
    found = Schedule(tuple(prefill), decode)
    return found if found.tokens <= MAX_TOKENS else None


def _printable(value: Any) -> str | None:
    if not isinstance(value, str) or not value:
        return None
    return "".join(letter if letter.isprintable() else "?" for letter in value)


def _needles(metadata: Mapping[str, str]) -> tuple[NeedleEntry, ...] | None:
    if "needles" not in metadata:
        return ()
    entries = parse_value(metadata["needles"])
    if not isinstance(entries, list):
        return None
    needles = [_needle(entry) for entry in entries]
    return None if None in needles else tuple(needle for needle in needles if needle is not None)


def _needle(entry: Any) -> NeedleEntry | None:
    """One entry of ``needles``, or None where a field is missing or has the wrong type."""
    if not isinstance(entry, dict):
        return None
    question, answer, position = (entry.get(name) for name in ("question", "answer", "position"))
    if not isinstance(question, str) or not isinstance(answer, str) or not _is_index(position):
        return None
    return NeedleEntry(question, answer, position)

"""What a capture records besides keys and values: token ids, attention mass and probe queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import FormatError
from kvpack.formats.captures import FLOAT_DTYPES, layer_of
from kvpack.formats.safetensors import TensorSpec
from kvpack.numerics.floats import Bits, to_float32

Floats = NDArray[np.float32]


class Reader(Protocol):
    """A capture or a ``.kvp`` file."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Return every tensor's entry by name."""

    def read(self, name: str, /) -> Bits:
        """Return the bit patterns of a tensor in its shape."""


def layer_tensors(source: Reader) -> dict[int, dict[str, str]]:
    """Return the names of a cache's keys and values: tensors ``layers.{i}.keys|values`` that are floats ``[H, T, D]``.

    The result maps the layer's index to the tensors' names by ``"keys"`` and ``"values"``. A layer may have only one of
    the two. Layers ascend, and keys come before values.
    """
    found = [
        (layer, name.rsplit(".", 1)[1], name)
        for name, spec in source.tensors.items()
        if (layer := layer_of(spec)) is not None
    ]
    layers: dict[int, dict[str, str]] = {}
    for index, what, name in sorted(found):
        layers.setdefault(index, {})[what] = name
    return layers


def token_ids(source: Reader) -> NDArray[np.int32] | None:
    """Return the token ids ``[T]`` from the text's first token on, or None if they are missing or malformed."""
    entry = source.tensors.get("tokens")
    if entry is None or entry.dtype != "I32" or len(entry.shape) != 1:
        return None
    return source.read("tokens").view(np.int32)


def preceded(tokens: NDArray[np.int32] | None, before: NDArray[np.int32] | None) -> NDArray[np.int32] | None:
    """Return token ids with those of the text ``before`` them, or None if they are unknown."""
    return tokens if tokens is None or before is None else np.concatenate([before, tokens])


def attention_mass(source: Reader) -> Floats | None:
    """Return each token's attention mass ``[T]``, the mean over layers and heads, or None if the capture has none."""
    if not _is_floats(source, "attention_mass"):
        return None
    bits, dtype = source.read("attention_mass"), source.tensors["attention_mass"].dtype
    mass: Floats = to_float32(bits, dtype).mean((0, 1))
    return mass


def has_queries(source: Reader) -> bool:
    """Return whether any layer has probe queries."""
    return any(name.startswith("queries.") and _is_floats(source, name) for name in source.tensors)


def probe_queries(source: Reader, layer: int) -> Floats | None:
    """Return the probe queries of a layer, ``[H_q, P, D]``, after RoPE, or None if the layer has none."""
    name = f"queries.{layer}"
    if not _is_floats(source, name):
        return None
    return to_float32(source.read(name), source.tensors[name].dtype)


def probe_positions(source: Reader) -> NDArray[np.integer[Any]] | None:
    """Return the tokens ``[P]`` at which the probe queries were taken, or None if the capture does not say.

    Raises:
        FormatError: ``query_positions`` is not a list of whole numbers.

    """
    entry = source.tensors.get("query_positions")
    if entry is None:
        return None
    if len(entry.shape) != 1 or entry.dtype[0] not in "IU":
        found = f"{entry.dtype} {list(entry.declared_shape)}"
        raise FormatError(f"query_positions is {found}, not a list of whole numbers")
    bits = np.ascontiguousarray(source.read("query_positions"))
    return bits.view(f"<{entry.dtype[0].lower()}{entry.itemsize}")


def _is_floats(source: Reader, name: str) -> bool:
    entry = source.tensors.get(name)
    return entry is not None and len(entry.shape) == 3 and entry.dtype in FLOAT_DTYPES

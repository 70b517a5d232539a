"""What a cache must agree in to be served: its model, and how its tensors look. Another identity is a miss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvpack.cache.metadata import parse_metadata, parse_value
from kvpack.codecs.protocol import Codec
from kvpack.errors import MismatchError
from kvpack.formats.captures import layer_of
from kvpack.formats.safetensors import TensorSpec

DOCUMENTS = ("model", "adapters", "tokenizer", "rope", "layer_classes", "dtype")
"""The documents of a capture's metadata that are a part of its identity, where it has them."""

Document = dict[str, Any]


def identity_of(metadata: Mapping[str, str], tensors: Mapping[str, TensorSpec]) -> Document:
    """Return the identity of a cache.

    It has the documents :data:`DOCUMENTS` of its metadata without the model's name, the scale of attention, and of
    each tensor of keys or values the name, the dtype, the heads and the dimensions.

    Raises:
        MismatchError: The metadata do not say which weights made the cache, so it could be served to another model.

    """
    if parse_metadata(metadata).weights_sha256 is None:
        raise MismatchError("does not say which weights made it (metadata model.weights_sha256): it cannot be stored")
    found = {name: parse_value(metadata[name], metadata[name]) for name in DOCUMENTS if name in metadata}
    found["model"] = {name: value for name, value in found["model"].items() if name != "name"}
    found["attention"] = _scale(metadata)
    found["tensors"] = sorted(
        [entry.name, entry.dtype, entry.shape[0], entry.shape[2]]
        for entry in tensors.values()
        if layer_of(entry) is not None
    )
    return found


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what an object keeps of a capture's metadata: its identity, and the versions that made it.

    Documents are verbatim, but of ``attention`` the scale alone is kept.
    """
    kept = {name: metadata[name] for name in (*DOCUMENTS, "versions") if name in metadata}
    scale = _scale(metadata)
    return kept if scale is None else {**kept, "attention": json.dumps({"scale": scale})}


def _scale(metadata: Mapping[str, str]) -> Any:
    attention = parse_value(metadata.get("attention"))
    return attention.get("scale") if isinstance(attention, dict) else None


def recipe_of(codec: Codec, profile: str | None, window: int) -> Document:
    """Return a recipe: the codec as a file carries it, the SHA-256 of its profile, and the tokens of a window."""
    return {"codec": codec.to_json(), "profile": profile, "window": window}

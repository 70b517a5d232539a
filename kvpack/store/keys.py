"""Names in a store: chained HMAC-SHA-256 under the store's own random key, so that names do not tell prompts."""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 32
NAME_DIGITS = 64
"""The length of a name: 32 bytes as lower-case hexadecimal digits."""

Ids = NDArray[np.int32]


def new_key() -> bytes:
    """Return a random key."""
    return secrets.token_bytes(KEY_BYTES)


def canonical(document: Any) -> bytes:
    """Return a document as JSON in UTF-8 with sorted keys and without spaces: equal documents give equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def tag(key: bytes, purpose: str, data: bytes) -> str:
    """Return the HMAC-SHA-256 of ``data`` for one purpose, as :data:`NAME_DIGITS` hexadecimal digits."""
    return hmac.new(key, purpose.encode() + b"\0" + data, sha256).hexdigest()


def kind_name(key: bytes, document: Any) -> str:
    """Return the name of a kind: of an identity and a recipe. It is the parent of the kind's first objects."""
    return tag(key, "kind", canonical(document))


def object_name(key: bytes, parent: str, made: str, tokens: Ids) -> str:
    """Return the name of the object with these tokens behind ``parent``, made in this way."""
    return tag(key, "object", _start(parent, made) + tokens.astype("<i4").tobytes())


def object_names(key: bytes, parent: str, made: str, tokens: Ids) -> Iterator[str]:
    """Yield the name of the object with the first n of these tokens, for n = 1, 2, ..., in one pass over them."""
    running = hmac.new(key, b"object\0" + _start(parent, made), sha256)
    for token in tokens.astype("<i4"):
        running.update(token.tobytes())
        yield running.copy().hexdigest()


def _start(parent: str, made: str) -> bytes:
    return bytes.fromhex(parent) + made.encode() + b"\0"


def is_name(text: str) -> bool:
    """Return whether a text has the form of a name."""
    return len(text) == NAME_DIGITS and set(text) <= set("0123456789abcdef")

"""The fields of a ``.kvp`` file's header. The writer, the reader and ``inspect`` share this one declaration."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from kvpack.cache.untrusted import MAX_VALUES, parse_json
from kvpack.errors import FormatError
from kvpack.formats.safetensors import Header as SourceHeader
from kvpack.formats.safetensors import parse_header
from kvpack.kvp.compact import compact, expand

MAX_CHUNK_TOKENS = 1 << 20
MAX_CODECS = 8
REPLAY = "replay"
"""The name of the codec that runs the model."""

FAST_TOKENS = 1 << 20
"""The number of tokens in a chunk of replay's token stream where the model codes none of them."""

MAX_STREAM_NAMES = 256
MAX_STAGES = 16
MAX_ORIGIN = 1 << 40


@dataclass(frozen=True)
class Header:
    """The header of a ``.kvp`` file. ``docs/format.md``, section "Header", specifies it."""

    writer: str
    """The program that wrote the file. It is information for people, and readers ignore it."""
    codecs: list[dict[str, Any]]
    """The codecs, which parts refer to by position: first the requested one, then those that store the rest."""
    chunk_tokens: int
    """The number of tokens in a chunk."""
    lossless: bool
    """Whether every tensor is restored bit for bit."""
    streams: list[str]
    """The names of the kinds of stream, sorted. The index refers to them by position."""
    profile: dict[str, str] | None
    """The name and SHA-256 of the calibration profile that decoding needs, or None."""
    dropped: list[str]
    """The names of the source's tensors that were left out at the user's request."""
    source: str
    """The source's safetensors header, verbatim. If tensors were dropped, a header of the remaining ones."""
    origin: int | None = None
    """The position in the text of the first row of keys and values, for files after which more rows may follow.

    It is None in all other files, whose headers do not have the field.
    """
    compact: bool = False
    """Whether the file stores the source's header in its compact form. This is not a field of the JSON object."""

    @classmethod
    def of(cls, source: SourceHeader, *, compact_source: bool, **others: Any) -> Header:
        """Return the header of a file that holds ``source``, in the compact form if it is asked for and possible."""
        return cls(**others, source=source.raw.decode(), compact=compact_source and compact(source) is not None)

    def to_bytes(self) -> bytes:
        """Return the header as JSON in UTF-8, with sorted keys and without spaces."""
        document = {name: getattr(self, name) for name in _CHECKS}
        if self.origin is None:
            del document["origin"]
        if self.compact:
            document["source"] = compact(self.source_header())
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, raw: bytes, most: int = MAX_VALUES) -> Header:
        """Parse a header of at most ``most`` JSON values and check every field. Unknown fields are ignored.

        Raises:
            FormatError: The header is not JSON, or a field is missing or out of range.

        """
        document = parse_json(raw, "header", most)
        if not isinstance(document, dict):
            raise FormatError("header is not a JSON object")
        is_compact = isinstance(document.get("source"), dict)
        if is_compact:
            document["source"] = expand(document["source"])
        names = [name for name in _CHECKS if name != "origin" or name in document]
        for name in names:
            if name not in document or not _CHECKS[name](document[name]):
                raise FormatError(f"header field {name!r} is missing or out of range")
        return cls(**{name: document[name] for name in names}, compact=is_compact)

    def source_header(self, most: int = MAX_VALUES) -> SourceHeader:
        """Parse and check the source's safetensors header, which may have ``most`` JSON values if it is not compact."""
        found = self.__dict__.get("_source_header")
        if found is None:
            found = parse_header(self.source.encode(), "source header", MAX_VALUES if self.compact else most)
            self.__dict__["_source_header"] = found
        return cast(SourceHeader, found)


def runs_model(codec: dict[str, Any]) -> bool:
    """Return whether decoding runs the model, by a codec's JSON form."""
    return codec.get("name") == REPLAY


def _is_strings(value: Any, limit: int) -> bool:
    return isinstance(value, list) and len(value) <= limit and all(isinstance(v, str) for v in value)


def _is_codec(value: Any) -> bool:
    """Return whether a codec has the form that ``inspect`` shows. What its stages are is for the decoder to know."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    if set(value) == {"name", "version", "configuration"}:
        return _is_stage(value)
    chains = value.get("keys"), value.get("values")
    return set(value) == {"name", "stacked", "keys", "values"} and all(
        isinstance(chain, list) and 2 <= len(chain) <= MAX_STAGES and all(map(_is_stage, chain)) for chain in chains
    )


def _is_stage(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"name", "version", "configuration"}
        and isinstance(value["name"], str)
        and isinstance(value["version"], int)
        and isinstance(value["configuration"], dict)
    )


def _is_profile(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"name", "sha256"}
        and isinstance(value["name"], str)
        and isinstance(value["sha256"], str)
        and re.fullmatch("[0-9a-f]{64}", value["sha256"]) is not None
    )


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "writer": lambda v: isinstance(v, str),
    "codecs": lambda v: isinstance(v, list) and 1 <= len(v) <= MAX_CODECS and all(map(_is_codec, v)),
    "chunk_tokens": lambda v: type(v) is int and 1 <= v <= MAX_CHUNK_TOKENS,
    "lossless": lambda v: isinstance(v, bool),
    "streams": lambda v: _is_strings(v, MAX_STREAM_NAMES) and v == sorted(set(v)),
    "profile": lambda v: v is None or _is_profile(v),
    "dropped": lambda v: _is_strings(v, 1 << 20),
    "source": lambda v: isinstance(v, str),
    "origin": lambda v: type(v) is int and 0 <= v <= MAX_ORIGIN,
}

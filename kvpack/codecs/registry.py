"""Build codecs from the JSON forms that files carry."""

from __future__ import annotations

from typing import Any

from kvpack.codecs.chain.chain import Chain
from kvpack.codecs.chain.codec import ChainCodec
from kvpack.codecs.low_rank import LowRank
from kvpack.codecs.low_rank.codec import LowRankCodec
from kvpack.codecs.protocol import Codec
from kvpack.codecs.replay import ReplayCodec
from kvpack.codecs.replay import codec as replay
from kvpack.errors import FormatError, UnsupportedError


def codec_from_json(document: Any) -> Codec:
    """Return the codec that :meth:`kvpack.codecs.protocol.Codec.to_json` described.

    Raises:
        FormatError: The document is not a codec.
        UnsupportedError: This kvpack does not have one of its stages.

    """
    if isinstance(document, dict) and set(document) == {"name", "version", "configuration"}:
        if (document["name"], document["version"]) != (replay.NAME, replay.VERSION):
            raise UnsupportedError(
                f"needs the codec {document['name']!r}, version {document['version']!r}: upgrade kvpack"
            )
        return ReplayCodec.from_json(document["configuration"])
    if not isinstance(document, dict) or set(document) != {"name", "stacked", "keys", "values"}:
        raise FormatError("a codec is not {name, stacked, keys, values}")
    if not isinstance(document["name"], str) or not isinstance(document["stacked"], bool):
        raise FormatError("a codec's name or its stacking has the wrong type")
    chains = Chain.from_json(document["keys"]), Chain.from_json(document["values"])
    low_rank = any(isinstance(chain.quantizer, LowRank) for chain in chains)
    try:
        return (LowRankCodec if low_rank else ChainCodec)(document["name"], document["stacked"], *chains)
    except ValueError as error:
        raise FormatError(str(error)) from None

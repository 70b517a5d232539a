"""``replay``: stores the tokens of a cache, and what the model does not compute from them again, bit for bit.

``docs/replay.md`` says what it is for and what it costs, ``docs/format.md`` specifies its streams.
"""

from kvpack.codecs.replay.codec import ReplayCodec

__all__ = ["ReplayCodec"]

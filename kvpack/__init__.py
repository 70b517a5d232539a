"""kvpack: a compressor for saved KV caches of language models."""

__version__ = "0.1.0"

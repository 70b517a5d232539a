"""Writes a captured cache as a safetensors file, the same bytes for the same cache.

The file is not written by the package ``safetensors``, for two reasons. The package sorts tensors by their dtypes and
names, where a capture has each layer's keys and values side by side in the order of the layers, so every capture would
change its bytes. And it writes to a path or makes one string of the whole file, where a capture may go to a pipe,
tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import torch

from kvpack.capture.run import CapturedCache
from kvpack.errors import UnsupportedError
from kvpack.formats.safetensors import build_header

_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
}


def write_capture(cache: CapturedCache, output: BinaryIO) -> int:
    """Write ``cache`` to ``output`` and return the file's size in bytes.

    Raises:
        UnsupportedError: A tensor has a dtype that captures do not have.

    """
    tensors = list(_tensors(cache))
    for name, tensor in tensors:
        if tensor.dtype not in _DTYPES:
            raise UnsupportedError(f"{name}: captures cannot hold {tensor.dtype}: use --dtype")
    entries = [(name, _DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors]
    header = build_header(entries, cache.metadata)
    output.write(len(header.raw).to_bytes(8, "little") + header.raw)
    for _, tensor in tensors:
        output.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return header.file_size


def _tensors(cache: CapturedCache) -> Iterator[tuple[str, torch.Tensor]]:
    for i, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        yield f"layers.{i}.keys", keys
        yield f"layers.{i}.values", values
    yield "tokens", cache.tokens
    if len(cache.continuation):
        yield "continuation", cache.continuation
    yield "attention_mass", cache.attention_mass
    if len(cache.query_positions):
        for i, queries in enumerate(cache.queries):
            yield f"queries.{i}", queries
        yield "query_positions", cache.query_positions

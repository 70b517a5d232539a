"""Runs a codec over a part: bits in, streams out, and back. Pure compute, no files."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs import Chain, Codec
from kvpack.errors import CorruptError
from kvpack.floats import from_float32, to_float32
from kvpack.stages.base import Part, PlaneSpec, UnrepresentableError

Bits = NDArray[np.unsignedinteger[Any]]
"""Bit patterns of a part, ``[H, T, D]``, unsigned integers of the tensor's item size."""

__all__ = ["Bits", "chain_of", "decode", "encode", "stream_names"]


def chain_of(codec: Codec, tensor: str) -> Chain:
    """The chain for a tensor by its name: keys or values; values also for everything else."""
    return codec.keys if tensor.endswith(".keys") else codec.values


def stream_names(chain: Chain, part: Part) -> list[str]:
    """Names of the streams that :func:`encode` gives: the planes that have codes."""
    return [plane.name for plane in chain.quantizer.planes(part) if plane.size and plane.width]


def encode(chain: Chain, bits: Bits, part: Part) -> list[tuple[str, bytes]]:
    """Streams by name; planes without codes have none.

    Raises:
        UnrepresentableError: a lossy chain met values it cannot represent.

    """
    data: NDArray[Any] = bits
    if not chain.quantizer.exact:
        data = to_float32(bits, part.dtype)
        if not np.isfinite(data).all():
            raise UnrepresentableError("NaN or Inf")
        for transform in chain.transforms:
            data = transform.forward(data)
    planes = chain.quantizer.planes(part)
    codes = chain.quantizer.encode(data, part)
    return [
        (plane.name, chain.entropy.encode(code, plane))
        for plane, code in zip(planes, codes, strict=True)
        if plane.size and plane.width
    ]


def decode(chain: Chain, streams: list[tuple[str, memoryview]], part: Part) -> Bits:
    """The part's bit patterns: the very ones for exact chains, approximations for the others.

    Raises:
        CorruptError: streams that do not decode to this part.

    """
    planes = chain.quantizer.planes(part)
    if [name for name, _ in streams] != [p.name for p in planes if p.size and p.width]:
        raise CorruptError("corrupt: the part does not have the streams of its codec")
    try:
        return _decode(chain, streams, part, planes)
    except UnrepresentableError as error:
        raise CorruptError(f"corrupt: {error}") from None


def _decode(chain: Chain, streams: list[tuple[str, memoryview]], part: Part, planes: list[PlaneSpec]) -> Bits:
    remaining = iter(streams)
    codes = [
        chain.entropy.decode(next(remaining)[1], plane)
        if plane.size and plane.width
        else np.zeros(plane.shape, plane.code_dtype)
        for plane in planes
    ]
    data = chain.quantizer.decode(codes, part)
    if chain.quantizer.exact:
        return data
    for transform in reversed(chain.transforms):
        data = transform.inverse(data)
    return from_float32(data, part.dtype)

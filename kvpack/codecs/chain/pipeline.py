"""Run a chain on a part: encode bit patterns to streams, and decode them. It does not depend on files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvpack.codecs.chain.base import Codes, Floats, Part, PlaneSpec, UnrepresentableError
from kvpack.codecs.chain.chain import Chain
from kvpack.codecs.chain.quantizers.float_split import join, split, split_planes
from kvpack.codecs.context import NO_HINTS, StackHints
from kvpack.errors import CorruptError
from kvpack.numerics.floats import Bits, from_float32, to_float32

Streams = list[tuple[str, bytes]]


@dataclass(frozen=True)
class StageRoute:
    """The path of an array through a chain.

    Tokens ``[start, stop)`` are coded, and the others are kept whole. ``parts`` describe the array before each
    transform and after the last one. ``whole`` and ``planes`` describe what is stored of the kept and of the coded
    tokens.
    """

    start: int
    stop: int
    parts: tuple[Part, ...]
    whole: list[PlaneSpec]
    planes: list[PlaneSpec]

    @property
    def stored(self) -> Iterator[PlaneSpec]:
        """Yield the planes that have a stream: those with codes, of at least one bit."""
        return (plane for plane in (*self.whole, *self.planes) if plane.size and plane.width)


def route_of(chain: Chain, part: Part) -> StageRoute:
    """Return the path of ``part`` through ``chain``."""
    heads, tokens, dims = part.shape
    start, stop = chain.keep.coded(part) if chain.keep else (0, tokens)
    parts = [replace(part, shape=(heads, stop - start, dims), first=part.first + start)]
    for transform in chain.transforms:
        transform.require(parts[-1])
        parts.append(transform.output(parts[-1]))
    chain.quantizer.require(parts[-1])
    whole = split_planes(part.dtype, (heads, tokens - (stop - start), dims), "whole/") if chain.keep else []
    return StageRoute(start, stop, tuple(parts), whole, chain.quantizer.planes(parts[-1]))


def stream_names(chain: Chain, part: Part) -> list[str]:
    """Return the names of the streams that :func:`encode` gives: one for each plane that has codes."""
    return [plane.name for plane in route_of(chain, part).stored]


def encode(
    chain: Chain, bits: Bits, part: Part, hints: StackHints = NO_HINTS, reference: Floats | None = None
) -> tuple[Streams, Floats | None]:
    """Return the streams by name, and the array as decoded if the chain predicts (else None).

    Planes without codes have no stream. ``bits`` are ``[H, T, D]``, unsigned integers of the tensor's item size.
    ``reference`` is the decoded array of the keys' chain, if the values' chain predicts from it.

    Raises:
        UnrepresentableError: A lossy chain cannot represent some values.

    """
    route = route_of(chain, part)
    if chain.quantizer.exact:
        return _write(chain, route, chain.quantizer.encode(bits, part, hints)), None
    values = to_float32(bits[:, route.start : route.stop], part.dtype)
    if not np.isfinite(values).all():
        raise UnrepresentableError("NaN or Inf")
    for transform, before in zip(chain.transforms, route.parts, strict=False):
        values = transform.forward(values, before)
    decoded = None
    if chain.predictor is None:
        held = [values]
        del values  # the quantizer may let go of them before it is done
        codes = chain.quantizer.encode(held.pop(), route.parts[-1], hints)
    else:
        codes, decoded = _encode_rows(chain, values, route.parts[-1], hints, reference)
    if chain.keep:
        whole = np.concatenate([bits[:, : route.start], bits[:, route.stop :]], axis=1)
        codes = [*split(whole, part.dtype), *codes]
    return _write(chain, route, codes), decoded


def _write(chain: Chain, route: StageRoute, codes: Sequence[Codes]) -> Streams:
    streams: Streams = []
    before: dict[str, Codes] = {}
    for plane, code in zip((*route.whole, *route.planes), codes, strict=True):
        if plane.size and plane.width:
            scaled = chain.quantizer.scaled(plane, before, route.parts[-1])
            streams.append((plane.name, chain.entropy.encode(code, scaled)))
        before[plane.name] = code
    return streams


def _encode_rows(
    chain: Chain, values: Floats, part: Part, hints: StackHints, reference: Floats | None
) -> tuple[list[Codes], Floats]:
    assert chain.predictor is not None
    decoded = np.zeros(part.shape, np.float32)
    rows: list[list[Codes]] = []
    for row in range(part.shape[0]):
        expected = chain.predictor.predict(row, decoded, reference, part)
        one = replace(part, shape=(1, *part.shape[1:]), row=row)
        with np.errstate(over="ignore", invalid="ignore"):
            rows.append(chain.quantizer.encode(values[row : row + 1] - expected, one, hints))
            copies = [code.copy() for code in rows[-1]]  # decoding overwrites them
            decoded[row] = (expected + chain.quantizer.decode(copies, one))[0]
        if not np.isfinite(decoded[row]).all():
            raise UnrepresentableError("a prediction beyond float32")
    return [np.concatenate(planes) for planes in zip(*rows, strict=True)], decoded


def decode(
    chain: Chain, streams: Sequence[tuple[str, memoryview]], part: Part, reference: Floats | None = None
) -> tuple[Bits, Floats | None]:
    """Return the part's bit patterns, which are the original ones for exact chains and approximations for others.

    The second result is the same as that of :func:`encode`.

    Raises:
        CorruptError: The streams do not decode to this part.

    """
    route = route_of(chain, part)
    if [name for name, _ in streams] != [plane.name for plane in route.stored]:
        raise CorruptError("corrupt: the part does not have the streams of its codec")
    try:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # what a file says may be any number
            return _decode(chain, streams, part, route, reference)
    except UnrepresentableError as error:
        raise CorruptError(f"corrupt: {error}") from None


def _decode(
    chain: Chain, streams: Sequence[tuple[str, memoryview]], part: Part, route: StageRoute, reference: Floats | None
) -> tuple[Bits, Floats | None]:
    remaining = iter(streams)
    found: dict[str, Codes] = {}
    for plane in (*route.whole, *route.planes):
        if plane.size and plane.width:
            scaled = chain.quantizer.scaled(plane, found, route.parts[-1])
            found[plane.name] = chain.entropy.decode(next(remaining)[1], scaled)
        else:
            found[plane.name] = np.zeros(plane.shape, plane.code_dtype)
    every = list(found.values())
    whole, codes = every[: len(route.whole)], every[len(route.whole) :]
    if chain.quantizer.exact:
        return chain.quantizer.decode(codes, part), None
    decoded = None
    if chain.predictor is None:
        values = chain.quantizer.decode(codes, route.parts[-1])
    else:
        values = decoded = _decode_rows(chain, codes, route, reference)
    for transform, before in reversed(list(zip(chain.transforms, route.parts, strict=False))):
        values = transform.inverse(values, before)
    bits = from_float32(values, part.dtype)
    if chain.keep:
        kept = join(whole, part.dtype)
        bits = np.concatenate([kept[:, : route.start], bits, kept[:, route.start :]], axis=1)
    return bits, decoded


def _decode_rows(chain: Chain, codes: list[Codes], route: StageRoute, reference: Floats | None) -> Floats:
    assert chain.predictor is not None
    part = route.parts[-1]
    decoded = np.zeros(part.shape, np.float32)
    taken = [0] * len(codes)
    for row in range(part.shape[0]):
        one = replace(part, shape=(1, *part.shape[1:]), row=row)
        counts = [plane.shape[0] for plane in chain.quantizer.planes(one)]
        mine = [code[at : at + count] for code, at, count in zip(codes, taken, counts, strict=True)]
        taken = [at + count for at, count in zip(taken, counts, strict=True)]
        with np.errstate(over="ignore", invalid="ignore"):
            expected = chain.predictor.predict(row, decoded, reference, part)
            decoded[row] = (expected + chain.quantizer.decode(mine, one))[0]
    return decoded

"""The token ids of a text as a stream, in chunks: compressed by zstd, or coded by the model's own predictions.

A chunk that the model codes is one integer. Coding a token of frequency f, which begins at the cumulative frequency c
of a total m, turns the integer x into ``(x // f) * m + x % f + c``; decoding undoes it. This is an asymmetric numeral
system (Duda, arXiv 1311.2540) that never writes out its state, so it loses nothing to rounding. Tokens are coded last
to first, starting from 0, so that decoding gives them in order and must end with 0.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import zstandard
from numpy.typing import NDArray

from kvpack.codecs.model import LanguageModel, Steps
from kvpack.errors import CorruptError, MismatchError

Tokens = NDArray[np.int32]

FAST, MODEL = 0, 1
"""The two ways to code a chunk."""

CHUNK = struct.Struct("<BII")
"""How a chunk is coded, the size of its payload in bytes, and the CRC-32 of its token ids as little-endian integers."""

ZSTD_LEVEL = 19

LOGIT_STEP = 64
"""Logits are rounded to this many steps a nat."""

DECAY = 4228380000
"""2**32 * exp(-1 / 64), rounded: the factor between the frequencies of two logits that are one step apart."""

MAX_TOKEN_BYTES = 8
"""The most bytes that a token may take in a chunk that the model codes."""


def _frequencies() -> NDArray[np.int64]:
    """Return the frequencies of logits that lie 0, 1, 2, ... steps below the largest one, down to the first 1."""
    found, exact = [], 1 << 62
    while (exact >> 38) > 1:
        found.append(exact >> 38)
        exact = exact * DECAY >> 32
    return np.array([*found, 1], np.int64)


FREQUENCIES = _frequencies()


def frequencies(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return a positive frequency for every token from its logit, ``[V]``, in integers."""
    known = np.nan_to_num(logits.astype(np.float64), nan=-np.inf, posinf=1e30, neginf=-np.inf)
    below = np.minimum((known.max() - known) * LOGIT_STEP, len(FREQUENCIES) - 1)
    steps = np.rint(np.nan_to_num(below)).astype(np.int64)
    found: NDArray[np.int64] = FREQUENCIES[steps]
    return found


def encode(tokens: Tokens, chunk: int, steps: Steps | None, vocabulary: int = 0) -> bytes:
    """Return the stream of token ids ``[T]`` in chunks of ``chunk`` tokens.

    With ``steps`` the model codes every chunk, and the chunk is decoded at once, by the same single steps that a
    decoder makes. A chunk that does not decode, because the model does not repeat its predictions, is compressed by
    zstd instead. All ids must be below ``vocabulary`` then.
    """
    pieces = []
    for first in range(0, len(tokens), chunk):
        some = tokens[first : first + chunk]
        payload = None
        if steps is not None:
            payload = _by_model(some, tokens[:first], steps, vocabulary)
        way = FAST if payload is None else MODEL
        payload = _fast(some) if payload is None else payload
        pieces += [CHUNK.pack(way, len(payload), _crc(some)), payload]
    return b"".join(pieces)


def decode(data: memoryview, count: int, chunk: int, model: LanguageModel | None) -> Tokens:
    """Return the ``count`` token ids of a stream. The ``model`` reads the text only if it has coded a chunk.

    Raises:
        CorruptError: The stream does not hold that many tokens.
        MismatchError: There is no model, or it does not predict here what it predicted where the stream was written.

    """
    heads = _chunks(data, count, chunk)
    last = max((first for first, _, way, _, _ in heads if way == MODEL), default=-1)
    if last >= 0 and model is None:
        raise MismatchError("needs the model that made the cache: give it with --model")
    reader, size = (model.steps(count), model.vocabulary) if model is not None and last >= 0 else (None, 0)
    out = np.empty(count, np.int32)
    for first, stop, way, payload, crc in heads:
        before = out[first - 1 : first]
        if way == FAST:
            out[first:stop] = _fast_back(payload, stop - first)
            if reader is not None and first < last:  # later chunks are predicted from these tokens
                for token in [*before, *out[first : stop - 1]]:
                    reader.logits(int(token))
        else:
            assert reader is not None
            found = _from_model(int.from_bytes(payload, "little"), stop - first, before, reader, size)
            if found is None:
                raise MismatchError(_DRIFTED)
            out[first:stop] = found
        if _crc(out[first:stop]) != crc:
            raise MismatchError(_DRIFTED) if way == MODEL else CorruptError("corrupt: token ids do not match their sum")
    return out


_DRIFTED = (
    "the model's predictions are not those of the machine that coded the tokens: decompress it there; "
    "files compressed with --token-coder fast keep their tokens on every machine"
)


def _chunks(data: memoryview, count: int, chunk: int) -> list[tuple[int, int, int, memoryview, int]]:
    found, at = [], 0
    for first in range(0, count, chunk):
        if len(data) - at < CHUNK.size:
            raise CorruptError("corrupt: the token ids end early")
        stop = min(first + chunk, count)
        way, size, crc = CHUNK.unpack_from(data, at)
        at += CHUNK.size
        payload = data[at : at + size]
        at += size
        if (
            way not in (FAST, MODEL)
            or len(payload) != size
            or (way == MODEL and size > MAX_TOKEN_BYTES * (stop - first))
        ):
            raise CorruptError("corrupt: a chunk of token ids has an unknown coding or a wrong size")
        found.append((first, stop, way, payload, crc))
    if at != len(data):
        raise CorruptError("corrupt: the token ids are followed by unknown data")
    return found


def _crc(tokens: Tokens) -> int:
    return zlib.crc32(np.ascontiguousarray(tokens, "<i4").tobytes())


def _fast(tokens: Tokens) -> bytes:
    """Return the size of an integer in bytes, then a zstd frame of the ids as unsigned integers of that size."""
    ids = tokens.view(np.uint32)
    size = 1 if ids.max() < 1 << 8 else 2 if ids.max() < 1 << 16 else 4
    return bytes([size]) + zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(ids.astype(f"<u{size}").tobytes())


def _fast_back(payload: memoryview, count: int) -> Tokens:
    size = payload[0] if len(payload) else 0
    if size not in (1, 2, 4):
        raise CorruptError("corrupt: token ids of an unknown size")
    try:
        if zstandard.frame_content_size(payload[1:]) != size * count:
            raise CorruptError("corrupt: a chunk of token ids does not hold its tokens")
        raw = zstandard.ZstdDecompressor().decompress(payload[1:], max_output_size=size * count, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptError(f"corrupt: token ids do not decode ({error})") from None
    return np.frombuffer(raw, f"<u{size}").astype(np.uint32).view(np.int32)


def _by_model(tokens: Tokens, before: Tokens, steps: Steps, vocabulary: int) -> bytes | None:
    """Return the integer of a chunk as bytes, or None if the model does not decode it again."""
    coded = []
    for at, token in enumerate(tokens):
        fed = tokens[at - 1] if at else before[-1] if len(before) else None
        table = _table(steps, fed, vocabulary)
        coded.append((int(table[token]), int(table[:token].sum()), int(table.sum())))
    value = 0
    for frequency, start, total in reversed(coded):
        value = value // frequency * total + value % frequency + start
    steps.rewind(max(len(before) - 1, 0))
    found = _from_model(value, len(tokens), before[-1:], steps, vocabulary)
    if found is None or not np.array_equal(found, tokens):
        steps.rewind(max(len(before) - 1, 0))
        for token in [*before[-1:], *tokens[:-1]]:
            steps.logits(int(token))
        return None
    return value.to_bytes((value.bit_length() + 7) // 8, "little")


def _from_model(value: int, count: int, before: Tokens, steps: Steps, vocabulary: int) -> Tokens | None:
    """Return the ``count`` tokens of a chunk, or None if the integer does not end with 0."""
    out = np.empty(count, np.int32)
    fed = before[-1] if len(before) else None
    for at in range(count):
        table = _table(steps, fed, vocabulary)
        sums = np.cumsum(table)
        value, slot = divmod(value, int(sums[-1]))
        token = int(np.searchsorted(sums, slot, side="right"))
        value = value * int(table[token]) + slot - int(sums[token] - table[token])
        out[at] = fed = token
    return out if value == 0 else None


def _table(steps: Steps, fed: int | None, vocabulary: int) -> NDArray[np.int64]:
    """Return the frequencies of the token that follows ``fed``. The first token of a text is any of the vocabulary."""
    return np.ones(vocabulary, np.int64) if fed is None else frequencies(steps.logits(int(fed)))

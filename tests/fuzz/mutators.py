"""The form of fuzzing's inputs, and how they are changed: bytes, integers and JSON, so that inputs stay nearly sound.

Most inputs are a list of **pieces**: a header, an index, the bytes of each stream. A target puts a file together from
them and computes all lengths and checksums itself, so a change gets as far as what it changes is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

NUMBERS = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 1023, 2048, 4095, 4096, 65535, 65536),
    *(2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**47, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
"""Integers at which something may change."""

WORDS = (
    *("", "x", "*", "keys", "values", "tokens", "layers.0.keys", "layers.0.values", "layers.1.keys", "layers.9.keys"),
    *("layers.*.keys", "queries.0", "attention_mass", "query_positions", "BF16", "F16", "F32", "F64", "I32", "I64"),
    *("U8", "BOOL", "F4", "F6_E2M3", "F8_E4M3", "C64", "float_split", "byte_planes", "affine", "lloyd_max", "higgs"),
    *("anchor_delta", "component_groups", "dead_zone", "low_rank", "keep", "rotation", "unrope", "merge_heads", "klt"),
    *("token_klt", "cross_layer", "bitpack", "rans", "scaled_rans", "zstd", "deflate", "replay", "fisher", "kvtc.keys"),
    *("aquakv-3.keys", "token", "channel", "origin", "__metadata__", "schedule", "model", "rope", "attention", "store"),
    *("\ud800", "\x1b[31m", "\u202e", "é", "0" * 64, "NaN", "1e999", "[" * 70, "9" * 70, "a" * 300),
)

MOST = 1 << 16
"""Inputs do not grow beyond this many bytes."""


def join(pieces: Sequence[bytes]) -> bytes:
    """Write pieces one after another, each behind its length."""
    return b"".join(len(piece).to_bytes(4, "little") + piece for piece in pieces)


def split(data: bytes) -> list[bytes]:
    """Undo :func:`join`. Any bytes are some pieces: the last one ends where the data does."""
    pieces, at = [], 0
    while at < len(data):
        start = at + 4
        at = start + int.from_bytes(data[at:start], "little")
        pieces.append(data[start:at])
    return pieces


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Change bits, bytes or integers, or insert, repeat, move, cut away or overwrite a range."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        size, way = len(found), rng.randrange(9)
        at = rng.randrange(size + 1)
        length = min(rng.choice((1, 2, 4, 8, 16, 64)), size - at)
        if way == 0 and at < size:
            found[at] ^= 1 << rng.randrange(8)
        elif way == 1 and at < size:
            found[at] = rng.randrange(256)
        elif way == 2:
            found[at:at] = rng.randbytes(rng.choice((1, 2, 4, 16)))
        elif way == 3:
            del found[at : at + length]
        elif way == 4:
            other = rng.randrange(size + 1)
            found[at : at + length] = found[other : other + length]
        elif way == 5:
            width = rng.choice((1, 2, 4, 8))
            found[at : at + width] = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        elif way == 6:
            found[at : at + length] = bytes([rng.choice((0, 1, 127, 128, 255))]) * length
        elif way == 7:
            width = rng.choice((1, 2, 4, 8))
            value = int.from_bytes(found[at : at + width], "little") + rng.randrange(-9, 10)
            found[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        elif rng.random() < 0.3:
            del found[at:]
    return bytes(found[:MOST])


def mutate_json(data: bytes, rng: Random) -> bytes:
    """Change values of a JSON document, also of one within a string. What is not JSON is changed as bytes."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    if rng.random() < 0.05:
        return mutate_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document = _changed(document, rng)
    return json.dumps(document, separators=(",", ":")).encode()[:MOST]


def _changed(value: Any, rng: Random) -> Any:
    """Return a document with one change, somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.97:
        return _changed_object(value, rng)
    if isinstance(value, list) and value and rng.random() < 0.97:
        return _changed_list(value, rng)
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.95:
        return mutate_json(value.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")
    return _another(value, rng)


def _changed_object(value: dict[str, Any], rng: Random) -> dict[str, Any]:
    names, way = [*value], rng.random()
    name = rng.choice(names)
    if way < 0.84:
        return {**value, name: _changed(value[name], rng)}
    if way < 0.88:
        return {other: value[other] for other in names if other != name}
    if way < 0.92:
        return {rng.choice(WORDS) if other == name else other: value[other] for other in names}
    if way < 0.96:
        return {**value, rng.choice((*WORDS, name + "x")): value[rng.choice(names)]}
    rng.shuffle(names)
    return {other: value[other] for other in names}


def _changed_list(value: list[Any], rng: Random) -> list[Any]:
    found, at, way = list(value), rng.randrange(len(value)), rng.random()
    if way < 0.8:
        found[at] = _changed(found[at], rng)
    elif way < 0.86:
        del found[at]
    elif way < 0.92:
        found.insert(at, rng.choice(value))
    elif way < 0.96:
        found += found[: rng.choice((1, 2, 20, 70))]
    else:
        rng.shuffle(found)
    return found


def _another(value: Any, rng: Random) -> Any:
    """Return another value, most often of the same type."""
    if rng.random() < 0.15:
        return rng.choice((None, True, False, 0, -1, 1.5, 1e300, "", [], {}, [[]], rng.choice(NUMBERS)))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        near = value + rng.choice((-128, -8, -2, -1, 1, 2, 8, 128))
        return rng.choice((near, near, near, 2 * value, value // 2, -value, rng.choice(NUMBERS)))
    if isinstance(value, float):
        return rng.choice((0.0, -value, value * 2, 1e-310, 1e308, 3))
    if isinstance(value, str):
        return rng.choice((rng.choice(WORDS), value + rng.choice(WORDS), value[:-1], value[::-1]))
    return rng.choice((value, None, rng.choice(NUMBERS), rng.choice(WORDS)))


def of_pieces(first: Sequence[Mutator], rest: Mutator = mutate_bytes) -> Mutator:
    """Return a mutator of pieces. The first ones have mutators of their own, and all others ``rest``."""

    def mutate(data: bytes, rng: Random) -> bytes:
        pieces = split(data)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            way, at = rng.random(), rng.randrange(len(pieces) + 1)
            if way < 0.96 and pieces:
                at = (
                    min(at, len(pieces) - 1) if rng.random() < 0.7 else rng.randrange(min(len(first) or 1, len(pieces)))
                )
                pieces[at] = (first[at] if at < len(first) else rest)(pieces[at], rng)
            elif way < 0.98:
                pieces.insert(at, rng.choice(pieces) if pieces else b"")
            elif pieces:
                del pieces[min(at, len(pieces) - 1)]
        return join(pieces)[:MOST]

    return mutate

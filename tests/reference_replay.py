"""The codec ``replay`` and compact source headers in the second decoder, in the order of ``docs/format.md``.

Imports nothing of kvpack. A language model is given as two functions, because the format does not say how one runs.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from reference_stages import GOLDEN, ITEM_BYTES, bitpack, mix, need, rans


@dataclass
class Computed:
    """What a model gives: its cache over token ids, and the logits of the token that follows some token ids."""

    cache: Callable[[np.ndarray], dict[str, np.ndarray]]
    logits: Callable[[list[int]], np.ndarray] | None = None


# ---- Compact source headers ----------------------------------------------------------------------------------------


def verbatim(source: Any) -> bytes:
    """The source header of a file's header: a string as it is, a compact form written out."""
    if isinstance(source, str):
        return source.encode()
    tensors: list[Any] = []
    for item in source["tensors"]:
        if isinstance(item[0], str):
            tensors.append(item)
            continue
        count, *run = item
        tensors += [[name.replace("*", str(i)), *rest] for i in range(count) for name, *rest in run]
    metadata = source["metadata"]
    document: dict[str, Any] = {"__metadata__": {key: metadata[key] for key in sorted(metadata)}} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        need(name not in document, "a name twice")
        size = math.prod(shape) * ITEM_BYTES[dtype]
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    return raw + b" " * (-len(raw) % 8)


# ---- Token ids -----------------------------------------------------------------------------------------------------


def token_ids(data: bytes, count: int, chunk: int, model: Computed | None) -> np.ndarray:
    out: list[int] = []
    at = 0
    while len(out) < count:
        way, size, crc = struct.unpack_from("<BII", data, at)
        payload = data[at + 9 : at + 9 + size]
        at += 9 + size
        number = min(chunk, count - len(out))
        need(way in (0, 1) and len(payload) == size, "a chunk of tokens")
        found = fast(payload, number) if way == 0 else predicted(payload, number, out, model)
        need(zlib.crc32(np.array(found, "<u4").tobytes()) == crc, "CRC-32 of tokens")
        out += found
    need(at == len(data), "end of tokens")
    return np.array(out, "<u4").view("<i4")


def fast(payload: bytes, count: int) -> list[int]:
    import zstandard

    need(payload[0] in (1, 2, 4), "size of an id")
    raw = zstandard.ZstdDecompressor().decompress(payload[1:])
    need(len(raw) == payload[0] * count, "number of tokens")
    ids: list[int] = np.frombuffer(raw, f"<u{payload[0]}").tolist()
    return ids


def predicted(payload: bytes, count: int, before: list[int], model: Computed | None) -> list[int]:
    need(model is not None and model.logits is not None and len(payload) <= 8 * count, "a model")
    assert model is not None
    assert model.logits is not None
    table = [1 << 24]
    exact = 1 << 62
    while table[-1] > 1:
        exact = (exact * 4228380000) >> 32
        table.append(max(exact >> 38, 1))
    value = int.from_bytes(payload, "little")
    found: list[int] = []
    for _ in range(count):
        logits = model.logits([*before, *found]).astype(np.float64)
        if not before and not found:
            frequencies = [1] * len(logits)
        else:
            steps = np.rint((logits.max() - logits) * 64).clip(0, len(table) - 1)
            frequencies = [table[int(step)] for step in steps]
        slot, start, token = value % sum(frequencies), 0, 0
        while start + frequencies[token] <= slot:
            start += frequencies[token]
            token += 1
        value = frequencies[token] * (value // sum(frequencies)) + slot - start
        found.append(token)
    need(value == 0, "the end of a chunk")
    return found


# ---- Residuals -----------------------------------------------------------------------------------------------------


def residual(streams: dict[str, bytes], part: dict[str, Any], computed: np.ndarray) -> np.ndarray:
    """Bit patterns of a part whose model computes ``computed``."""
    shape, width = part["shape"], 8 * ITEM_BYTES[part["tensor"]["dtype"]]
    codes = np.zeros(shape, np.uint64).reshape(-1)
    need(set(streams) in (set(), {"residual"}, {"residual", "residual/raw"}), "streams of a residual")
    if streams:
        symbols = rans(streams["residual"], shape, 7).reshape(-1)
        need(int(symbols.max()) < 32 + 2 * (width - 5), "a symbol")
        raw = streams.get("residual/raw", b"")
        codes = symbols.astype(np.uint64)
        for symbol in range(32, 32 + 2 * (width - 5)):
            octave, half = 5 + (symbol - 32) // 2, (symbol - 32) % 2
            where = symbols == symbol
            size = (int(where.sum()) * (octave - 1) + 7) // 8
            low = bitpack(raw[:size], (int(where.sum()),), octave - 1)
            codes[where] = np.uint64((1 << octave) + half * (1 << (octave - 1))) + low
            raw = raw[size:]
        need(not raw, "end of raw bits")
    numbers = []
    for code, bits in zip(codes.tolist(), computed.reshape(-1).tolist(), strict=True):
        difference = code // 2 if code % 2 == 0 else -(code + 1) // 2
        top = 1 << (width - 1)
        order = (2 * top - 1 - bits if bits & top else bits + top) + difference
        order %= 2 * top
        numbers.append(order - top if order & top else 2 * top - 1 - order)
    return np.array(numbers, f"<u{width // 8}").reshape(shape)


def sample(cache: dict[str, np.ndarray], tensors: list[dict[str, Any]], first: int) -> str:
    """The sample of a cache whose first forward pass had ``first`` tokens, in hexadecimal digits."""
    flat = np.concatenate([cache[t["name"]][:, :first].reshape(-1) for t in tensors if t["layer"] and t["bytes"]])
    count = len(flat)
    if count > 64:
        z = mix(np.arange(1, 65, dtype=np.uint64) * np.uint64(GOLDEN))
        flat = flat[[i * count // 64 + int(z[i]) % (count // 64) for i in range(64)]]
    return (flat & 0xFFFF).astype("<u2").tobytes().hex()

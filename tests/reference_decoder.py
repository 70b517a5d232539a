"""A second, educational decoder of ``.kvp`` files, in the order of ``docs/format.md``.

Imports nothing of kvpack: the standard library and numpy alone, and the ``zstandard`` package for the streams that
are Zstandard frames (RFC 8878), which neither has a decoder for. Slow and plain on purpose.

    decode(data, profile, model, before) -> bytes of the safetensors file; ``profile`` is the .kvprofile's bytes, where
    it takes one, ``model`` the language model, where it takes one, and ``before`` the ids of the tokens before its
    origin, where it has one and predicts from them
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import reference_replay
from reference_replay import Computed, verbatim
from reference_stages import (
    DEQUANTIZE,
    ENTROPY,
    GOLDEN,
    ITEM_BYTES,
    MANTISSA_BITS,
    PLANES,
    Array,
    Profile,
    cross_layer,
    float_planes,
    join,
    mix,
    need,
    scaled_rans,
    scales_of,
    to_bits,
    transformed,
    untransform,
)

MASK64 = (1 << 64) - 1
NEWER_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")
PACKED_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")
"""Their elements are smaller than a byte: tensors of them are rows of bytes."""


# ---- Checksums -----------------------------------------------------------------------------------------------------


def checksum(data: bytes) -> int:
    words = np.frombuffer(data + bytes(-len(data) % 8), "<u8")
    keys = np.arange(1, len(words) + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return (int(mix(words + keys).sum(dtype=np.uint64)) + len(data)) & MASK64


# ---- Container -----------------------------------------------------------------------------------------------------


def decode(data: bytes, profile: bytes = b"", model: Computed | None = None, before: Sequence[int] = ()) -> bytes:
    """The whole safetensors file that ``data`` holds.

    Raises:
        ValueError: anything that is not as the format says.

    """
    magic, major, _, critical, _, header_length, header_crc, own = struct.unpack_from("<8sHHIIIII", data)
    need(magic == b"\x89KVP\r\n\x1a\n", "magic")
    need(zlib.crc32(data[:28]) == own, "prologue")
    need(major == 1 and critical & ~0b1111 == 0, "version")
    index_at, index_length, index_crc, total, prologue_crc, footer_crc, end = struct.unpack("<QIIQII8s", data[-40:])
    need(end == b"\x89KVPEND\n" and zlib.crc32(data[-40:-12]) == footer_crc, "footer")
    need(total == len(data) and index_at + index_length + 40 == total and prologue_crc == own, "extents")
    deflated = data[32 : 32 + header_length]
    need(zlib.crc32(deflated) == header_crc, "header")
    header = json.loads(zlib.decompress(deflated))
    source = verbatim(header["source"])
    tensors = read_source(source)
    need(critical & 8 or isinstance(header["source"], str), "a compact source header without its bit")
    need(critical & 2 or not any(codec["name"] == "replay" for codec in header["codecs"]), "replay without its bit")
    need(critical & 1 or not any(t["dtype"] in NEWER_DTYPES for t in tensors), "newer dtypes without their bit")
    origin = header.get("origin")
    need(origin is None or (critical & 4 and type(origin) is int and 0 <= origin <= 1 << 40), "origin")
    packed = data[index_at : index_at + index_length]
    need(zlib.crc32(packed) == index_crc, "index")
    parts = list(plan(tensors, header["chunk_tokens"]))
    arrays = read_profile(profile, header["profile"])
    output = np.zeros(sum(t["bytes"] for t in tensors), np.uint8)
    at = 32 + header_length
    entries = []
    for part, codec, digest, streams in read_index(zlib.decompress(packed), parts):
        content: dict[str, bytes] = {}
        for kind, size, expected in streams:
            stream = data[at : at + size]
            need(checksum(stream) == expected, "stream checksum")
            content[header["streams"][kind]] = stream
            at += size
        entries.append((part, header["codecs"][codec], digest, content))
    layers = lambda unit: unit[0][0]["tensor"]["layer"]  # noqa: E731
    computed: dict[str, np.ndarray] | None = None
    for unit in sorted(units(entries), key=layers):  # tensors of no layer first: token ids are among them
        tokens = token_ids(tensors, output) if layers(unit) else None
        if unit[0][1]["name"] == "replay":
            part, codec, digest, streams = unit[0]
            if not layers(unit):
                need(set(streams) == {"tokens"}, "streams of token ids")
                chunk = codec["configuration"]["token_chunk"]
                bits = reference_replay.token_ids(streams["tokens"], part["total"], chunk, model).reshape(part["shape"])
            else:
                assert model is not None
                assert tokens is not None
                computed = computed or model.cache(tokens)
                check_replay(codec, computed, tensors, source)
                rows = slice(part["first"], part["first"] + part["shape"][1])
                bits = reference_replay.residual(streams, part, computed[part["tensor"]["name"]][:, rows])
            need(checksum(bits.tobytes()) == digest, "digest")
            place(output, part, bits)
            continue
        for part, bits in decode_unit(unit, arrays, tokens, origin, before):
            place(output, part, bits)
    need(at == index_at, "streams fill the file")
    return len(source).to_bytes(8, "little") + source + output.tobytes()


def check_replay(
    codec: dict[str, Any], computed: dict[str, np.ndarray], tensors: list[dict[str, Any]], source: bytes
) -> None:
    """Compare the sample of what a model computes with the file's."""
    need(codec["version"] == 1, "version of replay")
    schedule = json.loads(json.loads(source)["__metadata__"]["schedule"])
    first = (schedule["prefill"] or [1])[0]
    need(reference_replay.sample(computed, tensors, first) == codec["configuration"]["sample"], "sample")


def read_source(raw: bytes) -> list[dict[str, Any]]:
    """Tensors of the safetensors header, in the order of their data."""
    entries = json.loads(raw)
    entries.pop("__metadata__", None)
    tensors = []
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        words = name.split(".")
        number = len(words) == 3 and words[1].isdecimal() and len(words[1]) < 10 and str(int(words[1])) == words[1]
        layer = number and words[0] == "layers" and words[2] in ("keys", "values")
        layer = layer and len(entry["shape"]) == 3 and entry["dtype"] in MANTISSA_BITS
        tensors.append(
            {"name": name, "dtype": entry["dtype"], "shape": entry["shape"], "start": start, "bytes": stop - start}
            | {"layer": layer, "number": int(words[1]) if layer else None}
        )
    return sorted(tensors, key=lambda t: (t["start"], t["bytes"]))


def plan(tensors: list[dict[str, Any]], chunk: int) -> Iterator[dict[str, Any]]:
    """Parts in the order of their streams."""
    layers = [t for t in tensors if t["layer"] and t["bytes"]]
    for first in range(0, max((t["shape"][1] for t in layers), default=0), chunk):
        for t in layers:
            heads, tokens, dims = t["shape"]
            if first < tokens:
                shape = (heads, min(chunk, tokens - first), dims)
                yield {"tensor": t, "shape": shape, "first": first, "total": tokens}
    for t in tensors:
        if not t["layer"] and t["bytes"]:
            dims = [t["bytes"]] if t["dtype"] in PACKED_DTYPES else t["shape"] or [1]
            longest = dims.index(max(dims))
            shape = (math.prod(dims[:longest]), dims[longest], math.prod(dims[longest + 1 :]))
            yield {"tensor": t, "shape": shape, "first": 0, "total": shape[1]}


def token_ids(tensors: list[dict[str, Any]], output: np.ndarray) -> np.ndarray | None:
    """The tensor ``tokens``, where the file has it as captures do."""
    for t in tensors:
        if t["name"] == "tokens" and t["dtype"] == "I32" and len(t["shape"]) == 1:
            return output[t["start"] : t["start"] + t["bytes"]].view("<i4")
    return None


def read_profile(raw: bytes, identity: dict[str, str] | None) -> Profile:
    """Arrays by name; F16 as float32."""
    if identity is None:
        return {}
    need(hashlib.sha256(raw).hexdigest() == identity["sha256"], "profile")
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:start])
    entries.pop("__metadata__")
    arrays = {}
    for name, entry in entries.items():
        dtype = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "U8": "|u1"}[entry["dtype"]]
        first, stop = entry["data_offsets"]
        array = np.frombuffer(raw[start + first : start + stop], dtype).reshape(entry["shape"])
        arrays[name] = array.astype(np.float32) if dtype == "<f2" else array
    return arrays


def read_index(raw: bytes, parts: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int, int, list[Any]]]:
    count, streams = struct.unpack_from("<II", raw)
    need(count == len(parts) and len(raw) == 8 + 10 * count + 17 * streams, "index length")
    columns = struct.unpack_from(f"<{count}B{count}B{count}Q{streams}B{streams}Q{streams}Q", raw, 8)
    codecs, counts, digests = columns[:count], columns[count : 2 * count], columns[2 * count : 3 * count]
    kinds, sizes, checksums = (columns[3 * count + i * streams : 3 * count + (i + 1) * streams] for i in range(3))
    need(sum(counts) == streams, "stream count")
    rows = iter(zip(kinds, sizes, checksums, strict=True))
    for part, codec, number, digest in zip(parts, codecs, counts, digests, strict=True):
        yield part, codec, digest, [next(rows) for _ in range(number)]


def place(output: np.ndarray, part: dict[str, Any], bits: np.ndarray) -> None:
    """Put a part's bit patterns where they belong in the data section."""
    t = part["tensor"]
    target = output[t["start"] : t["start"] + t["bytes"]].view(f"<u{ITEM_BYTES[t['dtype']]}")
    heads, tokens, dims = part["shape"]
    whole = target.reshape(heads, part["total"], dims)
    whole[:, part["first"] : part["first"] + tokens] = bits


# ---- Chains --------------------------------------------------------------------------------------------------------

Entry = tuple[dict[str, Any], dict[str, Any], int, dict[str, bytes]]
"""A part, its codec, the digest of its original, its streams."""


def units(entries: list[Entry]) -> Iterator[list[Entry]]:
    """What is decoded at once: the layer parts of a chunk under a stacked codec, else one part."""
    stack: list[Entry] = []
    for entry in entries:
        part, codec, _, _ = entry
        joins = codec.get("stacked") and part["tensor"]["layer"]
        if stack and not (joins and part["first"] == stack[0][0]["first"]):
            yield stack
            stack = []
        if joins:
            need(not stack or codec == stack[0][1], "one codec a stack")
            stack.append(entry)
        else:
            yield [entry]
    if stack:
        yield stack


def is_keys(entry: Entry) -> bool:
    return entry[0]["tensor"]["name"].endswith(".keys")


def stacks(unit: list[Entry]) -> list[list[Entry]]:
    """The stacks of a unit, keys first: keys and values, both as one, or as one by dtype and shape."""
    ordered = sorted(unit, key=lambda entry: (not is_keys(entry), entry[0]["tensor"]["number"] or 0))
    names = {stage["name"] for stage in unit[0][1]["keys"]}
    found: dict[Any, list[Entry]] = {}
    for entry in ordered:
        tensor = entry[0]["tensor"]
        if "low_rank" in names:
            key: Any = (tensor["dtype"], tuple(tensor["shape"]))
        else:
            key = "both" if "token_klt" in names and tensor["layer"] else is_keys(entry)
        found.setdefault(key, []).append(entry)
    return list(found.values())


def decode_unit(
    unit: list[Entry], profile: Profile, tokens: np.ndarray | None, origin: int | None, before: Sequence[int]
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Bit patterns of each part: keys first, because values may be predicted from them."""
    codec = unit[0][1]
    keys = None
    if origin is not None and not unit[0][0]["tensor"]["layer"]:
        origin = None
    for mine in stacks(unit):
        first, _, digest, _ = mine[0]
        kind = "keys" if is_keys(mine[0]) else "values"
        rows, count, dims = first["shape"]
        known = tokens if tokens is not None and len(tokens) == first["total"] else None
        if origin and known is not None and any(stage["name"] == "token_klt" for stage in codec[kind]):
            need(len(before) == origin, "the tokens before the origin")
            known = np.concatenate([np.array(before, np.int32), known])
        array = {
            "shape": (rows * len(mine), count, dims),
            "dtype": first["tensor"]["dtype"],
            "first": first["first"] + (origin or 0),  # a position of the text
            "total": first["total"] if origin is None else None,
            "heads": rows,
            "row": 0,
            "keys": rows * sum(map(is_keys, mine)),
            "tokens": known,
        }
        streams = {name: stream for *_, content in mine for name, stream in content.items()}
        bits, decoded = decode_chain(codec[kind], streams, array, keys, profile)
        keys = decoded if kind == "keys" else None
        if codec[kind][-2]["name"] in ("float_split", "byte_planes"):
            need(checksum(np.ascontiguousarray(bits).tobytes()) == digest, "digest")
        for i, (part, *_) in enumerate(mine):
            yield part, bits[i * rows : (i + 1) * rows]


def decode_chain(
    chain: list[Any], streams: dict[str, bytes], array: Array, keys: np.ndarray | None, profile: Profile
) -> tuple[np.ndarray, np.ndarray | None]:
    """Bit patterns, and the array that predictions were made from."""
    stages = list(chain)
    entropy, quantizer = stages.pop(), stages.pop()
    keep = stages.pop(0)["configuration"] if stages and stages[0]["name"] == "keep" else None
    predictor = stages.pop()["configuration"] if stages and stages[-1]["name"] == "cross_layer" else None
    rows, tokens, dims = array["shape"]
    start, stop = coded_tokens(keep, array)
    steps = [{**array, "shape": (rows, stop - start, dims), "first": array["first"] + start}]
    for transform in stages:
        steps.append(transformed(transform, steps[-1], profile))
    whole = float_planes(array["dtype"], (rows, tokens - stop + start, dims), "whole/") if keep else []
    read = PLANES[quantizer["name"]]
    planes = whole + read(quantizer["configuration"], steps[-1], profile)
    codes: list[np.ndarray] = []
    for name, shape, width in planes:
        if math.prod(shape) and width:
            scales = scales_of(name, quantizer, codes, profile) if entropy["name"] == "scaled_rans" else None
            if scales:
                codes.append(scaled_rans(streams.pop(name), *scales))
                continue
            codes.append(ENTROPY[entropy["name"]](streams.pop(name), shape, width))
        else:
            codes.append(np.zeros(shape, np.uint64))
    need(not streams, "unknown stream")
    kept, codes = codes[: len(whole)], codes[len(whole) :]
    if quantizer["name"] == "float_split":
        return join(codes, array["dtype"]), None
    if quantizer["name"] == "byte_planes":
        unsigned = f"<u{ITEM_BYTES[array['dtype']]}"
        return sum(c.astype(np.uint64) << np.uint64(8 * i) for i, c in enumerate(codes)).astype(unsigned), None
    values = values_of(codes, quantizer, predictor, steps[-1], keys, profile)
    decoded = values if predictor else None
    for transform, step in zip(reversed(stages), reversed(steps[:-1]), strict=True):
        values = untransform(values, transform, step, profile)
    bits = to_bits(values.astype(np.float32), array["dtype"])
    if keep:
        sides = join(kept, array["dtype"])
        bits = np.concatenate([sides[:, :start], bits, sides[:, start:]], axis=1)
    return bits, decoded


def coded_tokens(keep: dict[str, int] | None, array: Array) -> tuple[int, int]:
    """The part's tokens that are coded; the others are kept whole."""
    tokens = array["shape"][1]
    if keep is None:
        return 0, tokens
    start = min(max(keep["first"] - array["first"], 0), tokens)
    if array["total"] is None:
        return start, start + (tokens - start) // keep["group"] * keep["group"]
    coded = max(0, array["total"] - keep["first"] - keep["last"]) // keep["group"] * keep["group"]
    return start, max(start, min(keep["first"] + coded - array["first"], tokens))


def values_of(
    codes: list[np.ndarray],
    quantizer: dict[str, Any],
    predictor: dict[str, Any] | None,
    array: Array,
    keys: np.ndarray | None,
    profile: Profile,
) -> np.ndarray:
    """The quantizer's values; behind a predictor row by row, each added to what was expected of it."""
    config = quantizer["configuration"]
    dequantize, planes = DEQUANTIZE[quantizer["name"]], PLANES[quantizer["name"]]
    if predictor is None:
        return dequantize(codes, config, array, profile)
    values = np.zeros(array["shape"], np.float32)
    taken = [0] * len(codes)
    for row in range(array["shape"][0]):
        one = {**array, "shape": (1, *array["shape"][1:]), "row": row}
        counts = [shape[0] for _, shape, _ in planes(config, one, profile)]
        mine = [code[at : at + count] for code, at, count in zip(codes, taken, counts, strict=True)]
        taken = [at + count for at, count in zip(taken, counts, strict=True)]
        values[row] = cross_layer(predictor, row, values, keys, profile) + dequantize(mine, config, one, profile)[0]
    return values

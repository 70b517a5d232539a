"""A second, educational decoder of ``.kvp`` files, in the order of ``docs/format.md``.

Imports nothing of kvpack: the standard library and numpy alone, and the ``zstandard`` package for the streams that
are Zstandard frames (RFC 8878), which neither has a decoder for. Slow and plain on purpose.

    decode(data) -> bytes of the safetensors file
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
MANTISSA_BITS = {"BF16": 7, "F16": 10, "F32": 23}
EXPONENT_BITS = {"BF16": 8, "F16": 5, "F32": 8}

Plane = tuple[str, tuple[int, int, int], int]
"""Name, shape (H, T, D), bits a code."""


# ---- Checksums -----------------------------------------------------------------------------------------------------


def mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def checksum(data: bytes) -> int:
    words = np.frombuffer(data + bytes(-len(data) % 8), "<u8")
    keys = np.arange(1, len(words) + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return (int(mix(words + keys).sum(dtype=np.uint64)) + len(data)) & MASK64


# ---- Container -----------------------------------------------------------------------------------------------------


def decode(data: bytes) -> bytes:
    """The whole safetensors file that ``data`` holds.

    Raises:
        ValueError: anything that is not as the format says.

    """
    magic, major, _, critical, _, header_length, header_crc, own = struct.unpack_from("<8sHHIIIII", data)
    need(magic == b"\x89KVP\r\n\x1a\n", "magic")
    need(zlib.crc32(data[:28]) == own, "prologue")
    need(major == 0 and critical == 0, "version")
    index_at, index_length, index_crc, total, prologue_crc, footer_crc, end = struct.unpack("<QIIQII8s", data[-40:])
    need(end == b"\x89KVPEND\n" and zlib.crc32(data[-40:-12]) == footer_crc, "footer")
    need(total == len(data) and index_at + index_length + 40 == total and prologue_crc == own, "extents")
    deflated = data[32 : 32 + header_length]
    need(zlib.crc32(deflated) == header_crc, "header")
    header = json.loads(zlib.decompress(deflated))
    source = header["source"].encode()
    tensors = read_source(source)
    packed = data[index_at : index_at + index_length]
    need(zlib.crc32(packed) == index_crc, "index")
    parts = list(plan(tensors, header["chunk_tokens"]))
    output = np.zeros(sum(t["bytes"] for t in tensors), np.uint8)
    at = 32 + header_length
    for part, codec, digest, streams in read_index(zlib.decompress(packed), parts):
        content: dict[str, bytes] = {}
        for kind, size, expected in streams:
            stream = data[at : at + size]
            need(checksum(stream) == expected, "stream checksum")
            content[header["streams"][kind]] = stream
            at += size
        chain = header["codecs"][codec]["keys" if part["tensor"]["name"].endswith(".keys") else "values"]
        bits = decode_part(chain, content, part)
        if chain[-2]["name"] in ("float_split", "byte_planes"):
            need(checksum(np.ascontiguousarray(bits).tobytes()) == digest, "digest")
        place(output, part, bits)
    need(at == index_at, "streams fill the file")
    return len(source).to_bytes(8, "little") + source + output.tobytes()


def need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"not as the format says: {what}")


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
            | {"layer": layer}
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
            dims = t["shape"] or [1]
            longest = dims.index(max(dims))
            shape = (math.prod(dims[:longest]), dims[longest], math.prod(dims[longest + 1 :]))
            yield {"tensor": t, "shape": shape, "first": 0, "total": shape[1]}


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


def decode_part(chain: list[Any], streams: dict[str, bytes], part: dict[str, Any]) -> np.ndarray:
    *transforms, quantizer, entropy = chain
    dtype = part["tensor"]["dtype"]
    planes = PLANES[quantizer["name"]](quantizer["configuration"], dtype, part)
    codes = []
    for name, shape, width in planes:
        if math.prod(shape) and width:
            codes.append(ENTROPY[entropy["name"]](streams.pop(name), shape, width))
        else:
            codes.append(np.zeros(shape, np.uint64))
    need(not streams, "unknown stream")
    if quantizer["name"] == "float_split":
        return join(codes, dtype)
    if quantizer["name"] == "byte_planes":
        unsigned = f"<u{ITEM_BYTES[dtype]}"
        return sum(c.astype(np.uint64) << np.uint64(8 * i) for i, c in enumerate(codes)).astype(unsigned)
    values = DEQUANTIZE[quantizer["name"]](codes, quantizer["configuration"], dtype, part)
    for transform in reversed(transforms):
        need(transform["name"] == "rotation", "transform")
        values = values @ rotation(part["shape"][2], transform["configuration"]["seed"])
    return to_bits(values.astype(np.float32), dtype)


def to_float(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """To nearest, ties to even."""
    values = np.ascontiguousarray(values)
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)


# ---- Quantizers ----------------------------------------------------------------------------------------------------


def float_planes(dtype: str, shape: tuple[int, int, int], prefix: str = "") -> list[Plane]:
    high = (f"{prefix}sign_exponent", shape, 1 + EXPONENT_BITS[dtype])
    return [high, (f"{prefix}mantissa", shape, MANTISSA_BITS[dtype])]


def join(codes: list[np.ndarray], dtype: str) -> np.ndarray:
    bits = (codes[0].astype(np.uint64) << np.uint64(MANTISSA_BITS[dtype])) | codes[1].astype(np.uint64)
    return bits.astype(f"<u{ITEM_BYTES[dtype]}")


def byte_planes(_: Any, dtype: str, part: dict[str, Any]) -> list[Plane]:
    return [(f"byte.{i}", part["shape"], 8) for i in range(ITEM_BYTES[dtype])]


def affine_planes(config: dict[str, Any], dtype: str, part: dict[str, Any]) -> list[Plane]:
    heads, tokens, dims = part["shape"]
    group = config["group"]
    whole = max(0, part["total"] - config["residual"]) // group * group
    coded = min(max(whole - part["first"], 0), tokens)
    by_token = config["axis"] == "token"
    groups = (heads, -(-coded // group), dims) if by_token else (heads, coded, -(-dims // group))
    return [
        ("codes", (heads, coded, dims), config["bits"]),
        *float_planes("F16", groups, "scale/"),
        *float_planes("F16", groups, "zero/"),
        *float_planes(dtype, (heads, tokens - coded, dims), "residual/"),
    ]


def affine(codes: list[np.ndarray], config: dict[str, Any], dtype: str, _: Any) -> np.ndarray:
    axis = 1 if config["axis"] == "token" else 2
    size = codes[0].shape[axis]
    scale, zero = (to_float(join(codes[i : i + 2], "F16"), "F16") for i in (1, 3))
    spread = [p.repeat(config["group"], axis).take(np.arange(size), axis) for p in (scale, zero)]
    values = codes[0].astype(np.float32) * spread[0] + spread[1]
    return np.concatenate([values, to_float(join(codes[5:7], dtype), dtype)], axis=1)


def lloyd_max_planes(config: dict[str, Any], _: str, part: dict[str, Any]) -> list[Plane]:
    shape = part["shape"]
    norms = (*shape[:2], 1)
    planes = [("codes", shape, config["bits"] - config["prod"]), *float_planes("F16", norms, "norm/")]
    if config["prod"]:
        planes += [("signs", shape, 1), *float_planes("F16", norms, "residual_norm/")]
    return planes


CENTROIDS: list[list[float]] = [
    [],
    [0.79788456],
    [0.45278003, 1.51041761],
    [0.24509418, 0.75600528, 1.34390928, 2.1519457],
    [0.12839503, 0.3880483, 0.65675912, 0.94234046, 1.2562312, 1.61804639, 2.06901723, 2.73258957],
]


def lloyd_max(codes: list[np.ndarray], config: dict[str, Any], _: str, part: dict[str, Any]) -> np.ndarray:
    dims = part["shape"][2]
    positive = np.array(CENTROIDS[config["bits"] - config["prod"]])
    table = np.concatenate([-positive[::-1], positive]) if len(positive) else np.zeros(1)
    unit = (table / math.sqrt(dims)).astype(np.float32)[codes[0].astype(np.int64)]
    if config["prod"]:
        length = to_float(join(codes[4:6], "F16"), "F16")
        signs = codes[3].astype(np.float32) * 2 - 1
        factor = np.float32(math.sqrt(math.pi / 2) / dims) * length
        unit = unit + factor * (signs @ gaussian(dims, config["seed"]).astype(np.float32))
    return unit * to_float(join(codes[1:3], "F16"), "F16")


def gaussian(dims: int, seed: int) -> np.ndarray:
    keys = np.arange(1, 2 * dims * dims + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    uniform = ((mix(np.uint64(seed) + keys) >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
    normal = np.sqrt(-2 * np.log(uniform[0::2])) * np.cos(2 * np.pi * uniform[1::2])
    return normal.reshape(dims, dims)


def rotation(dims: int, seed: int) -> np.ndarray:
    rows = gaussian(dims, seed)
    for i in range(dims):
        for _ in range(2):
            rows[i] -= (rows[:i] @ rows[i]) @ rows[:i]
        rows[i] /= math.sqrt(rows[i] @ rows[i])
    return rows.astype(np.float32)


# ---- Entropy coders ------------------------------------------------------------------------------------------------


def bitpack(data: bytes, shape: tuple[int, ...], width: int) -> np.ndarray:
    count = math.prod(shape)
    need(len(data) == (count * width + 7) // 8, "packed length")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    need(not bits[count * width :].any(), "spare bits")
    codes = bits[: count * width].reshape(count, width).astype(np.uint64)
    return (codes << np.arange(width, dtype=np.uint64)).sum(1, dtype=np.uint64).reshape(shape)


def zstd(data: bytes, shape: tuple[int, ...], width: int) -> np.ndarray:
    import zstandard

    size = next(b for b in (1, 2, 4, 8) if width <= 8 * b)
    raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=math.prod(shape) * size)
    return np.frombuffer(raw, f"<u{size}").reshape(shape)


def rans(data: bytes, shape: tuple[int, ...], width: int) -> np.ndarray:
    if data[0] == 0:
        return bitpack(data[1:], shape, width)
    heads, tokens, dims = shape
    mode, tables, alphabet, spread, per_lane, shortest, used = struct.unpack_from("<BBBBIII", data)
    need(mode == 1, "rans mode")
    tables, alphabet, channels = tables + 1, alphabet + 1, heads * dims
    lanes = -(-channels // per_lane)
    sections = []
    at = 16
    for size in (
        4 * lanes,
        2 * used,
        (alphabet * width + 7) // 8,
        (tables * alphabet * 6 + 7) // 8,
        (channels * (tables - 1).bit_length() + 7) // 8,
        (lanes * spread + 7) // 8,
    ):
        sections.append(data[at : at + size])
        at += size
    need(at == len(data), "rans sections")
    state = np.frombuffer(sections[0], "<u4").astype(np.int64)
    words = np.concatenate([np.frombuffer(sections[1], "<u2").astype(np.int64), np.zeros(per_lane * tokens, np.int64)])
    symbols = bitpack(sections[2], (alphabet,), width)
    frequencies = frequency_tables(bitpack(sections[3], (tables, alphabet), 6).astype(np.int64))
    table = bitpack(sections[4], (channels,), (tables - 1).bit_length()).astype(np.int64)
    lengths = bitpack(sections[5], (lanes,), spread).astype(np.int64) + shortest
    ends = np.cumsum(lengths)
    need(ends[-1] == used, "lane lengths")
    next_word = ends - lengths
    stop = np.cumsum(frequencies, axis=1)
    symbol_of_slot = (np.arange(4096)[None, :, None] >= stop[:, None, :]).sum(2)
    codes = np.zeros((heads, tokens, dims), np.uint64)
    for i in range(per_lane):
        channel = np.arange(lanes) * per_lane + i
        live = channel < channels
        channel = np.where(live, channel, 0)
        for t in range(tokens):
            slot = state & 4095
            s = symbol_of_slot[table[channel], slot]
            f = frequencies[table[channel], s]
            x = f * (state >> 12) + slot - (stop[table[channel], s] - f)
            short = x < 1 << 15
            x = np.where(short, (x << 16) | words[next_word], x)
            next_word = next_word + (short & live)
            state = np.where(live, x, state)
            codes[channel[live] // dims, t, channel[live] % dims] = symbols[s[live]]
    need(bool((state == 1 << 15).all() and (next_word == ends).all()), "lane ends")
    return codes


def frequency_tables(codes: np.ndarray) -> np.ndarray:
    levels = np.array([0, 1, 2, 3] + [(4 + m) << e for e in range(10) for m in range(4)])
    rest = codes == 63
    need(bool((rest.sum(1) == 1).all() and (codes[~rest] < len(levels)).all()), "frequency codes")
    values = levels[np.where(rest, 0, codes)]
    left = 4096 - values.sum(1)
    need(bool((left > 0).all()), "frequency sum")
    values[rest] = left
    return values


PLANES: dict[str, Any] = {
    "float_split": lambda _, dtype, part: float_planes(dtype, part["shape"]),
    "byte_planes": byte_planes,
    "affine": affine_planes,
    "lloyd_max": lloyd_max_planes,
}
DEQUANTIZE: dict[str, Any] = {"affine": affine, "lloyd_max": lloyd_max}
ENTROPY: dict[str, Any] = {"bitpack": bitpack, "rans": rans, "zstd": zstd}

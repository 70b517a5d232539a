"""The stages of ``tests/reference_decoder.py``: what each does to codes and floats, in the order of ``docs/format.md``.

Imports nothing of kvpack: the standard library, numpy, and ``zstandard`` for Zstandard frames.

An **array** is a dict of its ``shape`` (rows, tokens, dims), its tensor's ``dtype``, ``first`` and ``total`` tokens,
``heads`` a layer, and the first ``row`` where rows are coded one by one.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MANTISSA_BITS = {"BF16": 7, "F16": 10, "F32": 23}
EXPONENT_BITS = {"BF16": 8, "F16": 5, "F32": 8}
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
    **dict.fromkeys(("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    "C64": 8,
}

Plane = tuple[str, tuple[int, int, int], int]
"""Name, shape (rows, tokens, dims), bits per code."""

Array = dict[str, Any]
Profile = dict[str, np.ndarray]


def need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"not as the format says: {what}")


def mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


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


# ---- Transforms: from coefficients back to values ------------------------------------------------------------------


def transformed(transform: dict[str, Any], array: Array, profile: Profile) -> Array:
    """What the transform makes of an array's description."""
    name, config = transform["name"], transform["configuration"]
    rows, tokens, dims = array["shape"]
    if name == "merge_heads":
        return {**array, "shape": (rows // array["heads"], tokens, array["heads"] * dims), "heads": 1}
    if name == "klt":
        return {**array, "shape": (1, tokens, profile[f"{config['section']}.basis"].shape[1]), "heads": 1}
    if name == "token_klt":
        return {**array, "shape": (1, tokens, profile[f"{config['section']}.weights.step"].shape[1]), "heads": 1}
    need(name in ("rotation", "unrope"), "transform")
    return array


def untransform(values: np.ndarray, transform: dict[str, Any], array: Array, profile: Profile) -> np.ndarray:
    """``values`` back to ``array``, which is what the transform was given."""
    name, config = transform["name"], transform["configuration"]
    rows, tokens, dims = array["shape"]
    if name == "rotation":
        return values @ rotation(dims, config["seed"])
    if name == "merge_heads":
        layers = values.reshape(rows // array["heads"], tokens, array["heads"], dims)
        return layers.transpose(0, 2, 1, 3).reshape(rows, tokens, dims)
    if name == "klt":
        flat = values[0] @ profile[f"{config['section']}.basis"].T + profile[f"{config['section']}.mean"]
        return flat.reshape(tokens, rows, dims).transpose(1, 0, 2)
    if name == "token_klt":
        flat = token_klt(values[0], config["section"], array, profile)
        both = flat.reshape(tokens, rows, dims).transpose(1, 0, 2)
        return np.concatenate([turned(both[: rows // 2], array, profile), both[rows // 2 :]])
    return turned(values, array, profile)


def turned(values: np.ndarray, array: Array, profile: Profile) -> np.ndarray:
    """Keys with RoPE again."""
    tokens = array["shape"][1]
    frequency = profile["rope.inv_freq"].astype(np.float64)
    half = len(frequency)
    angle = np.arange(array["first"], array["first"] + tokens)[:, None] * frequency
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    x, y = values[..., :half], values[..., half : 2 * half]
    return np.concatenate([x * cos - y * sin, y * cos + x * sin, values[..., 2 * half :]], axis=2)


def unpacked(profile: Profile, name: str) -> np.ndarray:
    """A packed matrix."""
    step, count = profile[f"{name}.step"], int(profile[f"{name}.rows"][0])
    codes = rans(profile[f"{name}.codes"].tobytes(), (len(step), count // len(step), step.shape[1]), 8)
    return ((codes.astype(np.float32) - 128) * step[:, None]).reshape(count, -1)


def token_klt(coordinates: np.ndarray, section: str, array: Array, profile: Profile) -> np.ndarray:
    """Coordinates ``[T, K]`` to a token's elements ``[T, P]``, keys before RoPE."""
    first, tokens = array["first"], array["shape"][1]
    mean, spread = profile[f"{section}.mean"], profile[f"{section}.spread"][:, None]
    basis, local = (unpacked(profile, f"{section}.{name}") * spread for name in ("basis", "local"))
    sinks, position = len(mean) - 1, np.arange(first, first + tokens)
    z = coordinates.copy()
    if array["tokens"] is not None:
        begin = max(0, max(first, sinks) - 2048)
        table = unpacked(profile, f"{section}.table")[profile[f"{section}.order"]]
        scale = profile[f"{section}.scale"]
        given = token_inputs(table[array["tokens"][begin : first + tokens]], len(scale), begin)[first - begin :] / scale
        units = np.maximum(given @ unpacked(profile, f"{section}.hidden"), 0)
        expected = np.concatenate([given, units], axis=1) @ unpacked(profile, f"{section}.weights")
        z += np.where(position[:, None] < sinks, np.float32(0), expected)
    common, half = basis.shape[1], len(basis) // 2
    x = z[:, :common] @ basis.T
    groups = profile[f"{section}.groups"]
    layer = np.arange(half) // (half // len(groups))
    group = np.concatenate([groups[layer], groups[layer]])  # of each element, keys and values
    for g in range(groups[-1] + 1):
        own = z[:, common + g * local.shape[1] : common + (g + 1) * local.shape[1]]
        x[:, group == g] += own @ local[group == g].T
    return x + mean[np.minimum(position, sinks)]


def token_inputs(vectors: np.ndarray, inputs: int, first: int) -> np.ndarray:
    """A token's vector, the leading elements of those behind it, its place from ``first`` on: ``[T, inputs]``."""
    tokens, size = vectors.shape
    reach = (inputs - size - 3) // 7
    near = vectors[:, :reach]
    columns = [vectors]
    for lag in (1, 2, 3):
        columns.append(np.concatenate([np.zeros((lag, reach), np.float32), near])[:tokens])
    for decay in np.array([0.6, 0.85, 0.96, 0.99], np.float32):
        total, weight, mean = np.zeros(reach, np.float32), np.float32(0), np.zeros((tokens, reach), np.float32)
        for t in range(tokens):
            mean[t] = total / weight if t else 0
            total, weight = total * decay + near[t], weight * decay + np.float32(1)
        columns.append(mean)
    n = np.minimum(first + np.arange(tokens), 2047).astype(np.float32)[:, None]
    return np.concatenate([*columns, np.ones_like(n), np.log1p(n) / 8, 1 / np.sqrt(n + 1)], axis=1)


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


# ---- Predictor -----------------------------------------------------------------------------------------------------


def cross_layer(
    config: dict[str, Any], row: int, rows: np.ndarray, keys: np.ndarray | None, profile: Profile
) -> np.ndarray:
    """Row ``row`` as expected from rows before it, and from the decoded keys where values are predicted."""
    if row == 0:
        return np.zeros_like(rows[0])
    given = rows[row - 1] if keys is None else np.concatenate([keys[row], rows[row - 1]], axis=1)
    section = config["section"]
    return given @ profile[f"{section}.weight"][row - 1] + profile[f"{section}.bias"][row - 1]


# ---- Quantizers: the planes of an array, and from their codes to values --------------------------------------------


def float_planes(dtype: str, shape: tuple[int, int, int], prefix: str = "") -> list[Plane]:
    high = (f"{prefix}sign_exponent", shape, 1 + EXPONENT_BITS[dtype])
    return [high, (f"{prefix}mantissa", shape, MANTISSA_BITS[dtype])]


def join(codes: list[np.ndarray], dtype: str) -> np.ndarray:
    bits = (codes[0].astype(np.uint64) << np.uint64(MANTISSA_BITS[dtype])) | codes[1].astype(np.uint64)
    return bits.astype(f"<u{ITEM_BYTES[dtype]}")


def halves(codes: list[np.ndarray]) -> np.ndarray:
    return to_float(join(codes, "F16"), "F16")


def affine_planes(config: dict[str, Any], array: Array, _: Profile) -> list[Plane]:
    rows, tokens, dims = array["shape"]
    group = config["group"]
    by_token = config["axis"] == "token"
    groups = (rows, -(-tokens // group), dims) if by_token else (rows, tokens, -(-dims // group))
    planes = [("codes", array["shape"], config["bits"])]
    return planes + float_planes("F16", groups, "scale/") + float_planes("F16", groups, "zero/")


def affine(codes: list[np.ndarray], config: dict[str, Any], _: Array, __: Profile) -> np.ndarray:
    axis = 1 if config["axis"] == "token" else 2
    size = codes[0].shape[axis]
    scale, zero = halves(codes[1:3]), halves(codes[3:5])
    spread = [p.repeat(config["group"], axis).take(np.arange(size), axis) for p in (scale, zero)]
    return codes[0].astype(np.float32) * spread[0] + spread[1]


def lloyd_max_planes(config: dict[str, Any], array: Array, _: Profile) -> list[Plane]:
    shape = array["shape"]
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


def lloyd_max(codes: list[np.ndarray], config: dict[str, Any], array: Array, _: Profile) -> np.ndarray:
    dims = array["shape"][2]
    positive = np.array(CENTROIDS[config["bits"] - config["prod"]])
    table = np.concatenate([-positive[::-1], positive]) if len(positive) else np.zeros(1)
    unit = (table / math.sqrt(dims)).astype(np.float32)[codes[0].astype(np.int64)]
    if config["prod"]:
        signs = codes[3].astype(np.float32) * 2 - 1
        factor = np.float32(math.sqrt(math.pi / 2) / dims) * halves(codes[4:6])
        unit = unit + factor * (signs @ gaussian(dims, config["seed"]).astype(np.float32))
    return unit * halves(codes[1:3])


def levels(config: dict[str, Any], layers: int) -> np.ndarray:
    leading = (layers * config["leading"] + 16) // 32
    bins = [config["leading_bins"] if i < leading else config["bins"] for i in range(layers)]
    return np.array([max(b // 2 - 1, 1) for b in bins])


def anchor_delta_planes(config: dict[str, Any], array: Array, _: Profile) -> list[Plane]:
    layers, tokens, dims = array["shape"]
    anchors = -(-tokens // config["group"])
    width = int(2 * max(levels(config, layers), default=1)).bit_length()
    return [
        ("anchors", (layers, anchors, dims), 8),
        *float_planes("F16", (layers, anchors, 1), "anchor_scale/"),
        ("deltas", (layers, tokens - anchors, dims), width),
        *float_planes("F16", (layers, tokens - anchors, 1), "delta_scale/"),
    ]


def anchor_delta(codes: list[np.ndarray], config: dict[str, Any], array: Array, _: Profile) -> np.ndarray:
    layers, tokens, _ = array["shape"]
    most = levels(config, layers).astype(np.float32)[:, None, None]
    anchors = (codes[0].astype(np.float32) - 127) / np.float32(127) * halves(codes[1:3])
    deltas = (codes[3].astype(np.float32) - most) / most * halves(codes[4:6])
    token = np.arange(tokens)
    others = token % config["group"] != 0
    values = anchors[:, token // config["group"]]
    values[:, others] += deltas
    return values


def groups_of(config: dict[str, Any], profile: Profile) -> list[tuple[int, int]]:
    return [(int(size), int(bits)) for size, bits in profile[f"{config['section']}.plan.{config['plan']}"]]


def component_groups_planes(config: dict[str, Any], array: Array, profile: Profile) -> list[Plane]:
    rows, tokens, _ = array["shape"]
    groups = groups_of(config, profile)
    widths = {bits: sum(size for size, b in groups if b == bits) for bits in (2, 4, 8)}
    stored = (rows, tokens, sum(bits > 0 for _, bits in groups))
    types = [(name, (rows, tokens, widths[bits]), bits) for name, bits in (("int2", 2), ("int4", 4), ("fp8", 8))]
    return [*types, ("shift", stored, 16), ("scale", stored, 16)]


def component_groups(codes: list[np.ndarray], config: dict[str, Any], array: Array, profile: Profile) -> np.ndarray:
    values = np.zeros(array["shape"], np.float32)
    shift, scale = (to_float(c[0].astype(np.uint16), "F16") for c in codes[3:5])
    taken = {2: 0, 4: 0, 8: 0}
    at = number = 0
    for size, bits in groups_of(config, profile):
        if bits:
            plane = codes[(2, 4, 8).index(bits)][0, :, taken[bits] : taken[bits] + size]
            x = plane.astype(np.float32) if bits < 8 else e4m3(plane)
            values[0, :, at : at + size] = x * scale[:, number, None] + shift[:, number, None]
            taken[bits] += size
            number += 1
        at += size
    return values


def e4m3(codes: np.ndarray) -> np.ndarray:
    magnitude = np.minimum(codes & np.uint64(127), np.uint64(126)).astype(np.int64)
    exponent, mantissa = magnitude >> 3, magnitude & 7
    value = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return np.where(codes >> np.uint64(7), -value, value).astype(np.float32)


def higgs_planes(config: dict[str, Any], array: Array, _: Profile) -> list[Plane]:
    rows, tokens, dims = array["shape"]
    first, pairs = int(array["row"] == 0 and rows > 0), (dims + 1) // 2
    planes = [("first", (first, tokens, pairs), 8), ("codes", (rows - first, tokens, pairs), 2 * config["bits"])]
    return planes + float_planes("F16", (rows, tokens, 1), "norm/")


def higgs(codes: list[np.ndarray], config: dict[str, Any], array: Array, profile: Profile) -> np.ndarray:
    rows, tokens, dims = array["shape"]
    grids = profile["higgs.256"], profile[f"higgs.{4 ** config['bits']}"]
    pairs = np.concatenate([grid[c.astype(np.int64)] for grid, c in zip(grids, codes[:2], strict=True)])
    turned = pairs.reshape(rows, tokens, dims + dims % 2)[..., :dims] / np.float32(math.sqrt(dims))
    return (turned @ rotation(dims, config["seed"])) * halves(codes[2:4])


def dead_zone_planes(_: dict[str, Any], array: Array, __: Profile) -> list[Plane]:
    rows, tokens, dims = array["shape"]
    one = (rows, tokens, 1)
    return [("levels", one, 5), ("shifts", one, 4), ("coefficients", (rows, tokens, dims), 16)]


def dead_zone_scales(
    codes: list[np.ndarray], config: dict[str, Any], profile: Profile
) -> tuple[np.ndarray, np.ndarray]:
    """The class of each coefficient ``[T, K]`` from levels and shifts, and the frequency tables ``[C, 63]``."""
    columns, tables = (profile[f"{config['section']}.{name}"].astype(np.int64) for name in ("columns", "tables"))
    levels, shifts = (plane.reshape(-1).astype(np.int64) for plane in codes[:2])
    rows = config["log_step"] + 8 * (levels - 16) - 8 * (shifts - 8)
    return np.clip((columns[None] - rows[:, None]) >> 3, 0, len(tables) - 1), tables


def dead_zone(codes: list[np.ndarray], config: dict[str, Any], _: Array, profile: Profile) -> np.ndarray:
    zigzag = codes[2][0].astype(np.int64)
    magnitude, sign = (zigzag + 1) >> 1, np.where(zigzag & 1, -1, 1)
    classes, _ = dead_zone_scales(codes, config, profile)
    offset = profile[f"{config['section']}.centroids"][classes, np.minimum(magnitude, 3)]
    exponent = config["log_step"] / 32 + (codes[0].reshape(-1, 1).astype(np.int64) - 16) / 4
    values = np.where(magnitude > 0, sign * (magnitude + offset), 0).astype(np.float32)
    return (values * np.exp2(exponent).astype(np.float32))[None]


# fmt: off
ZEROS = (
    16300, 16300, 16300, 16300, 16300, 16300, 16300, 16300, 16300, 16300, 16300, 16268, 16105, 15842, 15344, 14445,
    12943, 11957, 10810, 9536, 8192, 7254, 6341, 5473, 4669, 4020, 3434, 2914, 2458, 2123, 1828, 1569,
    1343, 1171, 1020, 887, 770, 665, 574, 495, 426, 365, 313, 268, 229, 196, 168, 144,
    123, 105, 90, 77, 66, 55, 46, 39, 33, 28, 23, 19, 16, 14, 13, 11,
)
RATIOS = (
    262, 276, 290, 305, 321, 338, 355, 374, 393, 468, 556, 662, 786, 990, 1246, 1566,
    1966, 3149, 4989, 7769, 11796, 15376, 19645, 24520, 29819, 33637, 37432, 41104, 44564, 47298, 49801, 52059,
    54067, 55637, 57026, 58246, 59310, 60166, 60914, 61564, 62128, 62665, 63121, 63506, 63832, 64102, 64330, 64522,
    64684, 64819, 64933, 65029, 65110, 65176, 65232, 65280, 65320, 65353, 65381, 65404, 65425, 65441, 65455, 65467,
)
# fmt: on


def low_rank_tables() -> np.ndarray:
    tail = [np.full(64, 1 << 30, np.int64)]
    for _ in range(32767):
        tail.append((tail[-1] * np.array(RATIOS)) >> 16)
    tables = np.zeros((64, 63), np.int64)
    free = 16384 - np.array(ZEROS) - 62
    for bucket in range(1, 32):
        octave = 3 + (bucket - 8) // 2
        first = bucket if bucket < 8 else (1 << octave) + ((bucket & 1) << (octave - 1))
        stop = first + (1 if bucket < 8 else 1 << (octave - 1))
        tables[:, 2 * bucket - 1] = tables[:, 2 * bucket] = 1 + (((tail[first - 1] - tail[stop - 1]) * free) >> 31)
    tables[:, 0] = 16384 - tables.sum(1)
    return tables


def low_rank_planes(_: dict[str, Any], array: Array, __: Profile) -> list[Plane]:
    rows, tokens, dims = array["shape"]
    most = min(tokens, rows * dims)
    return [
        ("frequencies", (1, 1, dims // 2), 32),
        ("token_levels", (1, tokens, 1), 5),
        ("element_steps", (1, rows, dims), 10),
        ("element_spreads", (1, rows, dims), 6),
        ("basis_classes", (1, most, 1), 7),
        ("coefficient_classes", (1, most, 1), 6),
        ("basis", (1, rows * dims, most), 16),
        ("coefficients", (1, tokens, most), 16),
    ]


def low_rank_scales(name: str, codes: list[np.ndarray]) -> Any:
    """Shape, classes and tables of the two factors."""
    if name not in ("basis", "coefficients"):
        return None
    levels, spreads, basis, coefficients = (codes[i].reshape(-1).astype(np.int64) for i in (1, 3, 4, 5))
    live = len(basis) if basis.all() else int((basis == 0).argmax())
    row, column = (spreads - 32, basis[:live] - 1) if name == "basis" else (16 - levels, coefficients[:live])
    return (1, len(row), live), np.clip(row[:, None] + column, 0, 63), low_rank_tables()


def low_rank(codes: list[np.ndarray], config: dict[str, Any], array: Array, _: Profile) -> np.ndarray:
    rows, tokens, dims = array["shape"]
    basis, coefficients = (np.where(c[0] & 1, -((c[0].astype(np.int64) + 1) >> 1), c[0] >> 1) for c in codes[6:8])
    norms = np.sqrt(np.maximum(np.square(basis.astype(np.float64)).sum(0), 1))
    element = np.exp2((codes[2].reshape(-1, 1).astype(np.int64) - 512) / 4).astype(np.float32)
    token = np.exp2(config["log_step"] / 32 + (codes[1].reshape(-1, 1).astype(np.int64) - 16) / 4).astype(np.float32)
    flat = (coefficients * token).astype(np.float32) @ ((basis / norms).astype(np.float32) * element).T
    values = np.ascontiguousarray(flat.reshape(tokens, rows, dims).transpose(1, 0, 2))
    frequencies = codes[0].reshape(-1).astype(np.uint32).view(np.float32)
    turning = frequencies[: next((i for i, f in enumerate(frequencies) if f == 0), len(frequencies))]
    keys = turned(values[: array["keys"]], array, {"rope.inv_freq": turning})
    return np.concatenate([keys, values[array["keys"] :]])


def scales_of(name: str, quantizer: dict[str, Any], codes: list[np.ndarray], profile: Profile) -> Any:
    """Shape, class of each code and tables of a plane with scales; None for others."""
    if quantizer["name"] == "low_rank":
        return low_rank_scales(name, codes)
    if name != "coefficients" or quantizer["name"] != "dead_zone":
        return None
    classes, tables = dead_zone_scales(codes[-2:], quantizer["configuration"], profile)
    return (1, *classes.shape), classes, tables


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


def deflate(data: bytes, shape: tuple[int, ...], width: int) -> np.ndarray:
    return bitpack(zlib.decompress(data), shape, width)


def rans(data: bytes, shape: tuple[int, ...], width: int) -> np.ndarray:
    if data[0] == 0:
        return bitpack(data[1:], shape, width)
    heads, tokens, dims = shape
    mode, tables, alphabet, spread, per_lane, shortest, used = struct.unpack_from("<BBBBIII", data)
    need(mode == 1, "rans mode")
    tables, alphabet, channels = tables + 1, alphabet + 1, heads * dims
    groups = -(-channels // (32 * per_lane))
    lanes = 32 * (groups - 1) + min(32, channels - 32 * per_lane * (groups - 1))
    sections = []
    at = 16
    for size in (
        4 * lanes,
        2 * used,
        (alphabet * width + 7) // 8,
        (tables * alphabet * 6 + 7) // 8,
        (channels * (tables - 1).bit_length() + 7) // 8,
        (groups * spread + 7) // 8,
    ):
        sections.append(data[at : at + size])
        at += size
    need(at == len(data), "rans sections")
    states = np.frombuffer(sections[0], "<u4").astype(np.int64)
    words = np.frombuffer(sections[1], "<u2").astype(np.int64)
    symbols = bitpack(sections[2], (alphabet,), width)
    frequencies = frequency_tables(bitpack(sections[3], (tables, alphabet), 6).astype(np.int64))
    table = bitpack(sections[4], (channels,), (tables - 1).bit_length()).astype(np.int64)
    lengths = bitpack(sections[5], (groups,), spread).astype(np.int64) + shortest
    ends = np.cumsum(lengths)
    need(ends[-1] == used, "group lengths")
    starts = symbol_starts(frequencies)
    codes = np.zeros((heads, tokens, dims), np.uint64)
    for group in range(groups):
        state = states[32 * group : 32 * group + 32].copy()
        mine = words[ends[group] - lengths[group] : ends[group]]
        taken = 0
        for i in range(per_lane):
            first = 32 * (group * per_lane + i)
            channel = np.arange(first, min(first + 32, channels))
            f, start = frequencies[table[channel]], starts[table[channel]]
            for t in range(tokens):
                x = state[: len(channel)]
                slot = x & 4095
                s = ((start <= slot[:, None]) & (slot[:, None] < start + f)).argmax(1)
                x = (
                    np.take_along_axis(f, s[:, None], 1)[:, 0] * (x >> 12)
                    + slot
                    - np.take_along_axis(start, s[:, None], 1)[:, 0]
                )
                short = x < 1 << 15
                need(taken + short.sum() <= len(mine), "group words")
                x[short] = (x[short] << 16) | mine[taken : taken + short.sum()]
                taken += short.sum()
                state[: len(channel)] = x
                codes[channel // dims, t, channel % dims] = symbols[s]
        need(bool((state == 1 << 15).all()) and taken == len(mine), "group ends")
    return codes


def symbol_starts(frequencies: np.ndarray) -> np.ndarray:
    starts = np.zeros_like(frequencies)
    for row, f in zip(starts, frequencies, strict=True):
        at = 0
        for kind in ((f >= 64) & (f % 16 == 0), (f >= 64) & (f % 16 > 0), f < 64):
            for s in np.flatnonzero(kind):
                row[s] = at
                at += f[s]
    return starts


def frequency_tables(codes: np.ndarray) -> np.ndarray:
    levels = np.array([0, 1, 2, 3] + [(4 + m) << e for e in range(10) for m in range(4)])
    rest = codes == 63
    need(bool((rest.sum(1) == 1).all() and (codes[~rest] < len(levels)).all()), "frequency codes")
    values = levels[np.where(rest, 0, codes)]
    left = 4096 - values.sum(1)
    need(bool((left > 0).all()), "frequency sum")
    values[rest] = left
    return values


def scaled_rans(data: bytes, shape: tuple[int, ...], classes: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Zigzag codes of a plane with scales; one without is coded by :func:`rans`."""
    classes = classes.reshape(-1)
    span, tail = struct.unpack_from("<II", data)
    need(span > 0 and span % 32 == 0, "span")
    groups = -(-len(classes) // span)
    lengths = np.frombuffer(data, "<u4", groups, 8).astype(np.int64)
    states = np.frombuffer(data, "<u4", 32 * groups, 8 + 4 * groups).astype(np.int64)
    at = 8 + 4 * 33 * groups
    need(at + 2 * lengths.sum() + tail == len(data), "scaled_rans sections")
    words = np.frombuffer(data, "<u2", int(lengths.sum()), at).astype(np.int64)
    ends = np.cumsum(tables, 1)
    symbols = np.zeros(len(classes), np.int64)
    word = 0
    for group in range(groups):
        state = states[32 * group : 32 * group + 32].copy()
        stop = word + lengths[group]
        for first in range(group * span, min((group + 1) * span, len(classes)), 32):
            k = classes[first : min(first + 32, (group + 1) * span, len(classes))]
            x = state[: len(k)]
            slot = x & 16383
            s = (ends[k] <= slot[:, None]).sum(1)
            x = tables[k, s] * (x >> 14) + slot - (ends[k, s] - tables[k, s])
            short = x < 1 << 16
            need(word + short.sum() <= stop, "group words")
            x[short] = (x[short] << 16) | words[word : word + short.sum()]
            word += int(short.sum())
            state[: len(k)] = x
            symbols[first : first + len(k)] = s
        need(bool((state == 1 << 16).all()) and word == stop, "group ends")
    bucket = (symbols + 1) >> 1
    octave = 3 + (bucket - 8) // 2
    magnitude = np.where(bucket < 8, bucket, (1 << octave) + ((bucket & 1) << (octave - 1)))
    widths = np.where(bucket < 8, 0, octave - 1)
    bits = bitpack(data[len(data) - tail :], (int(widths.sum()),), 1).astype(np.int64)
    taken = 0
    for i in np.flatnonzero(widths):
        magnitude[i] += (bits[taken : taken + widths[i]] << np.arange(widths[i])).sum()
        taken += widths[i]
    negative = (symbols > 0) & (symbols % 2 == 0)
    return (2 * magnitude - negative).reshape(shape)


PLANES: dict[str, Any] = {
    "float_split": lambda _, array, __: float_planes(array["dtype"], array["shape"]),
    "byte_planes": lambda _, array, __: [(f"byte.{i}", array["shape"], 8) for i in range(ITEM_BYTES[array["dtype"]])],
    "affine": affine_planes,
    "lloyd_max": lloyd_max_planes,
    "anchor_delta": anchor_delta_planes,
    "component_groups": component_groups_planes,
    "higgs": higgs_planes,
    "dead_zone": dead_zone_planes,
    "low_rank": low_rank_planes,
}
DEQUANTIZE: dict[str, Any] = {
    "affine": affine,
    "lloyd_max": lloyd_max,
    "anchor_delta": anchor_delta,
    "component_groups": component_groups,
    "higgs": higgs,
    "dead_zone": dead_zone,
    "low_rank": low_rank,
}
ENTROPY: dict[str, Any] = {"bitpack": bitpack, "rans": rans, "scaled_rans": rans, "zstd": zstd, "deflate": deflate}

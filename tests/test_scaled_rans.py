"""``scaled_rans``, the symbols it codes, and packed matrices: exact, close to the ideal, and wary of what it reads."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpack.calibration.scales import CLASSES, tables
from kvpack.codecs.chain import symbols
from kvpack.codecs.chain.base import Part, PlaneSpec, Scales
from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.codecs.chain.entropy.scaled_rans import GROUP_BYTES, ScaledRans, cpu, reference
from kvpack.codecs.chain.packed import pack_matrix, unpack_matrix
from kvpack.codecs.context import DecodeContext
from kvpack.errors import CorruptError, MismatchError

CODER = ScaledRans()
TABLES = tables(np.zeros((CLASSES, len(symbols.SMALLEST))))
"""Laplace distributions: class 20 is as wide as the step, a class is a quarter of an octave."""


def spec_for(tokens: int, dims: int, seed: int = 0, frequencies: np.ndarray = TABLES) -> PlaneSpec:
    rng = np.random.default_rng(seed)
    scales = Scales(
        rng.integers(-40, 500, dims).astype(np.int32), rng.integers(-60, 60, tokens).astype(np.int32), frequencies
    )
    return PlaneSpec("coefficients", (1, tokens, dims), 16, scales=scales)


def codes_for(spec: PlaneSpec, seed: int = 0) -> np.ndarray:
    """Codes that scatter as the tables of their classes say."""
    assert spec.scales is not None
    width = 2.0 ** ((spec.scales.classes() + 0.5 - 20) / 4)
    values = np.random.default_rng(seed).laplace(size=width.shape) * width / np.sqrt(2)
    magnitude = np.minimum(np.floor(np.abs(values) + 0.37), symbols.LARGEST)
    return symbols.zigzag(np.where(values < 0, -magnitude, magnitude))[None]


def round_trip(codes: np.ndarray, spec: PlaneSpec) -> bytes:
    data = CODER.encode(codes, spec)
    back = CODER.decode(memoryview(data), spec)
    assert back.shape == spec.shape
    assert (back == codes).all()
    return data


# ---- Symbols -------------------------------------------------------------------------------------------------------


def test_every_value_is_a_symbol_and_raw_bits() -> None:
    values = np.arange(-symbols.LARGEST, symbols.LARGEST + 1)
    codes = symbols.zigzag(values)
    assert codes.dtype == np.uint16
    assert sorted(codes) == list(range(2 * symbols.LARGEST + 1))
    assert (symbols.unzigzag(codes) == values).all()
    found, raw, widths = symbols.split(codes)
    assert set(found) == set(range(symbols.ALPHABET))
    assert (raw < 1 << widths).all()
    long, expected = symbols.raw_widths(found)
    assert (widths == expected).all()
    assert (np.abs(values[long]) >= symbols.DIRECT).all()
    assert (symbols.join(found, long, raw) == codes).all()


def test_small_values_need_no_raw_bits() -> None:
    found, raw, _ = symbols.split(symbols.zigzag(np.array([0, 1, -1, 7, -7])))
    assert list(found) == [0, 1, 2, 13, 14]
    assert len(raw) == 0


# ---- The coder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("tokens", [1, 7])
def test_odd_sizes(size: int, tokens: int) -> None:
    spec = spec_for(tokens, size)
    round_trip(codes_for(spec), spec)
    round_trip(np.ascontiguousarray(codes_for(spec)[:, ::-1]), spec)


def test_the_largest_magnitudes_and_the_least_likely_symbols() -> None:
    """Whatever the class expects: a code far beyond it only costs more."""
    spec = spec_for(16, 500)
    most = 2 * symbols.LARGEST
    for value in (0, 1, 2, most - 1, most):
        round_trip(np.full(spec.shape, value, np.uint16), spec)
    round_trip(np.random.default_rng(0).integers(0, most + 1, spec.shape).astype(np.uint16), spec)


def test_classes_beyond_the_tables_are_clipped() -> None:
    scales = Scales(np.array([-5000, 0, 5000], np.int32), np.array([0, -900, 900], np.int32), TABLES)
    assert scales.classes().min() == 0
    assert scales.classes().max() == CLASSES - 1
    round_trip(np.arange(9, dtype=np.uint16).reshape(1, 3, 3), PlaneSpec("c", (1, 3, 3), 16, scales=scales))


def test_a_realistic_payload_is_close_to_the_ideal_code_length() -> None:
    spec = spec_for(2000, 200)
    codes = codes_for(spec)
    assert spec.scales is not None
    found, _, widths = symbols.split(codes.reshape(-1))
    share = TABLES[spec.scales.classes().reshape(-1), found] / (1 << reference.PRECISION)
    ideal = (-np.log2(share).sum() + widths.sum()) / 8
    data = round_trip(codes, spec)
    assert ideal < len(data) < 1.02 * ideal
    assert struct.unpack_from("<I", data)[0] < codes.size  # several groups
    assert ideal > 4 * GROUP_BYTES


def test_planes_without_scales_are_coded_by_rans() -> None:
    codes = np.random.default_rng(0).integers(0, 20, (1, 300, 4)).astype(np.uint8)
    spec = PlaneSpec("levels", codes.shape, 5)
    data = CODER.encode(codes, spec)
    assert data == Rans().encode(codes, spec)
    assert (CODER.decode(memoryview(data), spec) == codes).all()


@st.composite
def payloads(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Symbols, columns, rows, tables, span: anything that the coder may be given."""
    tokens, dims = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 5))
    weights = rng.gamma(draw(st.sampled_from([0.01, 0.3, 5.0])), size=(count, symbols.ALPHABET))
    left = (1 << reference.PRECISION) - symbols.ALPHABET
    frequencies = 1 + np.floor(weights / np.maximum(weights.sum(1, keepdims=True), 1e-9) * left).astype(np.int32)
    frequencies[:, 0] += (1 << reference.PRECISION) - frequencies.sum(1, dtype=np.int32)
    found = rng.integers(0, symbols.ALPHABET, tokens * dims).astype(np.uint8)
    columns, rows = (rng.integers(-20, 60, n).astype(np.int32) for n in (dims, tokens))
    return found, columns, rows, frequencies, 32 * draw(st.integers(1, 20))


@settings(max_examples=60)
@given(payloads())
def test_compiled_lanes_are_their_reference(
    payload: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int],
) -> None:
    found, columns, rows, frequencies, span = payload
    classes = Scales(columns, rows, frequencies).classes().reshape(-1)
    words, lengths, states = reference.encode(found, classes, frequencies, span)
    groups = -(-len(found) // span)
    mine = np.full(len(found), 0xA5A5, np.uint16)
    my_lengths, my_states = np.full(groups, 0xA5, np.uint32), np.full((groups, 32), 0xA5, np.uint32)
    starts = np.cumsum(frequencies, 1) - frequencies
    arrays = (columns, rows, frequencies, starts)
    used = cpu.encode(found, *arrays, span, mine, my_lengths, my_states)
    assert used == len(words)
    assert (mine[:used] == words).all()
    assert (my_lengths == lengths).all()
    assert (my_states == states).all()
    ends = np.cumsum(lengths)
    assert (reference.decode(classes, frequencies, span, words, ends, states) == found).all()
    out = np.full(len(found), 0xA5, np.uint8)
    padded = np.concatenate([words, np.zeros(span + 1, np.uint16)])
    assert cpu.decode(out, *arrays, cpu.slots(frequencies), span, padded, ends, states)
    assert (out == found).all()


# ---- Hostile streams -----------------------------------------------------------------------------------------------


def small() -> tuple[bytes, PlaneSpec, np.ndarray]:
    spec = spec_for(5, 40)
    codes = codes_for(spec)
    return CODER.encode(codes, spec), spec, codes


def test_truncation_at_every_length() -> None:
    data, spec, _ = small()
    for cut in range(len(data)):
        with pytest.raises(CorruptError):
            CODER.decode(memoryview(data[:cut]), spec)
    with pytest.raises(CorruptError):
        CODER.decode(memoryview(data + b"\0"), spec)


def test_every_changed_byte_is_an_error_or_another_plane() -> None:
    """Never a crash, a hang or a plane of another shape; states that do not end as they must are noticed."""
    data, spec, codes = small()
    noticed = 0
    for at in range(len(data)):
        for change in (1, 0x80, 0xFF):
            broken = bytearray(data)
            broken[at] ^= change
            try:
                back = CODER.decode(memoryview(bytes(broken)), spec)
            except CorruptError:
                noticed += 1
            else:
                assert back.shape == codes.shape
                assert at < 4 or (back != codes).any()  # any span that makes one group is the same
    assert noticed > 2 * len(data)


@pytest.mark.parametrize("span", [0, 1, 31, 33, 64, 2**31, 2**32 - 32, 2**32 - 1])
@pytest.mark.parametrize("tail", [None, 0, 1, 2**31, 2**32 - 1])
def test_lying_heads(span: int, tail: int | None) -> None:
    data, spec, codes = small()
    honest = struct.unpack_from("<II", data)
    head = struct.pack("<II", span, honest[1] if tail is None else tail)
    try:
        back = CODER.decode(memoryview(head + data[8:]), spec)
    except CorruptError:
        return
    assert span >= codes.size  # any span that makes one group is the same
    assert tail in {None, honest[1]}
    assert (back == codes).all()


def test_lying_lengths() -> None:
    """Lengths that add up to the right sum by wrapping around, and groups that take each other's words."""
    spec = spec_for(400, 200)
    data = CODER.encode(codes_for(spec), spec)
    groups = -(-spec.size // struct.unpack_from("<I", data)[0])
    assert groups > 1
    lengths = np.frombuffer(data, "<u4", groups, 8).copy()
    for change in (1, 2**31):
        lying = lengths.copy()
        lying[:2] = (lying[:2].astype(np.int64) + np.array([change, -change])) % 2**32
        with pytest.raises(CorruptError):
            CODER.decode(memoryview(data[:8] + lying.tobytes() + data[8 + 4 * groups :]), spec)


def test_spare_raw_bits_are_zero() -> None:
    spec = spec_for(1, 1)
    data = bytearray(CODER.encode(np.full(spec.shape, 40, np.uint16), spec))  # magnitude 20: 3 raw bits
    data[-1] |= 0x80
    with pytest.raises(CorruptError):
        CODER.decode(memoryview(bytes(data)), spec)


@pytest.mark.parametrize(
    "frequencies",
    [TABLES[:0], TABLES[:, :62], TABLES + 1, np.where(TABLES == 1, 0, TABLES), TABLES[0]],
    ids=["none", "narrow", "sum", "zero", "flat"],
)
def test_unsound_tables_are_the_profiles_fault(frequencies: np.ndarray) -> None:
    spec = spec_for(3, 4, frequencies=frequencies)
    with pytest.raises(MismatchError):
        CODER.encode(np.zeros(spec.shape, np.uint16), spec)
    with pytest.raises(MismatchError):
        CODER.decode(memoryview(bytes(500)), spec)


def test_scales_of_another_shape_are_refused() -> None:
    spec = PlaneSpec("c", (1, 5, 6), 16, scales=spec_for(5, 7).scales)
    with pytest.raises(MismatchError):
        CODER.encode(np.zeros(spec.shape, np.uint16), spec)


# ---- Packed matrices -----------------------------------------------------------------------------------------------


def unpacked(arrays: dict[str, np.ndarray]) -> np.ndarray:
    profile = {f"m.{name}": array for name, array in arrays.items()}
    return unpack_matrix(Part("F32", (1, 0, 0), 0, 0, context=DecodeContext(profile)), "m")


@pytest.mark.parametrize(("groups", "rows", "columns"), [(1, 1, 1), (1, 300, 7), (4, 64, 33), (3, 3, 1)])
def test_packed_matrices_err_by_half_a_step(groups: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((rows, columns)) * 2.0 ** rng.integers(-9, 9, columns)).astype(np.float32)
    step = (np.abs(matrix).reshape(groups, -1, columns).max(1) / 100).astype(np.float32)
    back = unpacked(pack_matrix(matrix, step))
    assert back.shape == matrix.shape
    assert (np.abs(back - matrix) <= 0.5001 * step.repeat(rows // groups, 0)).all()


def test_a_price_a_bit_makes_packed_matrices_smaller_than_a_wider_step_does() -> None:
    matrix = np.random.default_rng(0).laplace(size=(4096, 8)).astype(np.float32)
    step = np.full((1, 8), 1.5, np.float32)
    near, cheap, wide = pack_matrix(matrix, step), pack_matrix(matrix, step, 0.15), pack_matrix(matrix, 1.2 * step)
    error = [float(np.square(unpacked(packed) - matrix).mean()) for packed in (cheap, wide)]
    assert (np.abs(unpacked(cheap)) <= np.abs(unpacked(near))).all()
    assert (np.abs(unpacked(cheap) - unpacked(near)) <= 1.5).all()
    assert cheap["codes"].size < 0.9 * near["codes"].size
    assert cheap["codes"].size < 1.01 * wide["codes"].size
    assert error[0] < 0.9 * error[1]


def test_packed_elements_are_clipped_to_a_byte() -> None:
    back = unpacked(pack_matrix(np.array([[-1e9], [0], [1e9]], np.float32), np.ones((1, 1), np.float32)))
    assert list(back[:, 0]) == [-128, 0, 127]


@pytest.mark.parametrize(
    ("field", "array"),
    [
        ("rows", np.array([0], np.int32)),
        ("rows", np.array([-8], np.int32)),
        ("rows", np.array([7], np.int32)),
        ("rows", np.array([2**31 - 2], np.int32)),
        ("rows", np.array([8, 8], np.int32)),
        ("rows", np.array([16], np.int32)),
        ("step", np.ones((2, 3, 1), np.float32)),
        ("step", np.ones((0, 3), np.float32)),
        ("step", np.ones((2, 4), np.float32)),
        ("codes", np.zeros(0, np.uint8)),
        ("codes", np.array([1, 2, 3], np.uint8)),
        ("codes", np.zeros(25, np.float32)),
    ],
    ids=str,
)
def test_what_is_no_packed_matrix(field: str, array: np.ndarray) -> None:
    sound = pack_matrix(np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32), np.ones((2, 3), "f4"))
    assert unpacked(sound).shape == (8, 3)
    with pytest.raises(MismatchError, match=r"'m[.a-z]*'"):
        unpacked({**sound, field: array})
    with pytest.raises(MismatchError):
        unpacked({name: given for name, given in sound.items() if name != field})

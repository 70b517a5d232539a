"""Every stage on its own: exact where it must be, the published distortion where it may lose."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpack.codecs.chain.base import Part, PlaneSpec, UnrepresentableError
from kvpack.codecs.chain.entropy.bitpack import BitPack, pack, reference, unpack
from kvpack.codecs.chain.entropy.deflate import Deflate
from kvpack.codecs.chain.entropy.rans import Rans, _layout, cpu, tables
from kvpack.codecs.chain.entropy.rans import reference as rans_reference
from kvpack.codecs.chain.entropy.zstd import Zstd
from kvpack.codecs.chain.keep import Keep
from kvpack.codecs.chain.predictors.cross_layer import CrossLayer
from kvpack.codecs.chain.quantizers.affine import Affine
from kvpack.codecs.chain.quantizers.anchor_delta import AnchorDelta
from kvpack.codecs.chain.quantizers.byte_planes import BytePlanes
from kvpack.codecs.chain.quantizers.component_groups import ComponentGroups
from kvpack.codecs.chain.quantizers.dead_zone import DeadZone
from kvpack.codecs.chain.quantizers.float_split import FloatSplit
from kvpack.codecs.chain.quantizers.higgs import Higgs
from kvpack.codecs.chain.quantizers.lloyd_max import LloydMax
from kvpack.codecs.chain.random import rotation_matrix
from kvpack.codecs.chain.registry import STAGES, stage_from_json
from kvpack.codecs.chain.transforms.klt import Klt
from kvpack.codecs.chain.transforms.rotation import Rotation
from kvpack.codecs.chain.transforms.token_klt import TokenKlt
from kvpack.codecs.low_rank import LowRank
from kvpack.errors import CorruptError, FormatError, UnsupportedError
from kvpack.numerics.floats import UINT

SHAPES = [(1, 1, 1), (1, 63, 5), (3, 1000, 7), (2, 0, 4), (4, 2, 64), (1, 5000, 1)]
CODERS = [BitPack(), Rans(), Zstd(level=3), Deflate(level=6)]


def skewed(shape: tuple[int, int, int], width: int, centres: int | None = None) -> np.ndarray:
    """Codes with statistics that differ by channel, like exponents."""
    rng = np.random.default_rng(0)
    centre = rng.integers(0, centres or 1 << width, (shape[0], 1, shape[2]))
    return ((centre + np.rint(rng.standard_normal(shape) * 1.5)).astype(np.int64) % (1 << width)).astype(np.uint16)


@given(st.integers(0, 32), st.lists(st.integers(0, 2**32 - 1), max_size=200))
def test_bitpack_is_its_reference(width: int, numbers: list[int]) -> None:
    codes = np.array(numbers, np.uint32) & np.uint32((1 << width) - 1)
    data = pack(codes, width)
    assert data == reference.pack(codes, width)
    assert (unpack(memoryview(data), len(codes), width) == codes).all()
    assert (reference.unpack(memoryview(data), len(codes), width) == codes).all()


def test_bitpack_refuses_a_wrong_length_and_spare_bits() -> None:
    with pytest.raises(CorruptError):
        unpack(memoryview(b"\0\0"), 3, 4 + 2)
    with pytest.raises(CorruptError):
        unpack(memoryview(b"\xf0"), 1, 4)


@pytest.mark.parametrize("coder", CODERS, ids=lambda c: c.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 9])
def test_entropy_coders_are_exact(coder: Rans, shape: tuple[int, int, int], width: int) -> None:
    spec = PlaneSpec("x", shape, width)
    for codes in (skewed(shape, width), np.zeros(shape, np.uint16), np.full(shape, (1 << width) - 1, np.uint16)):
        data = coder.encode(codes, spec)
        assert data == coder.encode(codes, spec)
        back = coder.decode(memoryview(data), spec)
        assert back.shape == shape
        assert (back == codes).all()


@given(st.data())
@settings(max_examples=60)
def test_rans_is_exact_on_anything(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 12))
    shape = tuple(data.draw(st.integers(1, most)) for most in (3, 80, 6))
    seed = data.draw(st.integers(0, 2**32 - 1))
    spread = data.draw(st.sampled_from([0.2, 3.0, 1e4]))
    rng = np.random.default_rng(seed)
    codes = (np.abs(rng.standard_normal(shape)) * spread).astype(np.int64) % (1 << width)
    spec = PlaneSpec("x", shape, width)
    stream = Rans().encode(codes.astype(np.uint16), spec)
    assert len(stream) <= 1 + (spec.size * width + 7) // 8
    assert (Rans().decode(memoryview(stream), spec) == codes).all()


@pytest.mark.parametrize("per_lane", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 63, 5), (1, 40, 9)], ids=str)
def test_compiled_rans_lanes_are_their_reference(shape: tuple[int, int, int], per_lane: int) -> None:
    """Words, lengths and states agree, and each decodes the other's."""
    channels = shape[0] * shape[2]
    per_lane = min(per_lane, channels)
    codes = skewed(shape, 4)
    counts, totals = np.zeros((shape[0], shape[2], 16), np.int32), np.zeros(16, np.int64)
    cpu.histogram(codes, counts, totals)
    assert (totals == np.bincount(codes.reshape(-1), minlength=16)).all()
    symbols = np.flatnonzero(totals)
    histogram = counts.reshape(channels, -1)[:, symbols]
    assigned, sums = tables.cluster(histogram)
    frequencies = tables.frequencies(tables.quantize(sums))
    groups, lanes = _layout(channels, per_lane)
    words = np.full(codes.size + 4, 0xA5A5, np.uint16)
    lengths, states = np.full(groups, -1, np.int64), np.full(lanes, 0xA5A5A5A5, np.uint32)
    entries = cpu.encode_entries(frequencies, symbols, 4)
    used = cpu.encode(codes, per_lane, assigned, entries, words, lengths, states)
    indices = np.searchsorted(symbols, codes)
    expected = rans_reference.encode(indices, per_lane, assigned, frequencies)
    assert (words[:used] == expected[0]).all()
    assert (lengths == expected[1]).all()
    assert (states == expected[2]).all()
    starts = np.concatenate([[0], np.cumsum(lengths)])
    back = rans_reference.decode(shape, per_lane, assigned, frequencies, words[:used], starts, states)
    assert (back == indices).all()
    padded = np.concatenate([words[:used], np.zeros(32 * per_lane * shape[1] + 1, np.uint16)])
    out = np.full(shape, 0xA5A5, np.uint16)
    slots, decode_entries = cpu.decode_tables(frequencies, symbols)
    assert cpu.decode(out, per_lane, assigned, slots, decode_entries, padded, starts, states)
    assert (out == codes).all()


@given(st.lists(st.lists(st.integers(0, 10**6), min_size=5, max_size=5), min_size=1, max_size=4))
def test_frequency_tables_are_complete(counts: list[list[int]]) -> None:
    sums = np.array(counts)
    sums[:, 0] += 1
    frequencies = tables.frequencies(tables.quantize(sums))
    assert (frequencies.sum(1) == tables.TOTAL).all()
    assert ((frequencies > 0) == (sums > 0)).all()


def test_rans_comes_close_to_the_entropy() -> None:
    """Within 2 percent of the order-0 entropy of every channel, tables and lanes included."""
    codes = skewed((4, 2048, 64), 9, centres=8)
    bits = 0.0
    for h in range(4):
        for d in range(64):
            p = np.bincount(codes[h, :, d]) / 2048
            bits -= 2048 * (p[p > 0] * np.log2(p[p > 0])).sum()
    size = len(Rans().encode(codes, PlaneSpec("x", codes.shape, 9)))
    assert bits * 0.98 < size * 8 < bits * 1.02


@pytest.mark.parametrize("cut", [0, 1, 5, 15, 16, 40, -1])
def test_rans_refuses_truncation(cut: int) -> None:
    codes = skewed((2, 300, 8), 9)
    spec = PlaneSpec("x", codes.shape, 9)
    with pytest.raises(CorruptError):
        Rans().decode(memoryview(Rans().encode(codes, spec)[:cut]), spec)


def test_rans_survives_every_changed_byte() -> None:
    """Without the container's checksum a change may go unseen, but never reads or writes out of bounds."""
    codes = skewed((1, 400, 6), 5, centres=3)
    spec = PlaneSpec("x", codes.shape, 5)
    stream = Rans().encode(codes, spec)
    assert stream[0] == 1
    for at in range(len(stream)):
        for change in (1, 0x80, 0xFF):
            broken = bytearray(stream)
            broken[at] ^= change
            with contextlib.suppress(CorruptError):
                assert Rans().decode(memoryview(bytes(broken)), spec).shape == codes.shape


def test_zstd_refuses_what_is_not_its_plane() -> None:
    spec = PlaneSpec("x", (1, 9, 1), 4)
    frame = Zstd(level=1).encode(np.full((1, 9, 1), 200, np.uint8), spec)
    with pytest.raises(CorruptError, match="beyond"):
        Zstd(level=1).decode(memoryview(frame), spec)
    with pytest.raises(CorruptError, match="hold"):
        Zstd(level=1).decode(memoryview(frame), PlaneSpec("x", (1, 8, 1), 8))
    with pytest.raises(CorruptError):
        Zstd(level=1).decode(memoryview(b"not zstd"), spec)


@pytest.mark.parametrize("quantizer", [FloatSplit(), BytePlanes()], ids=lambda q: q.name)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_exact_quantizers_keep_every_bit_pattern(quantizer: FloatSplit, dtype: str) -> None:
    unsigned = UINT[dtype]
    if dtype == "F32":
        bits = np.random.default_rng(0).integers(0, 2**32, 65536, np.uint32)
        bits[:4] = [0, 0x80000000, 0x7F800001, 0xFFC00000]
    else:
        bits = np.arange(65536).astype(unsigned)
    bits = bits.reshape(4, 256, 64)
    part = Part(dtype, bits.shape, 0, 256)
    planes = quantizer.planes(part)
    codes = quantizer.encode(bits, part)
    for plane, code in zip(planes, codes, strict=True):
        assert code.shape == plane.shape
        assert int(code.max()) < 1 << plane.width
    assert (quantizer.decode([c.copy() for c in codes], part) == bits).all()


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(2, 160, 64), (1, 130, 7), (1, 1, 3), (2, 200, 80)], ids=str)
def test_affine_error_is_half_a_step(axis: str, bits: int, shape: tuple[int, int, int]) -> None:
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    quantizer = Affine(bits=bits, axis=axis, group=32)
    part = Part("F32", shape, 0, shape[1])
    back = quantizer.decode(quantizer.encode(values, part), part)
    assert back.shape == shape
    step = (values.max() - values.min()) / (2**bits - 1)
    assert np.abs(back - values).max(initial=0) <= step * 0.51 + 0.01


def test_affine_equal_values_and_the_unrepresentable() -> None:
    quantizer = Affine(bits=2, axis="token", group=32)
    part = Part("F32", (1, 32, 2), 0, 32)
    same = np.full((1, 32, 2), 0.5, np.float32)
    assert (quantizer.decode(quantizer.encode(same, part), part) == same).all()
    for bad in (np.nan, np.inf, 1e6):
        values = same.copy()
        values[0, 3, 1] = bad
        with pytest.raises(UnrepresentableError):
            quantizer.encode(values, part)


def test_random_matrices_are_capped() -> None:
    with pytest.raises(UnrepresentableError, match="4096"):
        rotation_matrix(4097, 1)


def test_rotation_is_orthogonal_and_seeded() -> None:
    for dims in (1, 7, 64, 128):
        matrix = rotation_matrix(dims, 1)
        assert np.abs(matrix @ matrix.T - np.eye(dims)).max() < 1e-6
    assert (rotation_matrix(64, 1) != rotation_matrix(64, 2)).any()


def test_large_rotations_are_those_of_gram_schmidt(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from another algorithm, which a file that asks for them does not make a reader wait for."""
    monkeypatch.setattr("kvpack.codecs.chain.random._DIRECT", 100)
    rotation_matrix.cache_clear()
    found = rotation_matrix(150, 3)
    monkeypatch.undo()
    rotation_matrix.cache_clear()
    assert np.abs(found - rotation_matrix(150, 3)).max() < 1e-7
    values = np.random.default_rng(0).standard_normal((2, 50, 64)).astype(np.float32)
    rotation, part = Rotation(seed=1), Part("F32", values.shape, 0, 50)
    assert np.abs(rotation.inverse(rotation.forward(values, part), part) - values).max() < 1e-5


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.36338), (2, 0.11748), (3, 0.034548), (4, 0.0095010)])
def test_turboquant_distortion_is_the_papers(bits: int, distortion: float) -> None:
    """arXiv 2504.19874, theorem 1, prints 0.36, 0.117, 0.03, 0.009: the Lloyd-Max distortion of N(0, 1)."""
    values = np.random.default_rng(3).standard_normal((1, 20000, 128)).astype(np.float32)
    part = Part("F32", values.shape, 0, values.shape[1])
    rotation, quantizer = Rotation(seed=1), LloydMax(bits=bits, prod=False, seed=2)
    back = rotation.inverse(quantizer.decode(quantizer.encode(rotation.forward(values, part), part), part), part)
    error = np.square(back - values).sum(-1) / np.square(values).sum(-1)
    assert error.mean() == pytest.approx(distortion, rel=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_turboquant_prod_is_unbiased(bits: int) -> None:
    """Inner products with a fixed query are right on average (the paper, theorem 2)."""
    rng = np.random.default_rng(4)
    query = rng.standard_normal(64).astype(np.float32)
    vector = rng.standard_normal(64).astype(np.float32)
    estimates = []
    for seed in range(300):
        rotation, quantizer = Rotation(seed=seed), LloydMax(bits=bits, prod=True, seed=1000 + seed)
        part = Part("F32", (1, 1, 64), 0, 1)
        rotated = rotation.forward(vector.reshape(1, 1, 64), part)
        back = rotation.inverse(quantizer.decode(quantizer.encode(rotated, part), part), part)
        estimates.append(float(back.reshape(-1) @ query))
    spread = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - float(vector @ query)) < 4 * spread + 0.01


def test_lloyd_max_zero_vectors_and_the_unrepresentable() -> None:
    quantizer = LloydMax(bits=2, prod=False, seed=2)
    part = Part("F32", (1, 2, 4), 0, 2)
    zeros = np.zeros((1, 2, 4), np.float32)
    assert (quantizer.decode(quantizer.encode(zeros, part), part) == 0).all()
    for bad in (1e6, 1e-12):
        with pytest.raises(UnrepresentableError):
            quantizer.encode(zeros + np.float32(bad), part)


shapes = st.tuples(st.integers(1, 3), st.integers(0, 70), st.integers(1, 9))


@given(st.sampled_from([FloatSplit(), BytePlanes()]), st.sampled_from(list(UINT)), shapes, st.integers(0, 2**32 - 1))
def test_exact_quantizers_are_exact_on_anything(
    quantizer: FloatSplit, dtype: str, shape: tuple[int, int, int], seed: int
) -> None:
    unsigned = UINT[dtype]
    bits = np.random.default_rng(seed).integers(0, 1 << (8 * unsigned(0).itemsize), shape).astype(unsigned)
    part = Part(dtype, shape, 0, shape[1])
    for coder in CODERS:
        streams = [
            (plane, coder.encode(code, plane))
            for plane, code in zip(quantizer.planes(part), quantizer.encode(bits, part), strict=True)
        ]
        codes = [coder.decode(memoryview(data), plane) for plane, data in streams]
        back = quantizer.decode(codes, part)
        assert back.dtype == bits.dtype
        assert (back == bits).all()


@given(shapes, st.integers(1, 8), st.sampled_from(["token", "channel"]), st.integers(1, 40), st.data())
def test_affine_stays_within_its_groups(
    shape: tuple[int, int, int], bits: int, axis: str, group: int, data: st.DataObject
) -> None:
    """No value leaves the range of its group by more than fp16 rounding of scale and zero; shapes are as declared."""
    scale = data.draw(st.sampled_from([1e-3, 1.0, 300.0]))
    values = (np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal(shape) * scale).astype(np.float32)
    quantizer = Affine(bits=bits, axis=axis, group=group)
    part = Part("F32", shape, 0, shape[1])
    codes = quantizer.encode(values, part)
    assert [c.shape for c in codes] == [p.shape for p in quantizer.planes(part)]
    assert all(int(c.max(initial=0)) < 1 << p.width for c, p in zip(codes, quantizer.planes(part), strict=True))
    back = quantizer.decode(codes, part)
    assert back.shape == shape
    if values.size:
        levels, largest = 2**bits - 1, float(np.abs(values).max())
        step = float(np.ptp(values)) / levels
        rounding = [max(exact * 2**-11, 2**-25) for exact in (step, largest)]  # of scale and zero, or as subnormals
        slack = levels * rounding[0] + rounding[1] + 1e-6 * largest
        assert np.abs(back - values).max() <= (step + rounding[0]) / 2 + slack
        assert back.min() >= values.min() - slack
        assert back.max() <= values.max() + slack


@given(shapes, st.integers(1, 4), st.booleans(), st.sampled_from([1e-2, 1.0, 1e3]), st.integers(0, 99))
def test_lloyd_max_keeps_directions(
    shape: tuple[int, int, int], bits: int, prod: bool, scale: float, seed: int
) -> None:
    """Every plane is as declared; the plain variant never points a vector backwards."""
    values = (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)
    quantizer = LloydMax(bits=bits, prod=prod, seed=7)
    part = Part("F32", shape, 0, shape[1])
    codes = quantizer.encode(values, part)
    assert [c.shape for c in codes] == [p.shape for p in quantizer.planes(part)]
    assert all(
        int(c.max(initial=0)) < 1 << p.width or not p.width for c, p in zip(codes, quantizer.planes(part), strict=True)
    )
    back = quantizer.decode(codes, part)
    assert np.isfinite(back).all()
    if not prod:
        assert ((back * values).sum(-1) > 0).all()


@given(shapes, st.integers(0, 2**63 - 1))
def test_rotations_keep_lengths(shape: tuple[int, int, int], seed: int) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    part = Part("F32", shape, 0, shape[1])
    rotated = Rotation(seed=seed).forward(values, part)
    assert np.allclose((rotated**2).sum(-1), (values**2).sum(-1), rtol=1e-4)
    assert np.allclose(Rotation(seed=seed).inverse(rotated, part), values, atol=1e-4)


@given(st.integers(1, 22), st.integers(1, 16), shapes)
def test_zstd_is_exact_at_every_level(level: int, width: int, shape: tuple[int, int, int]) -> None:
    codes = skewed(shape, width)
    spec = PlaneSpec("x", shape, width)
    assert (Zstd(level=level).decode(memoryview(Zstd(level=level).encode(codes, spec)), spec) == codes).all()


@pytest.mark.parametrize("name", STAGES)
def test_stages_round_trip_as_json(name: str) -> None:
    examples = {
        "rotation": Rotation(seed=5),
        "affine": Affine(bits=3, axis="token", group=32),
        "lloyd_max": LloydMax(bits=3, prod=True, seed=9),
        "zstd": Zstd(level=7),
        "deflate": Deflate(level=2),
        "keep": Keep(first=4, last=128, group=32),
        "token_klt": TokenKlt(section="fisher"),
        "dead_zone": DeadZone(section="fisher", log_step=-234, importance=20),
        "klt": Klt(section="kvtc.keys"),
        "cross_layer": CrossLayer(section="aquakv-2.keys"),
        "anchor_delta": AnchorDelta(leading_bins=32, bins=16, leading=10, group=10),
        "component_groups": ComponentGroups(section="kvtc.keys", plan="1"),
        "higgs": Higgs(bits=3, seed=3),
        "low_rank": LowRank(log_step=-3, importance=7),
    }
    stage = examples.get(name) or STAGES[name]()
    assert stage_from_json(stage.to_json()) == stage


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ([], FormatError),
        ({"name": "rans", "version": 2}, FormatError),
        ({"name": "nonsense", "version": 1, "configuration": {}}, UnsupportedError),
        ({"name": "rans", "version": 1, "configuration": {}}, UnsupportedError),
        ({"name": "zstd", "version": 1, "configuration": {"level": 99}}, FormatError),
        ({"name": "zstd", "version": 1, "configuration": {"level": True}}, FormatError),
        ({"name": "affine", "version": 1, "configuration": {}}, FormatError),
        ({"name": "keep", "version": 1, "configuration": {"first": -1, "last": 0, "group": 1}}, FormatError),
        ({"name": "deflate", "version": 1, "configuration": {"level": 0}}, FormatError),
        ({"name": "higgs", "version": 1, "configuration": {"bits": 5, "seed": 0}}, FormatError),
        ({"name": "klt", "version": 1, "configuration": {"section": 3}}, FormatError),
    ],
)
def test_bad_stages_are_refused(document: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        stage_from_json(document)

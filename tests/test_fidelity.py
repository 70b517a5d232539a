"""Floats as bits, and the figures of ``kvpack.fidelity`` against independent computations in torch."""

import json
import tracemalloc
from itertools import cycle
from math import inf, nan, sqrt
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvpack.errors import FormatError, MismatchError
from kvpack.fidelity import (
    Attention,
    Reconstruction,
    check,
    compare,
    measure_attention,
    measure_reconstruction,
)
from kvpack.fidelity import meter as meter_module
from kvpack.fidelity import reconstruction as reconstruction_module
from kvpack.formats.records import layer_tensors
from kvpack.formats.safetensors import ITEM_BITS, TensorSpec
from kvpack.numerics.floats import FLOAT_BITS, UINT, from_float32, to_float32

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def as_torch(bits, dtype):
    signed = np.int32 if dtype == "F32" else np.int16
    return torch.from_numpy(bits.view(signed).copy()).view(TORCH[dtype])


class Source:
    """A cache in memory: float arrays become tensors of ``dtype``, integer arrays stay.

    It gives windows of odd lengths, to show that no figure depends on them.
    """

    LENGTHS = (1, 7, 3, 13, 5)

    def __init__(self, arrays, dtype="F32", metadata=None):
        self.metadata = {"attention": '{"scale": 0.125}'} if metadata is None else metadata
        self.tensors, self.arrays, self.reads, self.walks = {}, {}, [], 0
        for name, array in arrays.items():
            self.put(name, np.asarray(array), dtype)

    def put(self, name, array, dtype):
        kinds = {"i": "I", "u": "U"}
        kind = dtype if array.dtype.kind == "f" else f"{kinds[array.dtype.kind]}{array.itemsize * 8}"
        bits = from_float32(array, dtype) if array.dtype.kind == "f" else array.view(f"u{array.itemsize}")
        size = bits.size * ITEM_BITS[kind] // 8
        self.tensors[name], self.arrays[name] = TensorSpec(name, kind, array.shape, 0, size), bits

    def read(self, name, rows=None):
        self.reads.append(name)
        return self.arrays[name] if rows is None else self.arrays[name][:, rows]

    def windows(self):
        self.walks += 1
        named = {name: self.arrays[name] for names in layer_tensors(self).values() for name in names.values()}
        first, longest = 0, max((bits.shape[1] for bits in named.values()), default=0)
        for length in cycle(self.LENGTHS):
            if first >= longest:
                return
            end = first + length
            yield first, {name: bits[:, first:end] for name, bits in named.items() if first < bits.shape[1]}
            first = end


def cache(seed=0, *, layers=2, heads=(2, 6), tokens=40, dims=(8, 8), probes=5):
    """Arrays of a capture: ``heads`` of keys and values, and of queries; ``dims`` of keys and of values."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for i in range(layers):
        arrays[f"layers.{i}.keys"] = rng.normal(size=(heads[0], tokens, dims[0])).astype(np.float32)
        arrays[f"layers.{i}.values"] = rng.normal(size=(heads[0], tokens, dims[1])).astype(np.float32)
        arrays[f"queries.{i}"] = rng.normal(size=(heads[1], probes, dims[0])).astype(np.float32) * 3
    arrays["query_positions"] = np.sort(rng.integers(0, tokens, probes)).astype(np.int32)
    arrays["tokens"] = rng.integers(0, 1000, tokens).astype(np.int32)
    return arrays


def noisy(arrays, amount=0.05, seed=9):
    rng = np.random.default_rng(seed)
    return {
        name: (a + amount * rng.normal(size=a.shape)).astype(np.float32) if name.startswith("layers.") else a
        for name, a in arrays.items()
    }


# Floats


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_pattern_survives_the_round_trip(dtype):
    values = to_float32(ALL_16_BITS, dtype)
    assert torch.equal(torch.from_numpy(values).nan_to_num(7.5), as_torch(ALL_16_BITS, dtype).float().nan_to_num(7.5))
    back = from_float32(values, dtype)
    exponent, mantissa = FLOAT_BITS[dtype]
    infinity = np.uint16((2**exponent - 1) << (mantissa + 1))
    number = infinity >= (ALL_16_BITS << 1)
    assert np.array_equal(number, ~np.isnan(values))
    assert np.array_equal(back[number], ALL_16_BITS[number])
    assert np.isnan(to_float32(back[~number], dtype)).all()
    assert back.dtype == UINT[dtype]


@settings(max_examples=60, deadline=None)
@given(bits=hnp.arrays(np.uint32, st.integers(0, 64)), dtype=st.sampled_from(["BF16", "F16", "F32"]))
def test_rounding_is_that_of_torch(bits, dtype):
    values = bits.view(np.float32)
    ours = to_float32(from_float32(values, dtype), dtype)
    theirs = torch.from_numpy(values.copy()).to(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(ours, theirs)
    number = ~np.isnan(ours)
    assert np.array_equal(np.signbit(ours[number]), np.signbit(theirs[number]))


def test_rounding_around_every_bf16_boundary():
    """Halfway, just below and just above, between all neighbours: ties to even, overflow to Inf."""
    high = ALL_16_BITS.astype(np.uint32) << 16
    bits = np.concatenate([high + low for low in (0x7FFF, 0x8000, 0x8001, 0xFFFF)]).astype(np.uint32)
    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(to_float32(from_float32(values, "BF16"), "BF16"), expected)


def test_f32_is_verbatim_and_shapes_are_kept():
    bits = np.random.default_rng(0).integers(0, 2**32, (3, 5, 7), dtype=np.uint32)
    assert np.array_equal(from_float32(to_float32(bits, "F32"), "F32"), bits)
    strided = ALL_16_BITS.reshape(16, 64, 64)[:, ::3, 1:]
    for dtype in ("BF16", "F16"):
        assert from_float32(to_float32(strided, dtype), dtype).shape == strided.shape


# Reconstruction


def reconstruct(x, y, dtype="F32"):
    return measure_reconstruction(*(from_float32(np.asarray(a, np.float32), dtype) for a in (x, y)), dtype)


def test_reconstruction_on_a_known_case():
    figures = reconstruct([[[3, 4], [1, 0]]], [[[3, 4], [0, 1]]])
    assert figures == Reconstruction(4, 26.0, 2.0, 1.0, 2.0, False)
    assert (figures.nmse, figures.max_abs_error, figures.cosine) == (2 / 26, 1.0, 0.5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["BF16", "F16", "F32"]), st.integers(1, 700))
def test_reconstruction_against_torch(seed, dtype, block):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 9, 5)).astype(np.float32)
    bits = [from_float32(a, dtype) for a in (x, x + rng.normal(size=x.shape).astype(np.float32) * 0.1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction_module, "BLOCK", block)
        figures = measure_reconstruction(*bits, dtype)
    a, b = (as_torch(part, dtype).double() for part in bits)
    assert figures.nmse == pytest.approx(float(((a - b) ** 2).sum() / (a**2).sum()))
    assert figures.max_abs_error == float((a - b).abs().max())
    assert figures.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=-1).mean()))
    assert not figures.bit_exact


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_an_exact_copy_of_any_bits_has_no_error(dtype):
    bits = ALL_16_BITS.reshape(2, 512, 64)
    figures = measure_reconstruction(bits, bits.copy(), dtype)
    assert (figures.nmse, figures.max_abs_error, figures.cosine, figures.bit_exact) == (0.0, 0.0, 1.0, True)


def test_zero_vectors():
    zero, one = [[[0.0, 0.0]]], [[[1.0, 0.0]]]
    assert reconstruct(zero, zero).nmse == 0.0
    assert (reconstruct(zero, one).nmse, reconstruct(zero, one).cosine) == (inf, 0.0)
    assert (reconstruct(one, zero).nmse, reconstruct(one, zero).cosine) == (1.0, 0.0)
    signed = reconstruct(zero, [[[-0.0, 0.0]]])
    assert (signed.nmse, signed.cosine, signed.bit_exact) == (0.0, 1.0, False)


def test_equal_non_finite_elements_are_left_out():
    figures = reconstruct([[[nan, 3.0], [inf, 1.0]]], [[[nan, 2.0], [inf, 1.0]]])
    assert (figures.nmse, figures.max_abs_error, figures.cosine) == (1 / 10, 1.0, 1.0)


@pytest.mark.parametrize(("x", "y"), [(nan, 1.0), (1.0, nan), (inf, -inf), (2.0, inf), (inf, nan)])
def test_non_finite_elements_that_differ_are_infinite_error(x, y):
    figures = reconstruct([[[x, 3.0], [1.0, 1.0]]], [[[y, 3.0], [1.0, 1.0]]])
    assert (figures.nmse, figures.max_abs_error, figures.cosine) == (inf, inf, 0.5)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_nothing_to_compare(shape):
    assert measure_reconstruction(*[np.zeros(shape, np.uint16)] * 2, "BF16") == Reconstruction()


def test_merging_token_ranges_gives_the_whole():
    rng = np.random.default_rng(1)
    x, y = (from_float32(rng.normal(size=(3, 50, 8)).astype(np.float32), "F16") for _ in range(2))
    whole = measure_reconstruction(x, y, "F16")
    parts = Reconstruction.merge(
        measure_reconstruction(x[:, a:b], y[:, a:b], "F16") for a, b in ((0, 7), (7, 8), (8, 50))
    )
    assert parts.nmse == pytest.approx(whole.nmse)
    assert parts.cosine == pytest.approx(whole.cosine)
    assert (parts.max_abs_error, parts.elements) == (whole.max_abs_error, whole.elements)
    assert Reconstruction.merge([whole, Reconstruction(inf)]).max_abs_error == whole.max_abs_error


# Attention


def torch_attention(queries, positions, original, other, scale):
    """KL, its rows' 99th percentile from above, output error and overlap, by torch."""
    q, positions = torch.from_numpy(queries).double(), torch.from_numpy(positions).long()
    rows = []
    for keys, values in (original, other):
        k, v = (torch.from_numpy(a).double().repeat_interleave(len(queries) // len(a), dim=0) for a in (keys, values))
        mask = torch.arange(k.shape[1])[None, :] <= positions[:, None]
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        p = (q @ k.mT * scale).masked_fill(~mask, -inf).softmax(dim=-1)
        rows.append((p, output))
    (p, o), (p_hat, o_hat) = rows
    kl = torch.where(p > 0, p * (p.log() - p_hat.log()), 0.0).sum(-1).flatten()
    overlaps = []
    for h in range(p.shape[0]):
        for row, position in enumerate(positions.tolist()):
            k = min(16, position + 1)
            tops = [set(x[h, row].topk(k).indices.tolist()) for x in (p, p_hat)]
            overlaps.append(len(tops[0] & tops[1]) / k)
    error = sqrt(float(((o - o_hat) ** 2).sum() / (o**2).sum()))
    p99 = float(np.percentile(kl.numpy(), 99, method="higher"))
    return float(kl.mean()), p99, error, float(np.mean(overlaps))


@pytest.mark.parametrize("heads", [(4, 4), (2, 6), (1, 3)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("dims", [(8, 8), (12, 5)])
@pytest.mark.parametrize("block", [1 << 20, 100])
def test_attention_against_torch(monkeypatch, heads, dims, block):
    monkeypatch.setattr(meter_module, "BLOCK", block)
    arrays = cache(3, heads=heads, dims=dims, probes=7)
    lossy = noisy(arrays, 0.2)
    original, other = (tuple(a[f"layers.0.{w}"] for w in ("keys", "values")) for a in (arrays, lossy))
    case = (arrays["queries.0"], arrays["query_positions"], original, other, 0.3)
    figures = measure_attention(*case)
    got = (figures.kl, figures.kl_p99, figures.output_error, figures.topk_overlap)
    assert got == pytest.approx(torch_attention(*case), rel=1e-9)
    assert figures.kl > 0
    assert figures.topk_overlap < 1
    assert figures.rows == heads[1] * 7


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 4), st.floats(0, 50))
def test_attention_is_well_behaved(seed, tokens, probes, size):
    arrays = cache(seed, layers=1, tokens=tokens, probes=probes)
    keys, values, queries = (arrays[n] for n in ("layers.0.keys", "layers.0.values", "queries.0"))
    copies = (keys.copy(), values.copy())
    same = measure_attention(queries, arrays["query_positions"], (keys, values), copies, size)
    assert same.kl == pytest.approx(0, abs=1e-12)
    assert same.output_error == pytest.approx(0, abs=1e-9)
    assert same.topk_overlap == 1
    other = noisy(arrays, size)
    lossy = (other["layers.0.keys"], other["layers.0.values"])
    figures = measure_attention(queries, arrays["query_positions"], (keys, values), lossy, 1.0)
    assert 0 <= figures.kl <= figures.rows * max(figures.kl_p99, 1e-12)
    assert 0 <= figures.topk_overlap <= 1


def test_a_query_sees_tokens_up_to_its_own_position_only():
    arrays = cache(4, layers=1)
    original = (arrays["layers.0.keys"], arrays["layers.0.values"])
    spoilt = tuple(part.copy() for part in original)
    for part in spoilt:
        part[:, 21:] = nan
    unchanged = measure_attention(arrays["queries.0"][:, :2], np.array([3, 20]), original, spoilt, 0.3)
    assert (unchanged.kl, unchanged.error_energy) == pytest.approx((0, 0), abs=1e-12)
    assert measure_attention(arrays["queries.0"][:, :1], np.array([21]), original, spoilt, 0.3).kl == inf


def test_non_finite_rows():
    arrays = cache(5, layers=1, heads=(2, 4), probes=3)
    queries, positions = arrays["queries.0"], np.array([10, 20, 30])
    sound = (arrays["layers.0.keys"], arrays["layers.0.values"])
    for part in (0, 1):
        spoilt = tuple(a.copy() for a in sound)
        spoilt[part][1, 2, 0] = nan
        lost = measure_attention(queries, positions, sound, spoilt, 0.3)
        assert (lost.rows, lost.skipped, lost.kl, lost.output_error) == (12, 0, inf, inf)
        assert (lost.kl_p99, lost.topk_overlap) == (inf, pytest.approx(0.5))
        half = measure_attention(queries, positions, spoilt, sound, 0.3)
        assert (half.rows, half.skipped) == (6, 6)
        assert half.kl == pytest.approx(0, abs=1e-12)
    nothing = measure_attention(queries * nan, positions, sound, sound, 0.3)
    assert nothing == Attention(skipped=12)


def test_no_probes_or_tokens():
    empty = np.zeros((2, 0, 8), np.float32)
    assert measure_attention(empty, np.zeros(0, np.int32), (empty, empty), (empty, empty), 1.0) == Attention()
    keys = np.ones((2, 4, 8), np.float32)
    assert measure_attention(empty, np.zeros(0, np.int32), (keys, keys), (keys, keys), 1.0) == Attention()


@pytest.mark.parametrize(
    ("queries", "positions", "keys", "values", "text"),
    [
        ((3, 2, 8), [0, 1], (2, 4, 8), (2, 4, 8), "3 query heads are not a multiple of 2"),
        ((4, 2, 8), [0], (2, 4, 8), (2, 4, 8), "2 probe queries a head, but query positions of shape"),
        ((4, 2, 8), [0, 4], (2, 4, 8), (2, 4, 8), "positions 0 to 4 are not within the cache's 4 tokens"),
        ((4, 2, 8), [-1, 3], (2, 4, 8), (2, 4, 8), "positions -1 to 3 are not within"),
        ((4, 1, 8), [0], (2, 0, 8), (2, 0, 8), "not within the cache's 0 tokens"),
        ((4, 2, 6), [0, 1], (2, 4, 8), (2, 4, 8), "head_dim differs"),
        ((4, 2, 8), [0, 1], (2, 4, 8), (2, 5, 8), "not of the same heads and tokens"),
        ((4, 2, 8), [0, 1], (0, 4, 8), (0, 4, 8), "not a multiple of 0"),
    ],
)
def test_shapes_that_do_not_fit(queries, positions, keys, values, text):
    q, k, v = (np.zeros(shape, np.float32) for shape in (queries, keys, values))
    with pytest.raises(FormatError, match=text):
        measure_attention(q, np.array(positions), (k, v), (k, v), 1.0)


def test_reconstructed_shape_differs():
    k, longer = np.zeros((2, 4, 8), np.float32), np.zeros((2, 5, 8), np.float32)
    with pytest.raises(FormatError, match="differ in shape"):
        measure_attention(np.zeros((2, 1, 8)), np.array([0]), (k, k), (k, longer), 1.0)


# Reports


def test_an_exact_copy_reports_zero_and_exact():
    arrays = cache()
    report = compare(Source(arrays, "BF16"), Source(arrays, "BF16"))
    assert report.bit_exact
    assert report.notes == ()
    assert (report.keys.nmse, report.values.nmse, report.keys.cosine) == (0, 0, 1)
    attention = report.attention
    assert (attention.kl, attention.kl_p99, attention.output_error, attention.topk_overlap) == (0, 0, 0, 1)
    assert check(report, max_nmse=0, max_attn_err=0, bit_exact=True) == []


def test_a_lossy_copy_reports_what_the_metrics_say():
    arrays = cache(layers=3)
    lossy = noisy(arrays)
    scales = [0.2, 0.4, 1]
    metadata = {"attention": json.dumps({"scale": scales, "else": 1})}
    report = compare(Source(arrays, metadata=metadata), Source(lossy, metadata=metadata))
    expected = [
        torch_attention(
            arrays[f"queries.{i}"],
            arrays["query_positions"],
            *[(a[f"layers.{i}.keys"], a[f"layers.{i}.values"]) for a in (arrays, lossy)],
            scales[i],
        )
        for i in range(3)
    ]
    for layer, (kl, p99, error, overlap) in zip(report.layers, expected, strict=True):
        figures = layer.attention
        got = (figures.kl, figures.kl_p99, figures.output_error, figures.topk_overlap)
        assert got == pytest.approx((kl, p99, error, overlap))
    assert report.attention.kl == pytest.approx(np.mean([e[0] for e in expected]))
    assert report.attention.kl_p99 == pytest.approx(max(e[1] for e in expected))
    assert report.attention.topk_overlap == pytest.approx(np.mean([e[3] for e in expected]))
    energies = [layer.attention.energy for layer in report.layers]
    pooled = sqrt(sum(w * e[2] ** 2 for w, e in zip(energies, expected, strict=True)) / sum(energies))
    assert report.attention.output_error == pytest.approx(pooled)
    x, y = (np.stack([a[f"layers.{i}.keys"] for i in range(3)]).astype(float) for a in (arrays, lossy))
    assert report.keys.nmse == pytest.approx(((x - y) ** 2).sum() / (x**2).sum())
    assert not report.bit_exact
    assert report.notes == ()
    assert report.extras.same == 5


def test_layers_come_in_numeric_order_and_are_read_once():
    original, other = (Source(cache(layers=11, tokens=30)) for _ in range(2))
    original.tensors = dict(reversed(original.tensors.items()))
    assert [layer.index for layer in compare(original, other).layers] == list(range(11))
    assert (original.walks, other.walks) == (0, 1)
    assert not [name for name in other.reads if name.startswith("layers.")]


def test_layers_of_different_lengths():
    arrays = cache(layers=3, probes=4)
    arrays["layers.1.keys"], arrays["layers.2.values"] = (
        arrays["layers.1.keys"][:, :25],
        arrays["layers.2.values"][:, :0],
    )
    report = compare(Source(arrays), Source(noisy(arrays)))
    assert [layer.keys.elements for layer in report.layers] == [640, 400, 640]
    assert report.layers[2].values == Reconstruction()
    unpaired = "keys and values are not of the same heads and tokens: attention not measured (layers 1-2)"
    assert (report.notes, report.unmeasured) == ((unpaired,), (1, 2))


def test_memory_does_not_grow_with_tokens():
    peaks = []
    for tokens in (500, 4000):
        arrays = cache(tokens=tokens, dims=(32, 32))
        caches = Source(arrays), Source(noisy(arrays))
        compare(*caches)
        tracemalloc.start()
        compare(*caches)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    layer = 2 * 4000 * 32 * 4
    assert max(peaks) < layer
    assert peaks[1] < 1.2 * peaks[0]


def test_values_without_dimensions():
    arrays = cache(layers=1, dims=(8, 0))
    for left_out in (False, True):
        other = Source(noisy(arrays))
        if left_out:
            whole = other.windows
            other.windows = lambda: ((at, {n: b for n, b in w.items() if b.size}) for at, w in whole())  # noqa: B023
        report = compare(Source(arrays), other)
        assert report.attention.kl > 0
        assert report.attention.output_error == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda windows: windows[:-1], r"the reader gave 37 of 40 tokens"),
        (lambda windows: windows[1:], r"gave tokens from 1 on where token 0 is next"),
        (lambda windows: [windows[0], *windows], r"gave tokens from 0 on where token 1 is next"),
        (lambda windows: [(at, {n: b[1:] for n, b in w.items()}) for at, w in windows], r"gave \[1, 1, 8\] at token 0"),
        (lambda windows: [(at, {n: b for n, b in w.items() if "0.v" not in n}) for at, w in windows], "gave 0 of 40"),
        (
            lambda windows: [(at, {n: b[:, : 1 if "0.v" in n else 99] for n, b in w.items()}) for at, w in windows],
            r"layers\.0\.values: the reader gave \[2, 1, 8\] at token 1 of",
        ),
    ],
)
def test_a_reader_that_does_not_give_every_token_once_is_refused(change, text):
    other = Source(cache())
    windows = change(list(other.windows()))
    other.windows = lambda: iter(windows)
    with pytest.raises(FormatError, match=text):
        compare(Source(cache()), other)


def test_without_queries():
    arrays = {n: a for n, a in cache().items() if n.startswith("layers.")}
    report = compare(Source(arrays), Source(noisy(arrays)))
    assert report.attention is None
    assert report.notes == ("no probe queries in ORIGINAL: attention fidelity not measured (capture with --queries)",)
    assert check(report, max_attn_err=1e9) == ["attention error cannot be checked: it was not measured (see the notes)"]
    assert check(report, max_nmse=1) == []


def test_notes_say_what_is_missing():
    arrays = cache(layers=4)
    del arrays["queries.1"], arrays["queries.2"], arrays["layers.3.values"]
    original = Source(arrays, metadata={})
    report = compare(original, Source(arrays))
    assert report.notes == (
        "only keys or only values in ORIGINAL (layer 3)",
        "no attention scale in ORIGINAL's metadata: head_dim ** -0.5 assumed (layer 0)",
        "no probe queries in ORIGINAL: attention not measured (layers 1-2)",
        "the metadata of the two differ",
    )
    assert report.unmeasured == (1, 2, 3)
    assert check(report, max_attn_err=1) == ["attention error cannot be checked: not measured in layers 1-3"]
    del original.tensors["query_positions"]
    assert any("no query_positions" in note for note in compare(original, Source(arrays)).notes)
    assert compare(Source({}), Source({})).notes == ("no keys or values in ORIGINAL: only bits were compared",)
    assert check(compare(Source({}), Source({})), max_nmse=1) == ["NMSE cannot be checked: there are no keys or values"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "9" * 5000,
        '{"scale": 1' + "0" * 400 + "}",
        '{"scale": null}',
        '{"scale": "x"}',
        '{"scale": -1}',
        '{"scale": []}',
    ],
)
def test_an_unusable_scale_is_assumed_and_said(text):
    arrays = cache(layers=1)
    report = compare(*(Source(a, metadata={"attention": text}) for a in (arrays, noisy(arrays))))
    assert report.notes == ("no attention scale in ORIGINAL's metadata: head_dim ** -0.5 assumed (layer 0)",)
    stated = {"attention": json.dumps({"scale": 8**-0.5})}
    assert compare(*(Source(a, metadata=stated) for a in (arrays, noisy(arrays)))).layers == report.layers


def test_layers_without_tokens_need_no_attention():
    arrays = cache(layers=2)
    for what in ("keys", "values"):
        arrays[f"layers.1.{what}"] = np.zeros((2, 0, 8), np.float32)
    del arrays["queries.1"]
    report = compare(Source(arrays), Source(arrays))
    assert (report.notes, report.unmeasured) == ((), ())
    assert check(report, max_attn_err=0) == []


def test_rows_not_finite_in_the_original_are_noted():
    arrays = cache(layers=1)
    arrays["layers.0.keys"][0, 0, 0] = nan
    report = compare(Source(arrays), Source(arrays))
    assert report.notes == ("some attention rows are not finite in ORIGINAL itself and are left out (layer 0)",)
    assert (report.attention.rows, report.attention.skipped, report.attention.kl) == (15, 15, 0)
    assert report.bit_exact


def test_extras_are_compared_by_bits():
    arrays = cache()
    arrays["attention_mass"] = np.full((2, 2, 40), nan, np.float32)
    arrays["layers.0.state"] = np.arange(4, dtype=np.uint8)
    arrays["layers.07.keys"] = np.zeros((1, 2, 2), np.float32)
    assert compare(Source(arrays), Source(arrays)).bit_exact
    changed = {
        **arrays,
        "tokens": arrays["tokens"] + 1,
        "layers.0.state": np.arange(5, dtype=np.uint8),
        "new": arrays["tokens"],
    }
    del changed["queries.1"]
    report = compare(Source(arrays), Source(changed))
    assert report.extras.differ == ("tokens", "layers.0.state")
    assert (report.extras.missing, report.extras.added) == (("queries.1",), ("new",))
    assert report.keys.bit_exact
    assert check(report, bit_exact=True) == ["not bit-exact: tokens, layers.0.state, queries.1 (missing), new (added)"]


def test_checks_fail_in_words():
    arrays = cache(layers=3)
    report = compare(Source(arrays), Source(noisy(arrays)))
    failures = check(report, max_nmse=1e-6, max_attn_err=1e-6, bit_exact=True)
    assert [failure.split(" is ")[0] for failure in failures[:2]] == [
        f"NMSE of {'keys' if report.keys.nmse > report.values.nmse else 'values'}",
        "attention output error",
    ]
    assert failures[2] == ("not bit-exact: layers.0.keys, layers.0.values, layers.1.keys, layers.1.values and 2 more")
    assert check(report, max_nmse=1, max_attn_err=1) == []
    assert len(check(report, max_nmse=nan, max_attn_err=nan)) == 2


def test_mismatched_layers():
    arrays = cache()
    cut = {**arrays, "layers.1.values": arrays["layers.1.values"][:, :30]}
    with pytest.raises(MismatchError, match=r"layers\.1\.values: F32 \[2, 40, 8\] in .*, F32 \[2, 30, 8\] in"):
        compare(Source(arrays), Source(cut))
    with pytest.raises(MismatchError, match=r"layers\.0\.keys: F32 \[2, 40, 8\] in .*, BF16 \[2, 40, 8\] in"):
        compare(Source(arrays), Source(arrays, "BF16"))
    fewer = {n: a for n, a in arrays.items() if n != "layers.0.keys"}
    with pytest.raises(MismatchError, match=r"layers\.0\.keys: F32 .* in the original, absent in"):
        compare(Source(arrays), Source(fewer))
    with pytest.raises(MismatchError, match=r"layers\.0\.keys: absent in the original, F32"):
        compare(Source(fewer), Source(arrays))
    assert MismatchError.exit_code == 5


def test_probes_that_do_not_fit_name_the_layer():
    arrays = cache()
    arrays["queries.1"] = arrays["queries.1"][:5]
    with pytest.raises(FormatError, match=r"layer 1: 5 query heads are not a multiple of 2"):
        compare(Source(arrays), Source(arrays))
    arrays["query_positions"] = arrays["query_positions"].astype(np.float32)
    with pytest.raises(FormatError, match=r"query_positions is F32 \[5\], not a list of whole numbers"):
        compare(Source(arrays), Source(arrays))


def test_json_is_strict_and_says_what_is_infinite():
    arrays = cache(layers=1)
    lossy = {**arrays, "layers.0.values": arrays["layers.0.values"].copy()}
    lossy["layers.0.values"][0, 0, 0] = inf
    report = compare(Source(arrays), Source(lossy))
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["schema_version"] == 1
    assert document["values"]["nmse"] is None
    assert document["keys"]["nmse"] == 0
    assert "values.nmse" in document["infinite"]
    assert "layers[0].values.max_abs_error" in document["infinite"]
    assert "layers[0].attention.output_error" in document["infinite"]
    assert check(report, max_nmse=1e300, max_attn_err=1e300)[0] == "NMSE of values is inf, above 1e+300"
    clean = compare(Source(arrays), Source(arrays)).to_json()
    assert clean["infinite"] == []
    assert clean["extras"] == {"same": 3, "differ": [], "missing": [], "added": []}


def test_progress_counts_the_originals_bytes():
    arrays = cache()
    seen = []
    compare(Source(arrays), Source(arrays), lambda done, total: seen.append((done, total)))
    total = sum(a.nbytes for a in arrays.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


# The model's cache


def test_the_model_gets_every_token_but_the_last_from_windows():
    from kvpack.fidelity.model import _load

    arrays = cache(layers=2, tokens=33)
    source = Source(arrays, "BF16")
    network = SimpleNamespace(dtype=torch.float32, device="cpu")
    model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=2), network=network)
    for i, layer in enumerate(_load(model, source, 33)):
        for what, got in zip(("keys", "values"), layer, strict=True):
            expected = to_float32(source.arrays[f"layers.{i}.{what}"][:, :-1], "BF16")
            assert np.array_equal(got[0].numpy(), expected)
    assert (source.walks, source.reads) == (1, [])
    with pytest.raises(MismatchError, match="33 tokens, but the capture lists 32"):
        _load(model, source, 32)

"""Stages of calibrated and stacked codecs, each on its own, on anything of the shape they take."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import grids

from kvpack.codecs.chain.base import Codes, Part, PlaneSpec, Quantizer, UnrepresentableError
from kvpack.codecs.chain.chain import Chain
from kvpack.codecs.chain.codec import ChainCodec
from kvpack.codecs.chain.entropy.deflate import Deflate
from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.codecs.chain.keep import Keep
from kvpack.codecs.chain.predictors.cross_layer import CrossLayer
from kvpack.codecs.chain.quantizers.affine import Affine
from kvpack.codecs.chain.quantizers.anchor_delta import AnchorDelta
from kvpack.codecs.chain.quantizers.component_groups import E4M3, ComponentGroups
from kvpack.codecs.chain.quantizers.float_split import FloatSplit
from kvpack.codecs.chain.quantizers.higgs import Higgs
from kvpack.codecs.chain.transforms.klt import Klt
from kvpack.codecs.chain.transforms.merge_heads import MergeHeads
from kvpack.codecs.chain.transforms.unrope import Unrope
from kvpack.codecs.context import DecodeContext
from kvpack.codecs.registry import codec_from_json
from kvpack.errors import CorruptError, FormatError, MismatchError

shapes = st.tuples(st.integers(1, 4), st.integers(0, 70), st.integers(1, 9))
SCALES = st.sampled_from([1e-3, 1.0, 300.0])


def normal(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, np.float32)


def part_of(shape: tuple[int, int, int], profile: Any = None, **options: Any) -> Part:
    return Part("F32", shape, 0, shape[1], context=DecodeContext(profile), **options)


def coded(quantizer: Quantizer, values: np.ndarray, part: Part) -> np.ndarray:
    """Encode, check every plane against its declaration, decode."""
    codes: list[Codes] = quantizer.encode(values, part)
    planes = quantizer.planes(part)
    assert [c.shape for c in codes] == [p.shape for p in planes]
    assert all(int(c.max(initial=0)) < 1 << p.width for c, p in zip(codes, planes, strict=True))
    back = quantizer.decode([c.copy() for c in codes], part)
    assert (back.shape, back.dtype) == (part.shape, np.float32)
    return back


@given(st.integers(0, 300), st.integers(0, 40), st.integers(0, 200), st.integers(1, 40), st.integers(1, 128))
def test_keep_divides_a_tensor_alike_whatever_its_chunks(
    total: int, first: int, last: int, group: int, chunk: int
) -> None:
    keep = Keep(first=first, last=last, group=group)
    tokens = []
    for start in range(0, total, chunk):
        size = min(chunk, total - start)
        begin, end = keep.coded(Part("F32", (1, size, 1), start, total))
        assert 0 <= begin <= end <= size
        tokens += list(range(start + begin, start + end))
    count = max(0, total - first - last) // group * group
    assert tokens == list(range(first, first + count))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 20), st.integers(1, 5))
def test_merge_heads_is_a_permutation(layers: int, heads: int, tokens: int, dims: int) -> None:
    part = part_of((layers * heads, tokens, dims), heads=heads)
    values = np.arange(np.prod(part.shape), dtype=np.float32).reshape(part.shape)
    merged = MergeHeads().forward(values, part)
    assert merged.shape == MergeHeads().output(part).shape == (layers, tokens, heads * dims)
    for layer in range(layers):
        for head in range(heads):
            assert (merged[layer, :, head * dims : (head + 1) * dims] == values[layer * heads + head]).all()
    assert (MergeHeads().inverse(merged, part) == values).all()


@given(shapes, st.integers(0, 4), st.integers(0, 5000), st.integers(0, 99))
def test_unrope_is_a_rotation_by_position(shape: tuple[int, int, int], pairs: int, first: int, seed: int) -> None:
    """Against the complex form of arXiv 2104.09864: the pair (i, i + n) is one complex number."""
    pairs = min(pairs, shape[2] // 2)
    frequency = np.linspace(1, 0.01, pairs).astype(np.float32)
    part = Part("F32", shape, first, first + shape[1], context=DecodeContext({"rope.inv_freq": frequency}))
    values = normal(shape, seed)
    flat = Unrope().forward(values, part)
    angle = (first + np.arange(shape[1]))[:, None] * frequency.astype(np.float64)
    expected = (values[..., :pairs] + 1j * values[..., pairs : 2 * pairs]) * np.exp(-1j * angle)
    assert np.allclose(flat[..., :pairs], expected.real, atol=1e-5)
    assert np.allclose(flat[..., pairs : 2 * pairs], expected.imag, atol=1e-5)
    assert (flat[..., 2 * pairs :] == values[..., 2 * pairs :]).all()
    assert np.allclose(Unrope().inverse(flat, part), values, atol=1e-5)


@given(shapes, st.integers(0, 99))
def test_klt_with_a_whole_basis_loses_nothing(shape: tuple[int, int, int], seed: int) -> None:
    size = shape[0] * shape[2]
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0].astype(np.float32)
    mean = normal((size,), seed)
    part = part_of(shape, profile={"s.mean": mean, "s.basis": basis})
    values = normal(shape, seed + 1)
    turned = Klt(section="s").forward(values, part)
    assert turned.shape == Klt(section="s").output(part).shape == (1, shape[1], size)
    assert np.allclose(Klt(section="s").inverse(turned, part), values, atol=1e-4)


@given(
    shapes, st.integers(2, 12), st.integers(3, 64), st.integers(3, 64), st.integers(0, 32), SCALES, st.integers(0, 9)
)
def test_anchor_delta_errs_by_half_a_step(
    shape: tuple[int, int, int], group: int, leading_bins: int, bins: int, leading: int, scale: float, seed: int
) -> None:
    quantizer = AnchorDelta(leading_bins=leading_bins, bins=bins, leading=leading, group=group)
    values = normal(shape, seed, scale)
    back = coded(quantizer, values, part_of(shape))
    if not values.size:
        return
    largest = np.abs(values).max(axis=2, keepdims=True)
    anchors = slice(None, None, group)
    assert (np.abs(back - values)[:, anchors] <= (0.51 / 127 + 2**-10) * largest[:, anchors] + 1e-6).all()
    levels = max(min(leading_bins, bins) // 2 - 1, 1)
    assert np.abs(back - values).max() <= (0.51 / levels + 0.01) * 2.1 * largest.max() + 1e-6


def test_anchor_delta_has_more_bins_in_leading_layers() -> None:
    values = normal((32, 40, 16), 0)
    back = coded(AnchorDelta(leading_bins=32, bins=16, leading=10, group=10), values, part_of(values.shape))
    error = np.square(back - values).mean((1, 2))
    assert error[:10].max() < error[10:].min()


@given(
    st.integers(0, 40), st.lists(st.tuples(st.integers(1, 20), st.sampled_from([0, 2, 4, 8])), max_size=6), st.data()
)
def test_component_groups_keep_to_their_plan(tokens: int, plan: list[tuple[int, int]], data: st.DataObject) -> None:
    behind = data.draw(st.integers(0, 3))
    shape = (1, tokens, max(sum(size for size, _ in plan) + behind, 1))
    part = part_of(shape, profile={"s.plan.x": np.array(plan, np.int32).reshape(-1, 2)})
    values = normal(shape, data.draw(st.integers(0, 99)), data.draw(SCALES))
    back = coded(ComponentGroups(section="s", plan="x"), values, part)
    at = 0
    for size, bits in plan:
        block, got = values[0, :, at : at + size], back[0, :, at : at + size]
        if not bits:
            assert (got == 0).all()
        elif block.size:
            width = block.max(1, keepdims=True) - block.min(1, keepdims=True)
            step = {2: 1 / 3, 4: 1 / 15, 8: 1 / 28}[bits]  # E4M3's largest step is 32 in a range of 2 x 448
            slack = 2**-10 * np.abs(block).max() * 2 + 1e-4
            assert (np.abs(got - block) <= 0.51 * step * width + slack).all()
        at += size
    assert (back[0, :, at:] == 0).all()


def test_e4m3_is_the_ocp_format() -> None:
    """torch's float8_e4m3fn has the same 127 finite magnitudes."""
    import torch

    magnitudes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert (magnitudes == E4M3).all()


@given(shapes, st.integers(2, 4), SCALES, st.integers(0, 99))
@settings(max_examples=40)
def test_higgs_stays_near_every_vector(shape: tuple[int, int, int], bits: int, scale: float, seed: int) -> None:
    values = normal(shape, seed, scale)
    back = coded(Higgs(bits=bits, seed=3), values, part_of(shape, profile=grids()))
    error, size = (np.square(a).sum(-1) for a in (back - values, values))
    assert (error <= 0.75 * size + 1e-9).all()


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1075), (3, 0.0299), (4, 0.0082)])
def test_higgs_distortion_beats_scalar_lloyd_max(bits: int, distortion: float) -> None:
    """Grids of 16, 64 and 256 points of the plane: below the 0.1175, 0.0345 and 0.0095 of a scalar quantiser."""
    values = normal((1, 4000, 128), 5)
    part = part_of(values.shape, row=1, profile=grids())
    back = coded(Higgs(bits=bits, seed=3), values, part)
    assert np.square(back - values).mean() == pytest.approx(distortion, rel=0.03)


def test_cross_layer_is_the_regression_it_is_given() -> None:
    rng = np.random.default_rng(0)
    rows, keys = normal((3, 5, 4), 1), normal((3, 5, 4), 2)
    for reference, inputs in ((None, 4), (keys, 8)):
        weight, bias = rng.standard_normal((2, inputs, 4)), rng.standard_normal((2, 4))
        part = part_of(rows.shape, profile={"s.weight": weight, "s.bias": bias})
        predictor = CrossLayer(section="s")
        assert (predictor.predict(0, rows, reference, part) == 0).all()
        given_rows = rows[1] if reference is None else np.concatenate([keys[2], rows[1]], axis=1)
        assert np.allclose(predictor.predict(2, rows, reference, part)[0], given_rows @ weight[1] + bias[1], atol=1e-5)


def test_profiles_that_do_not_fit_are_refused() -> None:
    part = part_of((2, 10, 4), heads=1, profile={})
    arrays = {
        "s.mean": np.zeros(7, np.float32),
        "s.basis": np.zeros((7, 3), np.float32),
        "s.plan.x": np.array([[9, 8]], np.int32),
        "s.plan.y": np.array([[1, 3]], np.int32),
        "s.plan.z": np.zeros(3, np.float32),
        "s.weight": np.zeros((3, 4, 4), np.float32),
        "s.bias": np.zeros((3, 4), np.float32),
        "rope.inv_freq": np.zeros(9, np.float32),
        "higgs.256": np.zeros((16, 2), np.float32),
    }
    values = np.zeros((2, 10, 4), np.float32)
    for profile in (None, {}, arrays):
        bad = part_of(part.shape, heads=1, profile=profile)
        for act in (
            lambda bad=bad: Klt(section="s").output(bad),
            lambda bad=bad: Unrope().forward(values, bad),
            lambda bad=bad: CrossLayer(section="s").predict(1, values, None, bad),
            lambda bad=bad: Higgs(bits=4, seed=0).encode(values, bad),
            *(lambda bad=bad, x=x: ComponentGroups(section="s", plan=x).planes(bad) for x in "xyz"),
        ):
            with pytest.raises(MismatchError):
                act()


@pytest.mark.parametrize("quantizer", [AnchorDelta(16, 16, 2, 10), ComponentGroups("s", "x"), Higgs(2, 3)], ids=type)
def test_what_fp16_cannot_hold_is_unrepresentable(quantizer: Quantizer) -> None:
    part = part_of((1, 20, 4), profile={**grids(), "s.plan.x": np.array([[4, 8]], np.int32)})
    with pytest.raises(UnrepresentableError):
        quantizer.encode(np.full((1, 20, 4), 1e6, np.float32) * np.arange(1, 5, dtype=np.float32), part)
    assert (coded(quantizer, np.zeros((1, 20, 4), np.float32), part) == 0).all()


@given(st.integers(1, 9), st.integers(1, 16), shapes, st.integers(0, 99))
def test_deflate_is_exact(level: int, width: int, shape: tuple[int, int, int], seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << width, shape).astype(np.uint16)
    spec = PlaneSpec("x", shape, width)
    assert (Deflate(level=level).decode(memoryview(Deflate(level=level).encode(codes, spec)), spec) == codes).all()


def test_deflate_refuses_what_is_not_its_plane() -> None:
    spec, coder = PlaneSpec("x", (1, 9, 1), 4), Deflate(level=6)
    stream = coder.encode(np.ones((1, 9, 1), np.uint8), spec)
    bomb = zlib.compress(bytes(10**6))
    for data in (b"", stream[:-1], stream + b"x", b"not zlib", zlib.compress(b"\x11" * 4), bomb):
        with pytest.raises(CorruptError):
            coder.decode(memoryview(data), spec)


def test_chains_in_the_wrong_order_are_refused() -> None:
    keep, affine, rans = Keep(0, 0, 1), Affine(2, "token", 32), Rans()
    for stages in (
        (affine,),
        (rans, affine),
        (Klt("s"), keep, affine, rans),
        (CrossLayer("s"), Klt("s"), affine, rans),
    ):
        with pytest.raises(ValueError, match="order"):
            Chain.of(*stages)
    with pytest.raises(ValueError, match="nothing can stand before"):
        Chain.of(keep, FloatSplit(), rans)
    chain = Chain.of(MergeHeads(), affine, rans)
    with pytest.raises(ValueError, match="stack"):
        ChainCodec("x", False, chain, chain)
    document = ChainCodec("x", True, chain, chain).to_json() | {"stacked": False}
    with pytest.raises(FormatError, match="stack"):
        codec_from_json(document)

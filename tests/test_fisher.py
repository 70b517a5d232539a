"""``token_klt`` and ``dead_zone`` on a small made profile, joint stacks, and what does not fit together."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import encode_window, write_tensors
from hypothesis import given as generated
from hypothesis import strategies as st
from profiles import VOCABULARY, arrays_for, fisher_arrays, matrix, write

from kvpack import jobs
from kvpack.cache import windows
from kvpack.calibration.scales import tables
from kvpack.codecs.chain.base import Part, Scales, UnrepresentableError
from kvpack.codecs.chain.codec import ChainCodec
from kvpack.codecs.chain.quantizers.dead_zone import MAX_SHIFT, MIDDLE, DeadZone, quantize, reference, token_levels
from kvpack.codecs.chain.rotary import rotate, turns
from kvpack.codecs.chain.symbols import unzigzag
from kvpack.codecs.chain.transforms.token_klt import TokenKlt, cpu
from kvpack.codecs.context import DecodeContext, StackHints
from kvpack.codecs.recipes import CODECS, fisher
from kvpack.errors import MismatchError, UnsupportedError, UsageError
from kvpack.formats.captures import cache_spec
from kvpack.formats.safetensors import build_header
from kvpack.jobs.rate import COARSEST, FINEST, RESOLUTION, Goal, coarsest, step_for_kl
from kvpack.jobs.reader import KvpFile, open_cache
from kvpack.numerics.floats import from_float32, to_float32
from kvpack.profiles import Profile

Cli = Callable[..., Any]
KLT = TokenKlt(section="fisher")
LAYERS, HEADS, DIMS = 2, 1, 4
SIZE = 2 * LAYERS * HEADS * DIMS
RANK = SIZE + LAYERS
PROFILE = arrays_for(LAYERS, HEADS, DIMS)


def part(count: int, first: int = 0, total: int | None = None, tokens: np.ndarray | None = None) -> Part:
    whole = first + count if total is None else total
    shape = (2 * LAYERS * HEADS, count, DIMS)
    return Part("F32", shape, first, whole, HEADS, context=DecodeContext(PROFILE, tokens))


def values(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2 * LAYERS * HEADS, tokens, DIMS)).astype(np.float32)


def ids(tokens: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCABULARY, tokens).astype(np.int32)


# ---- token_klt -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 100])
def test_what_the_basis_spans_comes_back_but_for_sinks(tokens: int) -> None:
    x, given = values(tokens), part(tokens, tokens=ids(tokens))
    assert KLT.output(given).shape == (1, tokens, RANK)
    z = KLT.forward(x.copy(), given)
    assert z.shape == (1, tokens, RANK)
    assert (z[:, 0] == 0).all()
    back = KLT.inverse(z, given)
    assert (back[:, 0] == 0).all()  # the profile's mean of its one sink
    assert np.allclose(back[:, 1:], x[:, 1:], atol=1e-4)


@pytest.mark.parametrize(
    ("heads", "tokens", "dims", "pairs"), [(2, 1, 4, 2), (6, 19, 7, 2), (4, 24, 5, 0), (2, 33, 64, 32)]
)
def test_rows_are_keys_before_rope_and_values(heads: int, tokens: int, dims: int, pairs: int) -> None:
    """Whole, partial and no RoPE."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((heads, tokens, dims)).astype(np.float32)
    frequencies = rng.uniform(0, 1, pairs).astype(np.float32)
    rows, back = np.full((tokens, heads, dims), np.nan, np.float32), np.full_like(x, np.nan)
    cpu.gather(x, *turns(frequencies, 5, tokens), rows)
    expected = np.concatenate([rotate(x[: heads // 2], frequencies, 5, -1), x[heads // 2 :]])
    assert np.allclose(rows.transpose(1, 0, 2), expected, atol=1e-6)
    cpu.scatter(rows, *turns(frequencies, 5, tokens), back)
    assert np.allclose(back, x, atol=1e-5)


def narrow(common: int, local: int) -> dict[str, np.ndarray]:
    """The profile with fewer common directions, ``local`` ones a layer, and no prediction."""
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0][:, :common]
    weights = np.zeros((3 + 7 * 2 + 3 + 2, common + LAYERS * local))
    parts = {"basis": basis, "weights": weights, "local": rng.standard_normal((SIZE, local))}
    arrays = dict(PROFILE)
    for name, array in parts.items():
        arrays |= matrix(f"fisher.{name}", array, 1)
    return arrays


@pytest.mark.parametrize(("common", "local"), [(5, 1), (5, 3), (SIZE, 1)])
def test_what_no_direction_spans_is_lost(common: int, local: int) -> None:
    """The more local directions there are, the less is left."""
    x, errors = values(50), []
    for width in (1, local):
        given = Part("F32", (2 * LAYERS, 50, DIMS), 8, 58, HEADS, context=DecodeContext(narrow(common, width)))
        z = KLT.forward(x.copy(), given)
        assert z.shape == (1, 50, common + LAYERS * width)
        back = KLT.inverse(z, given)
        errors.append(np.square(x - back).sum())
    assert errors[1] <= errors[0] < np.square(x).sum()
    if common == SIZE:
        assert errors[0] < 1e-3


def test_chunks_give_what_one_part_gives() -> None:
    """Beyond 2,048 tokens, and from the sinks on: predictions reach back over chunks."""
    tokens, total = ids(2300), 2300
    x = values(total)
    whole = KLT.forward(x.copy(), part(total, tokens=tokens))
    for bounds in ([0, 1, 2, 130, 2048, 2300], [0, 2048, 2300]):
        pieces, backs = [], []
        for start, stop in pairwise(bounds):
            piece = part(stop - start, start, total, tokens=tokens)
            pieces.append(KLT.forward(x[:, start:stop].copy(), piece))
            backs.append(KLT.inverse(pieces[-1], piece))
        assert np.allclose(np.concatenate(pieces, axis=1), whole, atol=1e-4)
        assert np.allclose(np.concatenate(backs, axis=1)[:, 1:], x[:, 1:], atol=1e-3)


def test_tokens_change_the_prediction_and_nothing_before_them() -> None:
    tokens = ids(60)
    other = tokens.copy()
    other[30] = (tokens[30] + 1) % VOCABULARY  # another row of the table
    x = values(60)
    one, two, none = (
        KLT.forward(x.copy(), given) for given in (part(60, tokens=tokens), part(60, tokens=other), part(60))
    )
    assert (one[:, :30] == two[:, :30]).all()
    assert (np.abs(one - two)[0, 30:].max(1) > 0).all()
    assert np.abs(one - none)[0, 1:].max() > 0.01
    assert np.allclose(none[0], KLT.forward(x.copy(), part(60, first=0, total=99))[0])


def test_without_tokens_nothing_is_predicted() -> None:
    z = np.zeros((1, 20, RANK), np.float32)
    assert (KLT.inverse(z, part(20)) == 0).all()
    assert (KLT.inverse(z, part(20, tokens=ids(20)))[:, 1:] != 0).any()


@pytest.mark.parametrize("foreign", [-1, VOCABULARY, 2**31 - 1])
def test_foreign_token_ids_are_refused(foreign: int) -> None:
    tokens = ids(20)
    tokens[7] = foreign
    with pytest.raises(MismatchError, match="token ids"):
        KLT.forward(values(20), part(20, tokens=tokens))
    with pytest.raises(MismatchError, match="token ids"):
        KLT.inverse(np.zeros((1, 20, RANK), np.float32), part(20, tokens=tokens))


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("mean", np.zeros((6, SIZE), np.float32)),
        ("mean", np.zeros((0, SIZE), np.float32)),
        ("mean", np.zeros((2, SIZE - 1), np.float32)),
        ("mean", np.zeros(SIZE, np.float32)),
        ("spread", np.ones(SIZE + 1, np.float32)),
        ("weights.rows", np.array([3], np.int32)),
        ("order", np.full(9, 16, np.int32)),
        ("order", np.full(9, -1, np.int32)),
        ("order", np.zeros((3, 3), np.int32)),
        ("whiten.step", np.ones((2, DIMS - 1), np.float32)),
        ("groups", np.array([0, 2], np.int32)),
        ("groups", np.array([1, 1], np.int32)),
        ("groups", np.zeros(0, np.int32)),
        ("groups", np.zeros(3, np.int32)),
        ("local.rows", np.array([SIZE - 2], np.int32)),
        ("scale", np.zeros(20, np.float32)),
        ("scale", np.ones(19, np.float32)),
        ("hidden.rows", np.array([4], np.int32)),
    ],
    ids=str,
)
def test_sections_that_do_not_fit_together_are_refused(name: str, array: np.ndarray) -> None:
    profile = {**PROFILE, f"fisher.{name}": array}
    given = Part("F32", (2 * LAYERS, 9, DIMS), 0, 9, HEADS, context=DecodeContext(profile, ids(9) % 9))
    with pytest.raises(MismatchError):
        KLT.forward(values(9), given)


# ---- dead_zone -----------------------------------------------------------------------------------------------------


def coefficients(count: int) -> Part:
    return Part("F32", (1, count, RANK), 0, count, 1, context=DecodeContext(PROFILE))


def test_levels_follow_mass_and_age() -> None:
    """What is read more, and what is younger, gets a finer step: a lower level."""
    plain = token_levels(coefficients(1000), 100, None)
    assert plain[0] > plain[-1]
    assert (np.diff(plain) <= 0).all()
    assert (token_levels(coefficients(1000), 0, None) == 0).all()
    mass = np.ones(1000, np.float32)
    mass[500] = 100
    heavy = token_levels(coefficients(1000), 100, mass)
    assert heavy[500] < heavy[499] == heavy[501]
    for odd in (np.zeros(1000, np.float32), mass * 1e30):
        levels = token_levels(coefficients(1000), 100, odd)
        assert -MIDDLE <= levels.min() <= levels.max() < MIDDLE


def test_levels_do_not_depend_on_chunks() -> None:
    mass = np.random.default_rng(0).gamma(0.3, size=300).astype(np.float32)
    whole = token_levels(coefficients(300), 20, mass)
    given = Part("F32", (1, 100, SIZE), 150, 300, 1, context=DecodeContext(PROFILE))
    assert (token_levels(given, 20, mass) == whole[150:250]).all()
    assert len(token_levels(Part("F32", (1, 0, SIZE), 0, 0), 20, None)) == 0


@pytest.mark.parametrize("importance", [0, 20, 100])
def test_errors_are_within_the_dead_zone_and_its_step(importance: int) -> None:
    quantizer = DeadZone(section="fisher", log_step=-100, importance=importance)
    mass = np.random.default_rng(0).gamma(0.3, size=200).astype(np.float32)
    given = coefficients(200)
    z = np.random.default_rng(0).standard_normal((1, 200, RANK)).astype(np.float32)
    z[0, :, 0] = 0
    codes = quantizer.encode(z, given, StackHints(mass))
    for plane, code in zip(quantizer.planes(given), codes, strict=True):
        assert code.shape == plane.shape
        assert code.max() < 1 << plane.width
    back = quantizer.decode(codes, given)
    assert (back[0, :, 0] == 0).all()
    levels = codes[0][0, :, 0].astype(int) - MIDDLE
    assert (len(set(levels)) > 1) == (importance > 0)
    step = 2.0 ** (-100 / 32 + levels[:, None] / 4)
    assert (np.abs(back[0] - z[0]) <= 0.9 * step).all()  # half a step, a threshold's shift, a centroid's
    assert (back[0][codes[2][0] == 0] == 0).all()


def test_centroids_move_magnitudes_and_keep_signs() -> None:
    quantizer = DeadZone(section="fisher", log_step=0, importance=0)
    given = coefficients(1)
    z = np.zeros((1, 1, RANK), np.float32)
    z[0, 0, :7] = [1.2, -1.2, 2, -2, 3, -40, 0.5]
    back = quantizer.decode(quantizer.encode(z, given), given)[0, 0]
    assert np.allclose(back[:7], [0.95, -0.95, 1.98, -1.98, 2.99, -39.99, 0])


def test_scales_are_of_the_step_the_levels_and_the_shifts() -> None:
    quantizer = DeadZone(section="fisher", log_step=-64, importance=0)
    given = coefficients(3)
    before = {
        "levels": np.array([MIDDLE - 2, MIDDLE, MIDDLE + 4], np.uint8).reshape(1, 3, 1),
        "shifts": np.array([MAX_SHIFT, MAX_SHIFT, MAX_SHIFT - 3], np.uint8).reshape(1, 3, 1),
    }
    *sides, last = quantizer.planes(given)
    assert [quantizer.scaled(plane, {}, given).scales for plane in sides] == [None, None]
    scales = quantizer.scaled(last, before, given).scales
    assert scales is not None
    assert [list(set(row)) for row in scales.classes()] == [[30], [28], [21]]  # a level is a class, and 8 of log_step


@generated(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 30), st.floats(-8, 8))
def test_choices_are_the_references(seed: int, tokens: int, dims: int, octaves: float) -> None:
    """The compiled encoder decides as the one in numpy does, on tables of every skew."""
    rng = np.random.default_rng(seed)
    counts = rng.gamma(0.2, size=(64, 32)) * 1000
    centroids = np.concatenate([np.zeros((64, 1)), rng.uniform(-0.3, 0.3, (64, 3))], axis=1).astype(np.float32)
    columns = rng.integers(-100, 400, dims).astype(np.int32)
    scales = Scales(columns, rng.integers(-100, 100, tokens).astype(np.int32), tables(counts))
    values = (rng.laplace(size=(tokens, dims)) * 2.0**octaves).astype(np.float32)
    steps = np.exp2(rng.uniform(-2, 2, (tokens, 1))).astype(np.float32)
    shifts, codes = quantize(values, steps, scales, centroids)
    wanted, costs = reference.thresholds(scales.tables, centroids), reference.magnitude_costs(scales.tables)
    first = reference.magnitudes(values, steps, scales, wanted)
    assert (shifts == reference.shifts(first, scales, costs)).all()
    shifted = replace(scales, rows=scales.rows - 8 * shifts)
    magnitudes = reference.magnitudes(values, steps, shifted, wanted)
    assert (unzigzag(codes) == np.where(values < 0, -magnitudes, magnitudes)).all()


def test_shifts_follow_how_widely_a_token_scatters() -> None:
    rng = np.random.default_rng(3)
    scales = Scales(np.full(500, 164, np.int32), np.zeros(3, np.int32), tables(np.zeros((64, 32))))
    values = (rng.laplace(size=(3, 500)) * [[0.25], [0.7], [2.8]]).astype(
        np.float32
    )  # 2 ** -1.5, 1 and 4 times as wide
    shifts, _ = quantize(values, np.ones((3, 1), np.float32), scales, np.zeros((64, 4), np.float32))
    assert np.abs(shifts - [-6, 0, 7]).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e5])
def test_what_a_step_cannot_represent(value: float) -> None:
    z = np.zeros((1, 4, RANK), np.float32)
    z[0, 2, 3] = value
    with pytest.raises(UnrepresentableError):
        DeadZone(section="fisher", log_step=0, importance=20).encode(z, coefficients(4))


@pytest.mark.parametrize("field", [{"log_step": -1025}, {"log_step": 1025}, {"importance": -1}, {"importance": 101}])
def test_settings_out_of_range(field: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="log_step is"):
        DeadZone(**{"section": "fisher", "log_step": 0, "importance": 0, **field})


@pytest.mark.parametrize(
    ("name", "array"),
    [("columns", np.zeros(SIZE + 1, np.int32)), ("tables", np.ones(63, np.int32)), ("centroids", np.ones((64, 3)))],
    ids=["columns", "tables", "centroids"],
)
def test_scales_for_another_basis_are_refused(name: str, array: np.ndarray) -> None:
    quantizer = DeadZone(section="fisher", log_step=0, importance=0)
    z = np.ones((1, 4, RANK), np.float32)
    codes = quantizer.encode(z, coefficients(4))
    broken = Part("F32", (1, 4, RANK), 0, 4, 1, context=DecodeContext({**PROFILE, f"fisher.{name}": array}))
    with pytest.raises(MismatchError):
        quantizer.decode(codes, broken)


# ---- Joint stacks --------------------------------------------------------------------------------------------------


def test_a_joint_stack_is_keys_then_values_and_its_streams_lie_with_the_first_part() -> None:
    """In file order, whatever the order of layers and kinds."""
    names = ["layers.10.values", "layers.2.keys", "layers.2.values", "layers.10.keys"]
    (window,) = windows(cache_spec(build_header([(name, "F32", [1, 30, DIMS]) for name in names], {})), 128)
    codec, context = fisher(-320), DecodeContext(PROFILE, ids(30))
    x = values(30)
    rows = {"layers.2.keys": 0, "layers.10.keys": 1, "layers.2.values": 2, "layers.10.values": 3}
    streams = encode_window(codec, window, [from_float32(x[[rows[name]]], "F32") for name in names], context)
    assert [[name for name, _ in some] for some in streams] == [["levels", "shifts", "coefficients"], [], [], []]
    assert codec.stream_names(window, context) == {"levels", "shifts", "coefficients"}
    back = codec.decode(window, [[(name, memoryview(data)) for name, data in some] for some in streams], context)
    for name, bits in zip(names, back, strict=True):
        assert np.allclose(to_float32(bits, "F32")[0, 1:], x[rows[name], 1:], atol=0.02)


def test_keys_and_values_of_different_shapes_do_not_join() -> None:
    names = [("layers.0.keys", "F32", [1, 30, DIMS]), ("layers.0.values", "F32", [1, 30, DIMS + 1])]
    (window,) = windows(cache_spec(build_header(names, {})), 128)
    with pytest.raises(UnsupportedError, match="differ in shape"):
        fisher(-320).stacks(window)
    assert len(CODECS["cachegen-4"].stream_names(window, DecodeContext())) > 0


def test_tokens_of_another_length_are_ignored() -> None:
    names = [("layers.0.keys", "F32", [1, 30, DIMS]), ("layers.0.values", "F32", [1, 30, DIMS])]
    (window,) = windows(cache_spec(build_header(names, {})), 128)
    bits = [from_float32(row[None], "F32") for row in values(30)[:2]]
    profile = arrays_for(1, 1, DIMS)
    none, short, right = (
        encode_window(fisher(-250), window, bits, DecodeContext(profile, tokens)) for tokens in (None, ids(29), ids(30))
    )
    assert none == short != right


# ---- The command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    tensors = {f"layers.{i}.{kind}": ("F32", values(40, i)[i : i + 1]) for i in (0, 1) for kind in ("keys", "values")}
    tensors["tokens"] = ("I32", ids(40))
    return write_tensors(tmp_path / "c.safetensors", {n: (d, a.view(np.uint32)) for n, (d, a) in tensors.items()})


@pytest.mark.parametrize("damage", ["layers", "section", "tables", "packed", "vocabulary"])
def test_profiles_that_do_not_fit_have_exit_code_5(cli: Cli, capture: Path, tmp_path: Path, damage: str) -> None:
    arrays = dict(PROFILE)
    if damage == "layers":
        arrays |= fisher_arrays(LAYERS + 1, HEADS, DIMS)
    elif damage == "section":
        arrays = {name: array for name, array in arrays.items() if not name.startswith("fisher")}
    elif damage == "tables":
        arrays["fisher.tables"] = arrays["fisher.tables"] - 1
    elif damage == "packed":
        arrays["fisher.basis.codes"] = arrays["fisher.basis.codes"][:-3]
    else:
        arrays["fisher.order"] = arrays["fisher.order"][:10]
    profile = write(tmp_path / "p.kvprofile", arrays)
    out = tmp_path / "c.kvp"
    done = cli("compress", capture, "-c", "fisher-4", "-D", profile, "-o", out)
    assert (done.code, done.out, done.err.count("\n")) == (5, "", 1), done.err
    assert not out.exists()


def test_token_ids_come_from_the_file_itself(cli: Cli, capture: Path, tmp_path: Path) -> None:
    """Also in chunks and ranges; without the tensor the file is decodable too."""
    profile = write(tmp_path / "p.kvprofile", PROFILE)
    for options in ([], ["--drop", "tokens"]):
        out, back = tmp_path / "c.kvp", tmp_path / "back"
        assert cli("compress", capture, "-c", "fisher-8", "-D", profile, "-o", out, "-f", *options).code == 0
        assert cli("decompress", out, "-D", profile, "-o", back, "-f").code == 0
        from kvpack.formats.source import Capture

        x, y = (Capture.open(path).read("layers.1.keys").view(np.float32) for path in (capture, back))
        assert np.abs(x - y)[:, 1:].max() < 0.05


# ---- Rate control --------------------------------------------------------------------------------------------------

CURVE = np.array([[-170 - 16 * n, 0.01 * 2.0**-n, 0.02 * 2.0**-n, 0.02 * 2.0**-n, 0.04 * 2.0**-n] for n in range(8)])
"""The largest KL halves every half octave, from 0.04 on."""


@pytest.mark.parametrize("order", [1, -1])
def test_step_for_kl_reads_the_worst_continuation(order: int) -> None:
    curve = CURVE[::order]
    for n in range(8):
        assert step_for_kl(curve, 0.04 * 2.0**-n * 1.0001) == -170 - 16 * n
    between = step_for_kl(curve, 0.03)
    assert -186 < between < -170
    assert step_for_kl(curve, 1.0) == -170
    for floor in (0.04 * 2.0**-9, 1e-30):
        with pytest.raises(UsageError, match="higher --rank"):
            step_for_kl(curve, floor)


def test_step_for_kl_reads_what_nine_of_ten_had() -> None:
    """Newer profiles tell nine in ten from the largest, which promises nothing."""
    wide = np.insert(np.insert(CURVE, 3, 1.0, axis=1), 6, 1.0, axis=1)
    assert step_for_kl(wide, 0.03) == step_for_kl(CURVE, 0.03)


@pytest.mark.parametrize("bad", [CURVE[0], CURVE[:0], CURVE[:, :4], np.where(CURVE > 0, np.nan, CURVE)])
def test_malformed_curves_are_a_wrong_profile(bad: np.ndarray) -> None:
    with pytest.raises(MismatchError, match="5 or 7 columns"):
        step_for_kl(bad, 0.03)


def test_step_for_kl_trusts_no_dip() -> None:
    """A coarser step that measured better by chance promises nothing."""
    curve = CURVE.copy()
    curve[5, 2] = 0.03
    assert step_for_kl(curve, 0.02) <= curve[6, 0] + 16
    limits = np.geomspace(curve[:, [2, 4]].max(1).min() * 1.001, 1, 60)
    steps = [step_for_kl(curve, float(limit)) for limit in limits]
    assert steps == sorted(steps)


@pytest.mark.parametrize("edge", [FINEST, FINEST + 1, -301, -300, -97, COARSEST, COARSEST + 100])
def test_coarsest_finds_the_edge(edge: int) -> None:
    tried = []

    def holds(step: int) -> bool:
        tried.append(step)
        return step <= edge

    found = coarsest(holds)
    assert found is not None
    assert FINEST <= found <= min(edge, COARSEST)
    assert min(edge, COARSEST) - found < RESOLUTION
    assert len(tried) <= 8
    assert all(FINEST <= step <= COARSEST for step in tried)


def test_coarsest_says_when_nothing_holds() -> None:
    assert coarsest(lambda _: False) is None
    assert coarsest(lambda _: True) == COARSEST


@pytest.mark.parametrize(
    "given",
    [{}, {"quality": "high", "ratio": 2.0}, {"quality": "best"}, {"ratio": 0.0}, {"max_kl": float("nan")},
     {"max_attn_err": float("inf")}],
    ids=str,
)  # fmt: skip
def test_goals_are_one_and_sound(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Goal(**given)


class Pipe(io.RawIOBase):
    """An output that cannot seek."""

    def __init__(self, sink: io.BytesIO) -> None:
        self._sink = sink

    def write(self, data: Any) -> int:
        return self._sink.write(data)


def test_windows_are_decoded_once_each(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tensors are written from them, and whether the output can seek or not."""
    tensors = {f"layers.{i}.{kind}": ("F32", values(300, i)[i : i + 1]) for i in (0, 1) for kind in ("keys", "values")}
    raw = {name: (dtype, array.view(np.uint32)) for name, (dtype, array) in tensors.items()}
    source = write_tensors(tmp_path / "c.safetensors", raw)
    profile = write(tmp_path / "p.kvprofile", PROFILE)
    packed, backs = tmp_path / "c.kvp", []
    given = ("compress", source, "-c", "fisher-8", "-D", profile, "-o", packed, "--chunk-tokens", 128)
    assert cli(*given).code == 0
    decoded = []
    whole = ChainCodec.decode
    monkeypatch.setattr(ChainCodec, "decode", lambda *given: decoded.append(given) or whole(*given))
    for seekable in (True, False):
        decoded.clear()
        sink = io.BytesIO()
        output = sink if seekable else Pipe(sink)
        jobs.decompress(KvpFile.open(packed, Profile.open(profile)), output)
        assert len(decoded) == 3
        backs.append(sink.getvalue())
    assert backs[0] == backs[1]
    assert len(backs[0]) == source.stat().st_size
    (tmp_path / "back").write_bytes(backs[0])
    back = open_cache(tmp_path / "back")
    for name, (_, exact) in tensors.items():
        assert np.abs(back.read(name).view(np.float32) - exact)[:, 1:].max() < 0.05

"""``low_rank`` and what a capture tells its encoder; the command line without a profile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_decoder
import reference_stages
from conftest import SMALL, encode_window, write_tensors
from hypothesis import given
from hypothesis import strategies as st

from kvpack.cache import windows
from kvpack.codecs.chain.base import Part, UnrepresentableError
from kvpack.codecs.chain.rotary import rotate
from kvpack.codecs.context import DecodeContext, StackHints
from kvpack.codecs.low_rank import SINKS, LowRank, cpu, factors, reference
from kvpack.codecs.low_rank.tables import UNIT, tables
from kvpack.codecs.low_rank.weights import element_weights
from kvpack.codecs.recipes import CODECS, local
from kvpack.fidelity import compare
from kvpack.formats.captures import cache_spec
from kvpack.formats.safetensors import build_header
from kvpack.formats.source import Capture
from kvpack.jobs.hints import probe_weights, rope_frequencies
from kvpack.jobs.reader import KvpFile
from kvpack.numerics.floats import from_float32, to_float32

Cli = Callable[..., Any]
FREQUENCIES = np.array([1.0, 0.1, 0.01], np.float32)


def part(shape: tuple[int, int, int], keys: int, first: int = 0) -> Part:
    return Part("F32", shape, first, first + shape[1], 1, keys=keys)


def coded(stage: LowRank, data: np.ndarray, given: Part, **known: Any) -> list[np.ndarray]:
    """Codes as an entropy coder gives them back; each fits its plane."""
    codes = stage.encode(data.copy(), given, StackHints(**known))
    before: dict[str, np.ndarray] = {}
    for plane, code in zip(stage.planes(given), codes, strict=True):
        spec = stage.scaled(plane, before, given)
        assert code.shape == spec.shape
        assert not code.size or int(code.max()) < 1 << plane.width
        before[plane.name] = code
    return codes


def through(stage: LowRank, data: np.ndarray, given: Part, **known: Any) -> np.ndarray:
    return stage.decode(coded(stage, data, given, **known), part(given.shape, given.keys, given.first))


def mixed(rows: int, tokens: int, dims: int, rank: int, seed: int = 0) -> np.ndarray:
    """Of some rank, with little noise."""
    rng = np.random.default_rng(seed)
    flat = rng.standard_normal((tokens, rank)) @ rng.standard_normal((rank, rows * dims))
    flat += 0.05 * rng.standard_normal(flat.shape)
    return np.ascontiguousarray(flat.reshape(tokens, rows, dims).transpose(1, 0, 2), np.float32)


# ---- The stage -----------------------------------------------------------------------------------------------------


def test_tables_are_sound_and_as_the_format_says() -> None:
    found = tables()
    assert (found >= 1).all()
    assert (found.sum(1) == 1 << 14).all()
    assert (found == reference_stages.low_rank_tables()).all()
    share = found[UNIT] / 16384
    assert (share[1:7].reshape(3, 2).sum(1) * [1, 4, 9]).sum() == pytest.approx(1, abs=0.35)  # scatter about 1


@given(st.integers(1, 40), st.integers(1, 6), st.floats(0, 2), st.floats(0.1, 1e5), st.integers(0, 1 << 30))
def test_kernels_do_what_the_reference_says(count: int, width: int, price: float, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = (scale * rng.standard_normal((count, width))).astype(np.float32)
    rows, columns = rng.integers(-40, 40, count), rng.integers(-10, 80, width)
    costs = reference.bucket_costs(tables())
    codes = cpu.choose(values, rows, columns, costs, price)
    assert (codes == reference.choose(values, rows, columns, costs, price)).all()
    ours, theirs = cpu.column_costs(codes, rows, costs), reference.column_costs(codes, rows, costs)
    assert np.allclose(ours, theirs)


@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 9), st.integers(-64, 32), st.booleans(), st.integers(0, 99)
)
def test_any_shape_comes_back_within_its_step(
    rows: int, tokens: int, dims: int, log_step: int, turned: bool, seed: int
) -> None:
    data = np.random.default_rng(seed).standard_normal((rows, tokens, dims)).astype(np.float32)
    given = part((rows, tokens, dims), rows // 2, 7)
    known = {"frequencies": FREQUENCIES if turned else None}
    back = through(LowRank(log_step=log_step, importance=0), data, given, **known)
    energy, step = np.square(data).mean(), 2 ** (log_step / 32)
    assert np.square(back - data).sum() <= (1 + 1e-3) * np.square(data).sum()
    if log_step <= -32:  # in steps of half a deviation all directions are live
        assert np.square(back - data).mean() < min(8 * step**2, 0.9) * energy


def test_finer_steps_lose_less_and_take_more_codes() -> None:
    data = mixed(4, 200, 8, 3)
    given = part(data.shape, 2)
    losses, sizes = [], []
    for level in (1, 3, 5, 7):
        stage = LowRank(log_step=48 - 16 * level, importance=0)
        codes = coded(stage, data, given)
        losses.append(np.square(stage.decode([c.copy() for c in codes], given) - data).sum())
        sizes.append(codes[6].shape[2])
    assert losses == sorted(losses, reverse=True)
    assert sizes == sorted(sizes)
    assert sizes[0] <= 3


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 5), (2, 300, 1), (6, 2, 3)])
@pytest.mark.parametrize("value", [0.0, 1.5, -1e-30, 1e30])
def test_constants_come_back(shape: tuple[int, int, int], value: float) -> None:
    data = np.full(shape, value, np.float32)
    back = through(LowRank(log_step=-32, importance=10), data, part(shape, shape[0] // 2))
    assert np.allclose(back, data, rtol=0.2, atol=1e-29)


def test_an_outlier_token_keeps_its_codes_in_range() -> None:
    data = mixed(4, 100, 8, 3)
    data[:, 0] *= 3e4
    back = through(LowRank(log_step=-64, importance=10), data, part(data.shape, 2))
    assert np.square(back[:, 0] - data[:, 0]).sum() < 1e-3 * np.square(data[:, 0]).sum()


def test_values_beyond_floats_are_unrepresentable() -> None:
    with pytest.raises(UnrepresentableError):
        factors.factorize(np.full((3, 4), 1e30, np.float32), np.zeros(3, np.int64), 32)
    with pytest.raises(UnrepresentableError):
        factors.factorize(np.full((3, 4), 1e6, np.float32), np.zeros(3, np.int64), 32)


def test_frequencies_travel_in_the_file_and_keys_alone_are_turned() -> None:
    """Keys that are multiples of one vector, turned at every position, are of rank 1 before RoPE."""
    data = mixed(4, 300, 7, 1)
    data[:2] = rotate(data[:2], FREQUENCIES, 0, 1)
    stage = LowRank(log_step=-32, importance=0)
    told = coded(stage, data, part(data.shape, 2), frequencies=FREQUENCIES)
    untold = coded(stage, data, part(data.shape, 2))
    assert told[6].shape[2] < untold[6].shape[2]
    back = stage.decode(told, part(data.shape, 2))
    assert np.square(back - data).sum() < 0.05 * np.square(data).sum()
    wider = coded(stage, data, part(data.shape, 2), frequencies=np.ones(4, np.float32))
    assert not wider[0].any()  # frequencies of other keys are left alone


def test_the_first_tokens_and_what_matters_lose_less() -> None:
    data = np.random.default_rng(0).standard_normal((4, 400, 8)).astype(np.float32)
    weights = np.ones((4, 8), np.float32)
    weights[1], weights[2] = 4, 0.25
    back = through(LowRank(log_step=0, importance=0), data, part(data.shape, 2), weights=weights)
    loss = np.square(back - data)
    assert loss[1].mean() < loss[0].mean() < loss[2].mean()
    assert loss[:2, :SINKS].mean() < 0.2 * loss[:2, SINKS:].mean()


def test_weighted_elements_have_unit_variance() -> None:
    data = mixed(6, 100, 5, 4)
    for known in (None, np.random.default_rng(1).uniform(0.1, 9, (6, 5)).astype(np.float32)):
        weights = element_weights(data, part(data.shape, 3), known)
        assert np.square(weights[:, None] * (data - data.mean(1, keepdims=True))).mean() == pytest.approx(1, rel=0.1)


# ---- What a capture tells ------------------------------------------------------------------------------------------


def told(rope: Any, **model: Any) -> np.ndarray | None:
    return rope_frequencies({"rope": json.dumps(rope), "model": json.dumps({"head_dim": 16, **model})})


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "default", "rope_theta": 100000.0},
        LLAMA3,
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_are_those_of_transformers(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters=rope)
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    found = told(rope, head_dim=64)
    assert found is not None
    assert np.allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [None, [], {}, {"rope_theta": "x"}, {"rope_theta": -1.0}, {"rope_theta": 0}, {"rope_type": "yarn", "rope_theta": 9},
     {"rope_theta": 9, "partial_rotary_factor": 0}, {"rope_theta": 9, "partial_rotary_factor": 1e300},
     {"rope_type": "llama3", "rope_theta": 9}, {"full_attention": {"rope_theta": 9}}],
    ids=str,
)  # fmt: skip
def test_what_does_not_tell_frequencies_gives_none(rope: Any) -> None:
    assert told(rope) is None


def test_partly_rotated_keys() -> None:
    found = told({"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert found is not None
    assert np.allclose(found, 1e4 ** -(np.arange(4) / 4))
    assert rope_frequencies({"rope": "{", "model": "null"}) is None
    assert rope_frequencies({}) is None


def test_probes_give_weights_of_every_element(tmp_path: Path) -> None:
    capture = Capture.open(SMALL)
    weights = probe_weights(capture, rope_frequencies(capture.metadata))
    assert weights is not None
    assert {name: one.shape for name, one in weights.items()} == {
        f"layers.{i}.{kind}": (3, 64) for i in (0, 29) for kind in ("keys", "values")
    }
    keys = weights["layers.0.keys"]
    assert (keys[:, :32] == keys[:, 32:]).all()  # RoPE turns them into each other
    assert np.ptp(keys, axis=1).min() > 0
    assert (np.ptp(weights["layers.0.values"], axis=1) == 0).all()
    for missing in ("queries.29", "query_positions"):
        tensors = {n: (s.dtype, capture.read(n)) for n, s in capture.tensors.items() if n != missing}
        other = Capture.open(write_tensors(tmp_path / missing, tensors))
        assert probe_weights(other, None) is None


# ---- Files ---------------------------------------------------------------------------------------------------------


def foreign(path: Path, shapes: dict[str, tuple[int, int, int]], dtype: str = "BF16") -> Path:
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        tensors[name] = (dtype, from_float32(mixed(*shape, 4, seed=i), dtype))
    return write_tensors(path, tensors)


def test_layers_of_different_shapes_are_stacked_by_shape(tmp_path: Path, cli: Cli) -> None:
    shapes = {
        "layers.3.values": (2, 200, 5), "layers.3.keys": (2, 200, 8), "layers.0.keys": (2, 200, 8),
        "layers.0.values": (2, 200, 5), "layers.7.values": (1, 150, 4), "layers.8.keys": (1, 150, 4),
    }  # fmt: skip
    path = foreign(tmp_path / "x", shapes, "F16")
    assert cli("compress", path, "-c", "local-6", "--chunk-tokens", 128).code == 0
    packed = tmp_path / "x.kvp"
    assert cli("decompress", packed, "-o", tmp_path / "back").code == 0
    theirs = reference_decoder.decode(packed.read_bytes())
    ours = (tmp_path / "back").read_bytes()
    assert len(ours) == len(theirs) == path.stat().st_size
    report = compare(Capture.open(path), KvpFile.open(packed))
    assert report.keys.nmse < 0.05
    assert report.values.nmse < 0.05
    start = 8 + int.from_bytes(ours[:8], "little")
    x, y = (to_float32(np.frombuffer(data[start:], np.uint16), "F16") for data in (ours, theirs))
    assert np.allclose(x, y, rtol=2**-9, atol=1e-4)


def test_stacks_hold_both_kinds_of_a_shape() -> None:
    names = [("layers.1.values", 4), ("layers.0.keys", 4), ("layers.0.values", 6), ("layers.1.keys", 4)]
    cache = cache_spec(build_header([(name, "F32", [2, 30, dims]) for name, dims in names], {}))
    (window,) = windows(cache, 128)
    codec = CODECS["local-5"]
    bits = [mixed(2, 30, dims, 2, seed=i).view(np.uint32) for i, (_, dims) in enumerate(names)]
    streams = encode_window(codec, window, bits)
    assert [bool(some) for some in streams] == [True, False, True, False]
    back = codec.decode(
        window, [[(name, memoryview(data)) for name, data in some] for some in streams], DecodeContext()
    )
    for ours, theirs in zip(back, bits, strict=True):
        exact = theirs.view(np.float32)
        assert np.square(ours.view(np.float32) - exact).sum() < 0.05 * np.square(exact).sum()


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 130, 7)], ids=str)
def test_a_capture_of_keys_and_values_alone(tmp_path: Path, cli: Cli, shape: tuple[int, int, int]) -> None:
    path = foreign(tmp_path / "x", {f"layers.{i}.{kind}": shape for i in range(2) for kind in ("keys", "values")})
    assert cli("compress", path, "-c", "local-5").code == 0
    assert cli("verify", path, tmp_path / "x.kvp", "--max-nmse", 0.1).code == 0


# ---- The command line ----------------------------------------------------------------------------------------------


def test_a_ratio_without_a_profile(small: Path, cli: Cli) -> None:
    done = cli("compress", small, "--ratio", 8, "--drop-probes", "--json")
    assert done.code == 0
    row = json.loads(done.out)
    assert row["codec"] == "local"
    assert 8 <= row["ratio"] < 12
    first = small.with_name(small.name + ".kvp").read_bytes()
    assert cli("compress", small, "--ratio", 8, "--drop-probes", "-f").code == 0
    assert small.with_name(small.name + ".kvp").read_bytes() == first


def test_an_attention_error_without_a_profile(small: Path, cli: Cli) -> None:
    packed = small.with_name(small.name + ".kvp")
    sizes = []
    for limit in (0.3, 0.1):
        assert cli("compress", small, "--max-attn-err", limit, "-f").code == 0
        assert cli("verify", small, packed, "--max-attn-err", limit).code == 0
        sizes.append(packed.stat().st_size)
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("promise", [("--quality", "high"), ("--max-kl", 0.1)])
def test_promises_of_kl_take_a_profile(small: Path, cli: Cli, promise: tuple[object, ...]) -> None:
    done = cli("compress", small, *promise)
    assert done.code == 2
    assert done.err.count("\n") == 1
    for word in ("profile", "-D", "--ratio", "--max-attn-err", "-c local-4"):
        assert word in done.err
    assert not small.with_name(small.name + ".kvp").exists()


def test_what_no_step_reaches_is_said(small: Path, cli: Cli) -> None:
    refused = cli("compress", small, "--ratio", 1e9, "--keep-probes")
    assert "no step reaches a ratio" in refused.err
    assert "47264 bytes of it only measure quality, and without --keep-probes they are left out" in refused.err
    assert "--keep-probes" not in cli("compress", small, "--ratio", 1e9).err
    row = json.loads(cli("compress", small, "--ratio", 1.2, "--json", "-f").out)
    assert (row["codec"], row["ratio"] > 1.2) == ("lossless", True)
    assert cli("compress", small, "--ratio", 8, "-c", "lossless", "-f").code == 2
    assert "no step keeps" in cli("compress", small, "--max-attn-err", 1e-9, "-f").err


def test_the_bench_knows_the_family(small: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "b.json"
    assert cli("bench", small, "--codecs", "local", "--quick", "--model", "none", "-o", out, "-q").code == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["codec"] for row in rows] == [f"local-{level}" for level in range(8, 0, -1)]
    bits = [row["bits_per_element"] for row in rows]
    assert bits == sorted(bits, reverse=True)


def test_steps_are_half_octaves() -> None:
    steps = [CODECS[f"local-{level}"].keys.quantizer.log_step for level in (1, 2, 8)]  # type: ignore[attr-defined]
    assert steps == [32, 16, -80]
    assert local(5).keys.quantizer.to_json()["configuration"] == {"log_step": 5, "importance": 10}

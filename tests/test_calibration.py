"""Calibration: what it finds is what it should, on data made for the purpose; and the command on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL
from models import CONFIGS, REFUSED, save_model
from profiles import grids
from prose import prose

from kvpack.calibration import (
    CorpusOptions,
    FisherOptions,
    PredictorOptions,
    Work,
    aquakv,
    calibrate,
    collect,
    kvtc,
    scales,
)
from kvpack.calibration.rotary import inverse_frequencies
from kvpack.capture import load_model
from kvpack.codecs.chain.base import Part
from kvpack.codecs.chain.quantizers.component_groups import ComponentGroups
from kvpack.codecs.chain.quantizers.higgs import Higgs
from kvpack.codecs.context import DecodeContext
from kvpack.codecs.protocol import Need
from kvpack.codecs.recipes import CODECS, FISHER_LEVELS, fisher_log_step
from kvpack.errors import UnsupportedError, UsageError
from kvpack.formats.source import Capture
from kvpack.numerics.floats import to_float32
from kvpack.profiles import Profile

Cli = Callable[..., Any]
ROPE = ["llama-gqa", "llama-mqa", "qwen3", "gpt-neox", "phi"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and two texts."""
    path = tmp_path_factory.mktemp("calibration")
    save_model(CONFIGS["llama-gqa"](), path / "model")
    for i in range(2):
        (path / f"{i}.txt").write_text(prose()[20_000 * (i + 1) :][:2000])
    return path


def command(folder: Path, output: Path, *options: object) -> list[object]:
    texts = [part for i in range(2) for part in ("--text", folder / f"{i}.txt")]
    return ["calibrate", "-m", folder / "model", *texts, "-o", output, "--context", 128, "--tokens", 1024, *options]


def test_principal_components_of_known_directions() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    scales = np.array([9.0, 5, 3, *[0.1] * 9])
    sample = ((rng.standard_normal((5000, 12)) * scales) @ basis.T + 7).astype(np.float32)
    found = kvtc.principal_components(sample)
    assert np.allclose(found.mean, sample.mean(0), atol=1e-3)
    assert np.allclose(found.basis.T @ found.basis, np.eye(12), atol=1e-5)
    for i in range(3):
        assert abs(found.basis[:, i] @ basis[:, i]) > 0.99


def test_plans_keep_to_their_budget_and_beat_even_plans() -> None:
    rng = np.random.default_rng(1)
    scale = 2.0 ** -(np.arange(512) / 40)
    coefficients = (rng.standard_normal((300, 512)) * scale).astype(np.float32)
    plans = kvtc.plans(coefficients, {"2": 2.0, "1": 1.0, "0.5": 0.5})
    errors = {}
    for rate, plan in plans.items():
        assert plan[:, 0].sum() <= 512
        assert set(plan[:, 1]) <= {0, 2, 4, 8}
        assert sum(s * b + kvtc.SIDE_BITS for s, b in plan if b) <= float(rate) * 512
        errors[rate] = _error(coefficients, plan)
    assert errors["2"] < errors["1"] < errors["0.5"]
    even = np.array([(16, 2)] * 16, np.int32)  # the budget of "2" spent on the leading half
    assert (even[:, 0] * even[:, 1] + kvtc.SIDE_BITS).sum() == 1024
    assert errors["2"] < _error(coefficients, even)
    assert len(kvtc.plans(np.zeros((10, 8), np.float32), {"2": 2.0})["2"]) == 0


def _error(coefficients: np.ndarray, plan: np.ndarray) -> float:
    part = Part("F32", (1, *coefficients.shape), 0, len(coefficients), context=DecodeContext({"s.plan.x": plan}))
    quantizer = ComponentGroups(section="s", plan="x")
    back = quantizer.decode(quantizer.encode(coefficients[None], part), part)
    return float(np.square(back - coefficients).sum())


def test_gaussian_grids_are_seeded_and_near_optimal() -> None:
    """Distortion a coordinate of the best 16-point grid of the plane is about 0.1065; scalar Lloyd-Max has 0.1175."""
    grid = aquakv.gaussian_grid(16)
    assert (grid == aquakv.gaussian_grid(16)).all()
    assert (grid != aquakv.gaussian_grid(16, seed=1)).any()
    pairs = np.random.default_rng(9).standard_normal((20_000, 2))
    nearest = np.square(pairs[:, None] - grid).sum(2).min(1).mean() / 2
    assert 0.100 < nearest < 0.111


def test_predictors_find_what_layers_share() -> None:
    """Layer i + 1 is a matrix times layer i: the residual costs a fraction of the layer; with no relation, no less."""
    rng = np.random.default_rng(2)
    keys = rng.standard_normal((3, 2000, 8)).astype(np.float32)
    for i in (1, 2):
        keys[i] = keys[i - 1] @ np.linalg.qr(rng.standard_normal((8, 8)))[0]
    values = rng.standard_normal((3, 2000, 8)).astype(np.float32)
    values[1:] += keys[1:] @ rng.standard_normal((8, 8)).astype(np.float32)
    found = aquakv.predictors(keys, values, Higgs(bits=2, seed=3), grids(), "s")
    assert found["s.keys.weight"].shape == (2, 8, 8)
    assert found["s.values.weight"].shape == (2, 16, 8)
    rest = keys[1] - (keys[0] @ found["s.keys.weight"][0] + found["s.keys.bias"][0])
    assert np.square(rest).mean() < 0.02 * np.square(keys[1]).mean()
    given = np.concatenate([keys[2], values[1]], axis=1)
    rest = values[2] - (given @ found["s.values.weight"][1] + found["s.values.bias"][1])
    assert np.square(rest).mean() < 0.5 * np.square(values[2]).mean()


@pytest.mark.parametrize("name", ROPE)
def test_frequencies_undo_the_models_rope(tmp_path: Path, name: str) -> None:
    """Whole, grouped and partial rotary; the same token at other places has the same key before it."""
    config = CONFIGS[name]()
    frequencies = inverse_frequencies(load_model(str(save_model(config, tmp_path)), device="cpu"))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = {"gpt-neox": 0.25, "phi": 0.5}.get(name, 1.0)
    assert len(frequencies) == int(head * share) // 2
    assert frequencies[0] == 1


def test_models_without_rope_have_no_frequencies(tmp_path: Path) -> None:
    assert len(inverse_frequencies(load_model(str(save_model(CONFIGS["gpt2"](), tmp_path)), device="cpu"))) == 0


def test_frequencies_that_change_are_refused(tmp_path: Path) -> None:
    config = CONFIGS["llama-gqa"]()
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedError, match="cannot calibrate"):
        inverse_frequencies(load_model(str(save_model(config, tmp_path)), device="cpu"))


def test_the_sample_is_the_models_cache(folder: Path) -> None:
    """Values as in a capture of the same tokens, keys of equal length (they are turned); rows leave sinks out."""
    from kvpack.capture import CaptureOptions, run_tokens

    model = load_model(str(folder / "model"), device="cpu")
    text = (folder / "0.txt").read_text()
    sample = collect(model, [("0.txt", text)], CorpusOptions(tokens=256, context=128))
    assert sample.both.shape == (2, 128, 2 * 2 * 2 * 8)
    assert sample.both.dtype == np.float16
    held_keys, held_values = sample.kind("keys"), sample.kind("values")
    assert (sample.layers, sample.channels) == (2, 16)
    ids = model.tokenizer(text).input_ids
    second = ids[len(ids) // 2 :][:128]
    cache = run_tokens(model, second, CaptureOptions(queries=0))
    values, keys = (
        np.concatenate([layer.float().numpy().transpose(1, 0, 2).reshape(128, -1) for layer in layers], axis=1)
        for layers in (cache.values, cache.keys)
    )
    assert (held_values[1] == values.astype(np.float16)).all()
    lengths = (np.square(some.astype(np.float32)).sum(1) for some in (held_keys[1], keys))
    assert np.allclose(*lengths, rtol=1e-2)
    assert (sample.tokens[1] == second).all()
    mass = run_tokens(model, ids[:128], CaptureOptions(queries=0)).attention_mass.float().mean((0, 1)).numpy()
    assert list(sample.mass) == sample.held == [0]
    assert np.allclose(sample.mass[0], mass)
    rows = sample.rows("values", 1000)
    assert (rows.shape, rows.dtype) == ((2 * 124, 32), np.float32)
    assert (rows[124:] == held_values[1, 4:]).all()
    assert len(sample.rows("values", 100)) <= 100
    assert sample.documents[0]["sequences"] == 2


def test_calibrate_end_to_end(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """The profile is the same when made again; every codec that takes one works with it, better at more bits."""
    out, again = tmp_path / "a.kvprofile", tmp_path / "b.kvprofile"
    done = cli(*command(folder, out, "--codecs", "all"))
    assert done.code == 0, done.err
    assert done.out == f"{out}: 8 sequences, 1024 tokens, {out.stat().st_size} bytes\n"
    said = [line.split(":")[0] for line in done.err.splitlines()]
    levels = [f"fisher-{level}" for level in FISHER_LEVELS]
    assert said == ["fisher"] * 8 + levels + ["kvtc"] * 2 + ["aquakv"] * 4
    quiet = cli(*command(folder, again, "-q", "--codecs", "all"))
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    assert out.read_bytes() == again.read_bytes()
    profile = Profile.open(out)
    assert profile.model["architecture"] == "LlamaForCausalLM"
    assert json.loads(profile.metadata["calibration"])["tokens"] == 1024
    capture = tmp_path / "c.safetensors"
    text = tmp_path / "text.txt"
    text.write_text(prose()[:3000])
    assert cli("capture", "-m", folder / "model", "--text", text, "-o", capture, "--max-tokens", 400).code == 0
    errors: dict[str, list[float]] = {}
    for name in (name for name, codec in CODECS.items() if Need.PROFILE in codec.traits.needs):
        packed = tmp_path / f"{name}.kvp"
        assert cli("compress", capture, "-c", name, "-o", packed, "-D", out).code == 0
        assert cli("decompress", packed, "-o", tmp_path / "back", "-D", out, "-f").code == 0
        original, back = (Capture.open(path) for path in (capture, tmp_path / "back"))
        x, y = (to_float32(source.read("layers.1.keys"), "F32") for source in (original, back))
        errors.setdefault(name.rsplit("-", 1)[0], []).append(float(np.square(x - y).mean() / np.square(x).mean()))
    assert np.isfinite(errors.pop("fisher")).all()  # it minds predictions, and a random model's hardly depend on keys
    for family, some in errors.items():
        assert some == sorted(some), family
        assert some[0] < 0.2


class InterruptedHereError(Exception):
    """Raised from a progress or a remark, as if the machine went down there."""


@pytest.mark.parametrize("place", ["running", "gradients", "directions", "prediction"])
def test_an_interrupted_calibration_goes_on(folder: Path, tmp_path: Path, place: str) -> None:
    """To the same arrays, without running again what had been run."""
    model = load_model(str(folder / "model"), device="cpu")
    texts = [(f"{i}.txt", (folder / f"{i}.txt").read_text()) for i in range(2)]
    corpus = CorpusOptions(tokens=1024, context=128)
    fisher = FisherOptions(20, 2, PredictorOptions(8, 5))
    said: list[str] = []

    def run(work: Work, stop: str | None = None) -> dict[str, np.ndarray]:
        def progress(done: int, _: int) -> None:
            if stop == "running" and done == 5:
                raise InterruptedHereError

        def say(line: str) -> None:
            said.append(line)
            if (
                stop
                and {"gradients": "means", "directions": "token table", "prediction": "scatter"}.get(stop, "-") in line
            ):
                raise InterruptedHereError

        sample = collect(model, texts, corpus, progress, work)
        return calibrate(model, sample, ("fisher",), fisher, say, work)

    expected = run(Work())
    work = tmp_path / "p.partial"
    with pytest.raises(InterruptedHereError):
        run(Work(work, "k"), place)
    assert work.is_dir()
    said.clear()
    found = run(Work(work, "k"))
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)
    assert any("token table" in line for line in said) == (place != "prediction")
    other = Work(work, "another key")
    assert {path.name for path in work.iterdir()} == {"key"}
    other.remove()
    assert not work.exists()


def test_calibrate_for_fisher_alone(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """The default; of fewer coordinates than elements. What it holds is sound, and other codecs ask for their own."""
    out, again = tmp_path / "a.kvprofile", tmp_path / "b.kvprofile"
    for path in (out, again):
        assert cli(*command(folder, path, "-q", "--rank", 20, "--gradients", 2)).code == 0
    assert out.read_bytes() == again.read_bytes()
    profile = Profile.open(out)
    assert {name.split(".")[0] for name in profile} == {"rope", "fisher"}
    assert profile["fisher.basis.rows"][0] == profile["fisher.local.rows"][0] == 64
    assert profile["fisher.basis.step"].shape[1] == 20
    assert list(profile["fisher.groups"]) == [0, 1]
    rank = 20 + 2 * profile["fisher.local.step"].shape[1]
    assert rank == profile["fisher.weights.step"].shape[1] == 38
    tables = profile["fisher.tables"]
    assert (tables >= 1).all()
    assert (tables.sum(1) == 1 << 14).all()
    assert profile["fisher.columns"].shape == (rank,)
    curve = profile["fisher.curve"]
    assert curve.shape == (len(FISHER_LEVELS), 7)
    assert list(curve[:, 0]) == [fisher_log_step(level) for level in FISHER_LEVELS]
    assert (curve[:, 1:] >= 0).all()
    for mean in (1, 4):
        assert (curve[:, mean] <= curve[:, mean + 2]).all()
        assert (curve[:, mean + 1] <= curve[:, mean + 2]).all()
    result = cli("compress", SMALL, "-c", "kvtc-1", "-D", out, "-o", tmp_path / "x")
    assert (result.code, result.err.count("\n")) == (5, 1)


def test_histograms_of_scatter_become_tables() -> None:
    counts = np.zeros((scales.CLASSES, 32))
    smooth = scales.tables(counts)
    counts[10, 2] = 1e6
    spiked = scales.tables(counts)
    assert (spiked.sum(1) == 1 << 14).all()
    assert (np.delete(spiked, 10, 0) == np.delete(smooth, 10, 0)).all()
    assert spiked[10, 3] == pytest.approx(spiked[10, 4], rel=0.02) == pytest.approx(1 << 13, rel=0.02)  # both signs
    for width in (0.05, 1.0, 300.0):
        assert 0.99 < scales.laplace(width).sum() <= 1 + 1e-9


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--codecs", "lossless"], 2, "lossless"),
        (["--codecs", "fisher,"], 2, "fisher, kvtc, aquakv"),
        (["--tokens", 200], 2, "--tokens"),
        (["--context", 4], 2, "--tokens"),
        (["--context", 1024, "--tokens", 4096], 2, "--context"),
        (["--context", 512, "--tokens", 1536, "--text", "SHORT"], 2, "SHORT"),
        (["--text", "BINARY"], 1, "BINARY"),
        (["--text", "NOWHERE"], 1, "NOWHERE"),
        (["-m", "NOWHERE"], 1, "NOWHERE"),
    ],
    ids=str,
)
def test_what_calibrate_refuses(
    cli: Cli, folder: Path, tmp_path: Path, options: list[object], code: int, said: str
) -> None:
    (tmp_path / "SHORT").write_text("short")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00")
    given = [tmp_path / str(o) if o in ("SHORT", "BINARY", "NOWHERE") else o for o in options]
    out = tmp_path / "x.kvprofile"
    result = cli(*command(folder, out, *given))
    assert (result.code, result.out, result.err.count("\n")) == (code, "", 1), result.err
    assert said in result.err
    assert not out.exists()


def test_calibrate_overwrites_nothing_unless_told(cli: Cli, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.kvprofile"
    out.write_text("mine")
    assert cli(*command(folder, out)).code == 1
    assert out.read_text() == "mine"


def test_calibrate_installs(cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside ``-o``, whatever its name, or alone. Without either, the command has nowhere to write to."""
    place, out = tmp_path / "installed", tmp_path / "new.kvprofile"
    monkeypatch.setenv("KVPACK_PROFILES", str(place))
    few = ("-q", "--rank", 20, "--gradients", 2)
    assert cli(*command(folder, out, *few, "--install")).code == 0
    (installed,) = place.iterdir()
    assert installed.read_bytes() == out.read_bytes()
    assert installed.name == f"model.{Profile.open(out).sha256[:12]}.kvprofile"
    installed.unlink()
    words = command(folder, out, *few)
    alone = [word for word in words if word not in ("-o", out)]
    assert cli(*alone, "--install").code == 0
    assert list(place.iterdir()) == [installed]
    assert installed.read_bytes() == out.read_bytes()
    nowhere = cli(*alone)
    assert (nowhere.code, nowhere.err.count("\n")) == (2, 1)
    assert "-o FILE, --install, or both" in nowhere.err


@pytest.mark.parametrize("name", ["mistral-sliding", "mamba"])
def test_calibrate_refuses_models_that_kvpack_cannot_represent(
    cli: Cli, folder: Path, tmp_path: Path, name: str
) -> None:
    model = save_model(REFUSED[name](), tmp_path / name)
    result = cli(*command(folder, tmp_path / "x", "-m", model))
    assert (result.code, result.err.count("\n")) == (6, 1), result.err


def test_short_texts_are_named_by_the_library_too(folder: Path) -> None:
    model = load_model(str(folder / "model"), device="cpu")
    with pytest.raises(UsageError, match=r"a\.txt: 5 tokens"):
        collect(model, [("a.txt", "hello")], CorpusOptions(tokens=128, context=128))

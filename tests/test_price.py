"""What decoding and computing again cost in a bench: link speeds, the row ``recompute``, hardware noise."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from models import CONFIGS, save_model

from kvpack.bench import report
from kvpack.bench.links import show_speed, speed_below, with_links
from kvpack.bench.noise import TAIL, Noise, other_schedule, variants
from kvpack.bench.recompute import network_of, recompute, run_schedule, schedule_of, tokens_of
from kvpack.bench.results import NOISE, RECOMPUTE, REPLAY, Results, Row, compare, summarize
from kvpack.cache.flops import network_of_config
from kvpack.capture import CaptureOptions, Model, load_model, run, write_capture
from kvpack.errors import FormatError
from kvpack.fidelity import compare as distance
from kvpack.fidelity.model import Judge
from kvpack.formats.source import Capture

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

Cli = Callable[..., Any]


def row(codec: str, size: int | None, seconds: float | None, *, raw: int = 1_000_000, document: str = "a") -> Row:
    ratio = raw / size if size else None
    return Row(document, f"sha-{document}", codec, 0, size, ratio, 4.0, 0.1, 0.1, 0.1, None, seconds, None, 0)


def judged(kl: float) -> dict[str, Any]:
    plain = {"kl_mean": kl, "ppl_change": 0.1, "top1": 1}
    needles = {"needles_found": 0, "needles_found_original": 0}
    return {"plain": plain, "repeat": None, "greedy_identical": 1, **needles}


def results(*rows: Row) -> Results:
    setting = {"profile": None, "model": "m", "dtype": "bfloat16", "versions": {"kvpack": "0"}}
    machine = {"processor": "p", "cores": 2, "gpu": None, "python": "3", "commit": None}
    return Results(setting, machine, list(rows))


def links(*rows: Row) -> dict[str, dict[str, float]]:
    summaries = with_links(rows, summarize(rows))
    names = ("raw_below", "replay_below")
    return {s.codec: {n: s.figures[n].mean for n in names if n in s.figures} for s in summaries}


@pytest.mark.parametrize("speed", [1e3, 1e6, 1e9])
def test_at_the_speed_both_ways_take_as_long(speed: float) -> None:
    small, large = (1000.0, 3.0), (50_000.0, 3.0 - 49_000 / speed)
    assert speed_below(small, large) == pytest.approx(speed)
    for factor, wins in ((0.9, True), (1.1, False)):
        first, second = (way[0] / (speed * factor) + way[1] for way in (small, large))
        assert (first < second) == wins


def test_ways_without_a_break_even() -> None:
    assert speed_below((10, 1.0), (100, 2.0)) == math.inf  # fewer bytes and fewer seconds
    assert speed_below((10, 1.0), (10, 1.0)) == math.inf
    assert speed_below((100, 2.0), (10, 1.0)) == 0.0
    assert speed_below((100, 1.0), (10, 2.0)) == 0.0  # faster above a speed, not below one


def test_link_speeds_of_a_table() -> None:
    found = links(row("x-1", 100_000, 0.5), row(RECOMPUTE, 4_000, 2.5), row("quick-1", 200_000, 0.0))
    assert found["x-1"] == {"raw_below": 900_000 / 0.5, "replay_below": 96_000 / 2.0}
    assert found[RECOMPUTE] == {"raw_below": 996_000 / 2.5}
    assert found["quick-1"] == {"raw_below": math.inf, "replay_below": 196_000 / 2.5}


def test_a_row_of_replay_takes_recomputes_place() -> None:
    found = links(row("x-1", 100_000, 0.5), row(RECOMPUTE, 4_000, 2.5), row(REPLAY, 8_000, 4.5))
    assert found["x-1"]["replay_below"] == 92_000 / 4.0
    assert "replay_below" not in found[REPLAY] | found[RECOMPUTE]
    assert "replay_below" not in links(row("x-1", 100_000, 0.5))["x-1"]


def test_link_speeds_are_of_means_over_documents_and_bounds_have_none() -> None:
    rows = [row("x-1", 100, 1.0, raw=1_000, document="a"), row("x-1", 300, 3.0, raw=3_000, document="b")]
    rows += [row("ecsq-1", None, None)]
    assert links(*rows) == {"x-1": {"raw_below": (2_000 - 200) / 2.0}, "ecsq-1": {}}


@pytest.mark.parametrize(
    ("speed", "text"),
    [
        (math.inf, "any"),
        (0.0, "never"),
        (1.5e9, "1.5 GB/s"),
        (23_456_789, "23.5 MB/s"),
        (999, "0.999 kB/s"),
        (4e4, "40 kB/s"),
    ],
)
def test_speeds_in_words(speed: float, text: str) -> None:
    assert show_speed(speed) == text


def test_reports_name_the_price_and_the_noise() -> None:
    noise = [
        replace(row(NOISE + kind, None, None), model=judged(kl))
        for kind, kl in (("float32", 0.0021), ("schedule", 0.0017))
    ]
    computed = replace(row(RECOMPUTE, 4_000, 2.5), decode_flops=510_000_000)
    text = report.markdown(results(row("x-1", 100_000, 0.5), computed, *noise, row("ecsq-1", None, None)))
    main, others, bounds = text.split("\n| codec |")[1:]
    assert "| 1.8 MB/s | 48 kB/s |" in main
    assert "| 5.1e+08 | 398 kB/s | - |" in main
    assert "The smallest is 0.0017 nats while the text goes on. A loss below it means nothing" in text
    assert NOISE not in main
    assert others.count(f"| {NOISE}") == 2
    assert "ecsq-1" in bounds
    without = report.markdown(results(row("x-1", 100_000, 0.5)))
    assert "Hardware noise" not in without


def test_the_plot_has_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    lines: list[float] = []
    monkeypatch.setattr(Axes, "axhline", lambda *arguments, **_: lines.append(arguments[1]))
    noisy = replace(row(NOISE + "float32", None, None), model=judged(0.002), attention_error=0.003)
    codec = replace(row("x-1", 100_000, 0.5), model=judged(0.002))
    report.plot(results(codec, noisy, row(RECOMPUTE, 4_000, 2.5)), tmp_path / "x.png")
    assert lines == [0.002, 0.003]  # perplexity has no line: its sign is luck
    lines.clear()
    report.plot(results(codec), tmp_path / "x.png")
    assert lines == []


def test_results_of_schema_2_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    current = results(row("x-1", 100_000, 0.5), replace(row("ecsq-1", None, None), decode_flops=None))
    document = {**current.to_json(), "schema_version": 2}
    document["rows"] = [{n: v for n, v in asdict(one).items() if n != "decode_flops"} for one in current.rows]
    path.write_text(json.dumps(document))
    old = Results.read(path)
    assert old.rows == current.rows
    assert compare(old, current) == []
    for version in (1, 4):
        path.write_text(json.dumps({**document, "schema_version": version}))
        with pytest.raises(FormatError, match=f"schema {version}"):
            Results.read(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = save_model(CONFIGS["llama-gqa"](), tmp_path_factory.mktemp("tiny") / "model")
    return load_model(str(folder), "bf16", "cpu")


def captured(model: Model, folder: Path, **options: Any) -> Capture:
    text = "a cache is what a model keeps of a text, and the text gives it back " * 5
    path = folder / "c.safetensors"
    with path.open("wb") as sink:
        write_capture(run(model, text, CaptureOptions(max_tokens=200, continuation=40, **options)), sink)
    return Capture.open(path)


@pytest.mark.parametrize("options", [{}, {"chunk": 64}, {"chunk": 64, "generate": 9}], ids=["one", "chunks", "decode"])
def test_recompute_gives_the_captures_bits(model: Model, tmp_path: Path, options: dict[str, int]) -> None:
    capture = captured(model, tmp_path, **options)
    chunks, steps = ([64, 64, 64, 8] if "chunk" in options else [200]), options.get("generate", 0)
    assert schedule_of(capture) == [*chunks, *[1] * steps]
    again, seconds = recompute(model, capture)
    assert seconds > 0
    for name, bits in again.replaced.items():
        assert np.array_equal(bits, capture.read(name)), name
    assert len(again.replaced) == 4


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        "nonsense",
        "[]",
        "{}",
        '{"prefill": [200], "decode": 1}',
        '{"prefill": [-1, 201], "decode": 0}',
        '{"prefill": ["200"], "decode": 0}',
        '{"prefill": [], "decode": 1e99}',
        '{"prefill": [], "decode": 1000000000000}',
        '{"prefill": [true, 199], "decode": 0}',
    ],
)
def test_a_schedule_that_makes_no_sense_is_one_prefill(model: Model, tmp_path: Path, schedule: str | None) -> None:
    capture = captured(model, tmp_path)
    metadata = {name: value for name, value in capture.metadata.items() if name != "schedule"}
    capture.metadata = metadata if schedule is None else {**metadata, "schedule": schedule}
    assert schedule_of(capture) == [200]


def test_other_schedules_have_the_same_tokens() -> None:
    for runs in ([2048], [512, 512], [3], [1], [1, 1], [100, *[1] * 20]):
        other = other_schedule(runs)
        assert sum(other) == sum(runs)
        assert all(run > 0 for run in other)
        assert other != runs or sum(runs) == 1
    assert other_schedule([2048]) == [2048 - TAIL, *[1] * TAIL]
    assert other_schedule([100, *[1] * 20]) == [120]


def test_noise_is_small_and_not_nothing(model: Model, tmp_path: Path) -> None:
    """In bf16 the tiny model's cache moves in its last bits, and the judge notices."""
    capture = captured(model, tmp_path)
    judge = Judge(model, capture)
    found = variants(model)
    assert [one.name for one in found][:2] == [NOISE + "float32", NOISE + "schedule"]
    assert len(found) == 2 + torch.cuda.is_available()
    before = {name: weight.clone() for name, weight in model.network.named_parameters()}
    for variant in found:
        other = variant.compute(model, capture)
        assert other.bits_per_element == 16
        error = distance(capture, other)
        assert 0 < error.keys.nmse < 1e-4
        assert 0 < error.values.nmse < 1e-4
        measured = judge.measure(other)
        assert measured.plain is not None
        assert 0 < measured.plain.kl_mean < 1e-3
    assert model.network.dtype == torch.bfloat16
    assert all(torch.equal(before[name], weight) for name, weight in model.network.named_parameters())


def test_float32_noise_is_that_of_the_arithmetic_and_not_of_the_weights(model: Model, tmp_path: Path) -> None:
    capture = captured(model, tmp_path)
    exact = run_schedule(replace(model, network=_doubled(model)), tokens_of(capture), [200])
    noisy = Noise("float32").compute(model, capture)
    keys = exact[0][0].to(torch.bfloat16).view(torch.int16).numpy().view("<u2")
    assert np.mean(keys == noisy.replaced["layers.0.keys"]) > 0.999


def test_the_other_device_runs_the_captures_schedule(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With this very device in the other's place, the bits are the capture's, by whatever schedule it was made."""
    monkeypatch.setattr("kvpack.bench.noise._other_device", lambda _: "cpu")
    capture = captured(model, tmp_path, chunk=64, generate=9)
    for name, bits in Noise("device").compute(model, capture).replaced.items():
        assert np.array_equal(bits, capture.read(name)), name


def _doubled(model: Model) -> Any:
    """The same weights in float64, whose rounding is far below that of float32."""
    return copy.deepcopy(model.network).double()


def test_a_model_in_float32_has_no_float32_noise(model: Model) -> None:
    single = replace(model, network=_doubled(model).float())
    assert next(one.kind for one in variants(single)) == "schedule"


def test_a_models_own_numbers_stand_in_for_a_captures(model: Model, tmp_path: Path) -> None:
    capture = captured(model, tmp_path)
    known = {"hidden_size", "parameters", "embedding_parameters"}
    document = json.loads(capture.metadata["model"])
    bare = {name: value for name, value in document.items() if name not in known}
    capture.metadata = {**capture.metadata, "model": json.dumps(bare)}
    by_config = network_of_config(model.network.config.to_dict())
    found = network_of(model, capture)
    assert by_config is not None
    assert found == replace(by_config, weights=by_config.weights + 5 * 32)  # norms
    sizes = {"hidden_size": 32, "parameters": 99_999, "embedding_parameters": 9}
    capture.metadata = {**capture.metadata, "model": json.dumps(bare | sizes)}
    assert network_of(model, capture).weights == 99_990


def test_captures_without_tokens_cannot_be_computed_again() -> None:
    capture = Capture.open(SMALL)
    capture.tensors = {name: spec for name, spec in capture.tensors.items() if name != "tokens"}
    with pytest.raises(FormatError, match="no tokens"):
        tokens_of(capture)

"""``kvpack bench`` on a tiny model: rows, resuming, intervals, reports, plots, comparisons."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from models import CONFIGS, save_model
from profiles import PROFILED, profile_for
from prose import prose

from kvpack.bench.bounds import BOUNDS
from kvpack.bench.report import markdown
from kvpack.bench.results import (
    NOISE,
    RECOMPUTE,
    TOKEN_ENTROPY,
    Results,
    Row,
    compare,
    interval,
    student_t,
    summarize,
)
from kvpack.codecs.recipes import CODECS, codec_names, codecs_matching, family_of
from kvpack.errors import UsageError
from kvpack.formats.safetensors import TensorFile

Cli = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def row(document: str, codec: str, seed: int, kl: float) -> Row:
    part = {"kl_mean": kl, "ppl_change": kl, "top1": 1 - kl}
    model = {"plain": part, "repeat": None, "greedy_identical": 3, "needles_found": 1, "needles_found_original": 2}
    return Row(document, f"sha-{document}", codec, seed, 10, 4.0, 4.0 + kl, kl, kl, kl, 1.0, 1.0, model)


def results(*rows: Row) -> Results:
    setting = {"profile": None, "model": "m", "dtype": "bfloat16", "versions": {"kvpack": "0"}}
    machine = {"processor": "p", "cores": 2, "gpu": None, "python": "3", "commit": None}
    return Results(setting, machine, list(rows))


def network_flops(tokens: int) -> int:
    """Operations of a prefill of the tiny model: its matrices, its norms, and attention."""
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    return 2 * (2 * layer + 5 * 32) * tokens + 4 * 2 * 32 * tokens * (tokens + 1) // 2


@pytest.fixture
def bench(tmp_path: Path, cli: Cli) -> tuple[Path, list[Path]]:
    """A tiny model's folder and two captures."""
    folder = save_model(CONFIGS["llama-gqa"](), tmp_path / "model")
    captures = []
    for i in range(2):
        text = tmp_path / f"{i}.txt"
        text.write_text(prose()[1000 * i :][:300])
        captures.append(tmp_path / f"{i}.safetensors")
        made = cli("capture", "-m", folder, "--text", text, "-o", captures[-1], "--max-tokens", 180, "--needles", 1)
        assert made.code == 0, made.err
    return folder, captures


def test_a_bench_end_to_end(cli: Cli, bench: tuple[Path, list[Path]], tmp_path: Path) -> None:
    folder, captures = bench
    out, report, plot = tmp_path / "r.json", tmp_path / "r.md", tmp_path / "r.png"
    common = ("-m", folder, "--codecs", "lossless,turboquant-2,kivi-2", "--seeds", 2, "-o", out)
    done = cli("bench", *captures, *common, "--report", report, "--plot", plot)
    assert done.code == 0, done.err
    rows = json.loads(out.read_text())["rows"]
    flops = network_flops(180)
    bounds = [bound.name for bound in BOUNDS]
    noise = [NOISE + "schedule", *([NOISE + "device"] if torch.cuda.is_available() else [])]  # The model is in float32.
    extras = (RECOMPUTE, *noise, *bounds, TOKEN_ENTROPY)
    expected = {("lossless", 0), ("turboquant-2", 0), ("turboquant-2", 1), *((n, 0) for n in ("kivi-2", *extras))}
    for path in captures:
        assert {(r["codec"], r["seed"]) for r in rows if r["document"] == path.name} == expected
    assert len(rows) == 2 * len(expected)
    for r in rows:
        if r["codec"] in (TOKEN_ENTROPY, *bounds):
            assert r["size"] is r["ratio"] is r["compress_seconds"] is None
            assert (r["model"] is None) == (r["codec"] == TOKEN_ENTROPY)
        if r["codec"] == TOKEN_ENTROPY:
            assert 0 < r["bits_per_element"] < 0.2  # a byte of the tokenizer over 64 elements a token
            assert r["decode_flops"] > 2 * flops
            continue
        if r["codec"] in noise:
            assert r["size"] is r["compress_seconds"] is r["decompress_seconds"] is r["decode_flops"] is None
            assert 0 < r["model"]["plain"]["kl_mean"] < 1e-6
            assert 0 < r["keys_nmse"] < 1e-9
            continue
        if r["codec"] == RECOMPUTE:
            assert (r["size"], r["ratio"], r["bits_per_element"]) == (4 * 180, (64 * 4 + 4) / 4, 32 / 64)
            assert r["decode_flops"] == flops
        elif r["codec"] not in bounds:
            assert r["decode_flops"] == 0
        exact = r["codec"] in ("lossless", RECOMPUTE)
        for test in ("plain", "repeat"):
            assert (r["model"][test]["kl_mean"] == 0) == exact
        assert (r["keys_nmse"] == 0) == exact
        assert max(r["keys_nmse"], r["values_nmse"]) < 0.5
    seeds = [r["keys_nmse"] for r in rows if r["codec"] == "turboquant-2"]
    assert len(set(seeds)) == len(seeds)
    assert plot.read_bytes()[:4] == b"\x89PNG"
    text = report.read_text()
    for name in ("lossless", "turboquant-2", "kivi-2", *extras):
        assert f"| {name} |" in text
    assert "±" in text
    measured = [(r["codec"], r["compress_seconds"]) for r in rows]
    again = cli("bench", *captures, *common, "--json")
    assert again.code == 0, again.err
    assert [(r["codec"], r["compress_seconds"]) for r in json.loads(again.out)["rows"]] == measured
    moved = cli("bench", "--compare", out, out)
    assert (moved.code, moved.out) == (0, "nothing moved by more than one percent\n")


def test_judged_files_hold_no_probes(cli: Cli, bench: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """The ratio is that of keys, values and tokens: the size is that of ``compress --drop-probes``."""
    folder, captures = bench
    out, packed = tmp_path / "r.json", tmp_path / "x.kvp"
    made = cli("bench", captures[0], "-m", folder, "--codecs", "kivi-2,lossless", "--quick", "-o", out)
    assert made.code == 0, made.err
    kept = sum(s.nbytes for n, s in TensorFile.open(captures[0]).tensors.items() if n.startswith(("layers.", "tokens")))
    for row in json.loads(out.read_text())["rows"]:
        if row["codec"] == RECOMPUTE:
            continue
        assert cli("compress", captures[0], "-c", row["codec"], "--drop-probes", "-o", packed, "-f").code == 0
        assert row["size"] == packed.stat().st_size
        assert row["ratio"] * row["size"] == pytest.approx(kept, abs=4096)  # the safetensors header
        assert row["attention_error"] < 0.9
        assert row["model"]["needles_found"] is not None


def test_a_bench_with_a_profile(cli: Cli, bench: tuple[Path, list[Path]], tmp_path: Path) -> None:
    folder, captures = bench
    profile = profile_for(captures[0], CODECS["kvtc-1"])
    assert profile is not None
    out, report = tmp_path / "r.json", tmp_path / "r.md"
    common = ("-m", folder, "--quick", "-o", out)
    without = cli("bench", captures[0], *common, "--codecs", "kvtc-1")
    assert (without.code, without.err.count("\n")) == (2, 1)
    assert "kvpack calibrate" in without.err
    every = cli("bench", captures[0], "-m", "none", "--quick", "-o", out, "--codecs", "all", "-f")
    assert every.code == 0
    assert "no profile for fisher, aquakv, kvtc (-D)" in every.err
    assert "kvtc" not in out.read_text()
    done = cli(
        "bench",
        captures[0],
        *common,
        "-D",
        profile.path,
        "--codecs",
        "fisher-4,aquakv-3,kvtc",
        "--report",
        report,
        "-f",
    )
    assert done.code == 0, done.err
    results = json.loads(out.read_text())
    assert results["setting"]["profile"] == {**profile.identity(), "size": profile.size}
    families = {name.rsplit("-", 1)[0] for name in PROFILED} - {"kvtc-all"}
    assert {row["codec"].rsplit("-", 1)[0] for row in results["rows"]} == {*families, RECOMPUTE}
    assert f"{profile.size:,} bytes" in report.read_text()
    other = cli("bench", captures[0], *common, "--codecs", "lossless")
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert "profile" in other.err


def test_replay_is_one_more_row(cli: Cli, bench: tuple[Path, list[Path]], tmp_path: Path) -> None:
    folder, captures = bench
    out, report = tmp_path / "r.json", tmp_path / "r.md"
    common = ("bench", captures[0], "--quick", "-o", out, "--codecs")
    done = cli(*common, "lossless,replay", "-m", folder, "--report", report)
    assert done.code == 0, done.err
    rows = {row["codec"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["lossless", "replay", RECOMPUTE]
    assert [row["decode_flops"] for row in rows.values()] == [0, network_flops(180), network_flops(180)]
    assert all(row["model"]["plain"]["kl_mean"] == 0 for row in rows.values())
    packed = tmp_path / "x.kvp"
    made = cli("compress", captures[0], "-c", "replay", "-m", folder, "--drop-probes", "-o", packed)
    assert (made.code, packed.stat().st_size) == (0, rows["replay"]["size"])
    (table,) = report.read_text().split("| codec |")[1:]
    assert table.count(" | - |\n") == 2  # replay and recompute are not set against themselves
    for options in (("-m", "none"), ("-m", folder, "--dtype", "bf16")):
        refused = cli(*common, "replay", *options, "-f")
        assert (refused.code, refused.err.count("\n")) == (2, 1)
    left_out = cli(*common, "all,replay", "-m", "none", "-f")
    assert left_out.code == 0
    assert "codecs that run it are left out" in left_out.err
    assert "replay" not in {row["codec"] for row in json.loads(out.read_text())["rows"]}


def test_what_a_bench_refuses(cli: Cli, bench: tuple[Path, list[Path]], tmp_path: Path) -> None:
    folder, captures = bench
    out = tmp_path / "r.json"
    assert cli("bench").code == 2
    assert cli("bench", captures[0], "-m", folder, "--codecs", "nonesuch", "-o", out).code == 2
    assert cli("bench", captures[0], "-m", "none", "--codecs", "lossless", "-o", out).code == 0
    assert json.loads(out.read_text())["rows"][0]["model"] is None
    other = cli("bench", captures[0], "-m", folder, "--codecs", "lossless", "-o", out)
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert "use -f" in other.err
    assert cli("bench", captures[0], "-m", folder, "--codecs", "lossless", "-o", out, "-f").code == 0
    out.write_text("{}")
    assert cli("bench", captures[0], "-m", folder, "--codecs", "lossless", "-o", out).code == 4
    plain = cli(
        "bench", captures[0], "-m", "none", "--codecs", "kivi-4", "-o", out, "-f", "--plot", tmp_path / "x.nope"
    )
    assert (plain.code, plain.err.count("kvpack:")) == (1, 1)


def test_summaries_average_seeds_first_then_documents() -> None:
    rows = [row("a", "x-1", 0, 0.1), row("a", "x-1", 1, 0.3), row("b", "x-1", 0, 0.4)]
    (summary,) = summarize(rows)
    assert summary.documents == 2
    assert summary.figures["kl_plain"].mean == pytest.approx(0.3)
    assert summary.figures["kl_plain"].half == pytest.approx(12.7062 * 0.1)  # sd 0.1 * sqrt 2, over sqrt 2
    assert "kl_repeat" not in summary.figures
    assert "| x-1 |" in markdown(results(*rows))


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    draws = [interval(list(rng.standard_normal(4))) for _ in range(2000)]
    covered = np.mean([abs(one.mean) <= (one.half or 0) for one in draws])
    assert covered == pytest.approx(0.95, abs=0.02)
    assert interval([1.0]).half is None


def test_intervals_are_those_of_students_t_at_any_number_of_documents() -> None:
    """The quantiles are those of printed tables (two-sided, 95 %), and never jump."""
    for documents, quantile in ((2, 12.706), (11, 2.228), (12, 2.201), (13, 2.179), (31, 2.042), (121, 1.980)):
        values = list(np.random.default_rng(documents).standard_normal(documents))
        half = interval(values).half
        assert half is not None
        assert half / (np.std(values, ddof=1) / documents**0.5) == pytest.approx(quantile, abs=5e-4)
    steps = [student_t(degrees) for degrees in range(1, 60)]
    falls = -np.diff(steps)
    assert (falls > 0).all()
    assert (np.diff(falls) < 0).all()


def test_without_scipy_a_bench_says_so_before_it_runs(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    student_t.cache_clear()
    assert interval([1.0]).half is None  # One document has no interval, and takes no scipy.
    with pytest.raises(UsageError, match=r"pip install 'kvpack\[bench\]'"):
        interval([1.0, 2.0])
    monkeypatch.setattr("kvpack.capture.load_model", lambda *_: pytest.fail("work began"))
    done = cli("bench", SMALL, SMALL, "-o", tmp_path / "r.json", "--codecs", "lossless")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "pip install 'kvpack[bench]'" in done.err


def test_compare_names_what_moved() -> None:
    old = results(row("a", "x-1", 0, 0.1), row("a", "y", 0, 0.1))
    new = results(row("a", "x-1", 0, 0.2), row("a", "y", 0, 0.1), row("b", "y", 0, 0.9))
    moved = compare(old, new)
    assert {codec for codec, *_ in moved} == {"x-1"}
    assert ("x-1", "kl_plain", pytest.approx(0.1), pytest.approx(0.2)) in moved
    slower = results(*(replace(one, compress_seconds=9.0) for one in old.rows))
    assert compare(old, slower) == []


def test_codecs_by_family() -> None:
    assert [codec.name for codec in codecs_matching(["kivi", "lossless"])] == ["lossless", "kivi-4", "kivi-3", "kivi-2"]
    assert [codec.name for codec in codecs_matching(["all"])] == codec_names()
    assert family_of("turboquant-prod-3") == "turboquant-prod"
    with pytest.raises(UsageError):
        codecs_matching(["kiwi"])
    assert CODECS["turboquant-3"].with_seed(0) == CODECS["turboquant-3"]
    assert CODECS["turboquant-3"].with_seed(1) != CODECS["turboquant-3"]
    assert not CODECS["kivi-4"].seeded

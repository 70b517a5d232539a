"""The arithmetic of arXiv 2604.15356, and the entropy that replaces its assumption."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FIXTURES
from models import CONFIGS, save_model
from profiles import profile_for

from kvpack.codecs.recipes import CODECS

Cli = Callable[..., Any]
LLAMA = FIXTURES / "llama-3-70b-config.json"
SMOLLM2 = FIXTURES / "smollm2-135m-config.json"


def claims(cli: Cli, *options: object) -> dict[str, Any]:
    result = cli("claims", *options, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)  # type: ignore[no-any-return]


def test_the_papers_headline_and_what_the_model_really_caches(cli: Cli) -> None:
    paper, real = claims(cli, "--config", LLAMA)["claims"]
    assert round(paper["over_turboquant"]) == 914_456
    assert round(real["over_turboquant"]) == 114_307
    assert real["raw_bits"] == 80 * 8 * 128 * 2 * 16
    text = cli("claims", "--config", LLAMA).out
    assert "914,456x" in text
    assert "114,307x" in text


def table(document: dict[str, Any], stored: str) -> list[dict[str, Any]]:
    return [line for line in document["table"] if line["stored"].startswith(stored)]


def test_every_line_that_replays_has_its_price(cli: Cli) -> None:
    """In JSON and in text; where a configuration does not tell it, the line says so."""
    document = claims(cli, "--config", LLAMA, "--config", SMOLLM2, "--context", 100)
    replayed = [line for line in document["table"] if line["runs_model"]]
    assert len(replayed) == 2 * 2 * 2
    assert all("replayed" in line["stored"] for line in replayed)
    assert all(line["flops"] > 2e8 for line in replayed)
    assert all(line["flops"] == line["seconds"] == 0 for line in document["table"] if line not in replayed)
    text = cli("claims", "--config", SMOLLM2, "--context", 100).out
    weights = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    plain = 2 * weights + 4 * 30 * 9 * 64 * 101 / 2
    both = 2 * plain + 2 * 49152 * 576
    for stored, flops in (("tokens as 32-bit", plain), ("tokens by their entropy", both)):
        assert [line["flops"] for line in table(document, stored)][2:] == [flops, flops]
        rows = [line for line in text.splitlines() if line.startswith(f"  {stored}")]
        assert len(rows) == 2
        assert all(f"{flops:.3g}" in row for row in rows)


def test_a_price_that_is_not_known_is_said_to_be_unknown(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"n_layer": 12, "n_head": 12, "n_embd": 768}')
    (line, _) = table(claims(cli, "--config", path), "tokens by")
    assert (line["runs_model"], line["flops"], line["seconds"]) == (True, None, None)
    rows = [row for row in cli("claims", "--config", path).out.splitlines() if row.startswith("  tokens")]
    assert len(rows) == 4
    assert all("unknown" in row for row in rows)


def test_ratios_are_to_raw_and_to_both_turboquants(cli: Cli) -> None:
    document = claims(cli, "--config", LLAMA, "--token-bits", 2)
    elements = 2 * 80 * 8 * 128
    (_, line) = table(document, "tokens by")
    assert (line["bits"], line["over_raw"]) == (2, elements * 16 / 2)
    assert (line["over_turboquant"], line["over_packed"]) == (elements * 3 / 2, elements * 3.25 / 2)
    for line in document["table"]:
        assert line["over_raw"] * line["bits"] in (elements * 16, 8 * elements * 16)
    assert len(table(claims(cli, "--config", LLAMA, "--bits", 3.25), "TurboQuant")) == 2


def test_what_claims_refuses(cli: Cli, tmp_path: Path) -> None:
    for options in ([], ["--config", LLAMA, "-m", "x"], ["--config", LLAMA, "-D", tmp_path / "x.kvprofile"]):
        result = cli("claims", *options)
        assert (result.code, result.out) == (2, "")


@pytest.fixture
def captured(cli: Cli, tmp_path: Path) -> tuple[Path, Path]:
    """A tiny model's folder and a capture of it."""
    folder, text = save_model(CONFIGS["llama-gqa"](), tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("what is measured stands beside what is claimed " * 9)
    path = tmp_path / "c.safetensors"
    assert cli("capture", "-m", folder, "--text", text, "-o", path, "--max-tokens", 300).code == 0
    return folder, path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_measured_files_stand_in_the_same_table(cli: Cli, tmp_path: Path, captured: tuple[Path, Path]) -> None:
    folder, path = captured
    config = ("--config", folder / "config.json")
    document = claims(cli, *config, "--measured", path, "-m", folder)
    mine = [line for line in document["table"] if line["model"] == "model, 300 tokens"]
    names = [line["stored"] for line in mine]
    assert names == [
        "raw",
        "TurboQuant, 3 bits per element",
        *("lossless", "turboquant-3", "replay"),
        "tokens as 32-bit integers, replayed",
        "tokens by their entropy, replayed",
    ]
    found = dict(zip(names, mine, strict=True))
    for codec in ("lossless", "turboquant-3"):
        packed = tmp_path / f"{codec}.kvp"
        assert cli("compress", path, "-c", codec, "--drop-probes", "-o", packed).code == 0
        assert found[codec]["bits"] == packed.stat().st_size * 8 / 300
        assert found[codec]["over_packed"] == pytest.approx(64 * 3.25 / found[codec]["bits"])
        assert (found[codec]["runs_model"], found[codec]["flops"]) == (False, 0)
    assert (found["raw"]["bits"], found["raw"]["over_raw"]) == (64 * 32, 1)  # this model is in float32
    packed = tmp_path / "replay.kvp"
    assert cli("compress", path, "-c", "replay", "-m", folder, "--drop-probes", "-o", packed).code == 0
    assert found["replay"]["bits"] == packed.stat().st_size * 8 / 300
    for name in names[-3:]:
        assert found[name]["runs_model"]
        assert found[name]["seconds"] > 0
        assert found[name]["flops"] > 2 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert found[names[-2]]["bits"] == 32
    assert 0 < found[names[-1]]["bits"] < 9
    text = cli("claims", *config, "--measured", path, "-m", folder).out
    assert f"{folder.name}, 300 tokens\n" in text
    alone = claims(cli, "--measured", path, "-m", folder)
    assert [line["stored"] for line in alone["table"]] == names
    assert alone["claims"] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_profile_brings_the_calibrated_codec(cli: Cli, captured: tuple[Path, Path]) -> None:
    folder, path = captured
    profile = profile_for(path, CODECS["fisher-5"])
    assert profile is not None
    document = claims(cli, "--measured", path, "-m", folder, "-D", profile.path)
    assert [line["stored"] for line in document["table"]][2:6] == ["lossless", "turboquant-3", "fisher-5", "replay"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_capture_of_another_model_is_refused(cli: Cli, captured: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_model(CONFIGS["llama-mha"](), tmp_path / "other")
    result = cli("claims", "--measured", captured[1], "-m", other)
    assert (result.code, result.out, result.err.count("\n")) == (5, "", 1)


def test_norms_are_counted_on_request(cli: Cli) -> None:
    plain, normed = (claims(cli, "--config", LLAMA, "--norm-bits", n)["claims"][1] for n in (0, 16))
    assert normed["turboquant_bits"] - plain["turboquant_bits"] == 80 * 8 * 2 * 16


def test_gpt2_spelling(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"n_layer": 12, "n_head": 12, "n_embd": 768}')
    rows = claims(cli, "--config", path)["claims"]
    assert rows[0]["raw_bits"] == rows[1]["raw_bits"] == 12 * 768 * 2 * 16


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff", b'{"num_hidden_layers": 0}', b'{"num_hidden_layers": 2, "num_attention_heads": "x"}'],
)
def test_bad_configurations_are_one_line(cli: Cli, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    result = cli("claims", "--config", path)
    assert (result.code, result.out, result.err.count("\n")) == (4, "", 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_measured_entropy_is_the_models_own_loss(cli: Cli, tmp_path: Path) -> None:
    """In several chunks what one pass of transformers gives."""
    folder = save_model(CONFIGS["llama-gqa"](), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("a token costs what the model did not know of it " * 9)
    document = claims(cli, "--config", folder / "config.json", "-m", folder, "--text", text, "--max-tokens", 400)
    assert "measured under model on 399 tokens" in document["token_bits_source"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[:, :400]
    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        loss = float(network(ids, labels=ids).loss) / math.log(2)
    assert document["claims"][1]["token_bits"] == pytest.approx(loss, rel=1e-4)

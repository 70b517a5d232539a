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

Cli = Callable[..., Any]
LLAMA = FIXTURES / "llama-3-70b-config.json"


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

"""JSON that is neither a header nor metadata: configurations of models and the results of ``bench``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forge import ROOT

Cli = Callable[..., Any]
CONFIG: dict[str, Any] = json.loads((ROOT / "fixtures" / "llama-3-8b-config.json").read_text())
TEXT = json.dumps(CONFIG)

CONFIGURATIONS = {
    "a list": "[]",
    "a text configuration that is a list": json.dumps({"text_config": [CONFIG]}),
    "layers that are a list": json.dumps({**CONFIG, "num_hidden_layers": [2]}),
    "an integer of many digits": TEXT.replace('"vocab_size"', f'"x": {"1" * 5000}, "vocab_size"'),
    "nested too deeply": TEXT.replace("{", '{"x": ' + "[" * 100_000 + "]" * 100_000 + ",", 1),
    "no Unicode": TEXT.replace("{", '{"\\ud800": 1,', 1),
    "not UTF-8": "\xff",
}


@pytest.mark.parametrize("text", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_configuration_that_is_none(cli: Cli, tmp_path: Path, text: str) -> None:
    """Integers of many digits and other types used to end in an internal error. Found by fuzzing and before it."""
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    found = cli("claims", "--config", path)
    assert (found.code, found.err.count("\n")) == (4, 1), found.err
    assert len(found.err) < 500


@pytest.mark.parametrize("kind", [["llama"], {"a": 1}, None, 5], ids=str)
def test_a_type_of_model_that_is_no_text(cli: Cli, tmp_path: Path, kind: Any) -> None:
    """It is a model of another shape. Lists and objects used to end in an internal error. Found by fuzzing."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, "model_type": kind}))
    assert cli("claims", "--config", path).code == 0


ROW: dict[str, Any] = {
    "document": "a", "document_sha256": "b", "codec": "c", "seed": 0, "size": 9, "ratio": 1.0, "bits_per_element": 2.0,
    "keys_nmse": 0.1, "values_nmse": 0.1, "attention_error": 0.1, "compress_seconds": 1.0, "decompress_seconds": 1.0,
    "model": None, "decode_flops": 0,
}  # fmt: skip


def results(**fields: Any) -> dict[str, Any]:
    return {"schema_version": 3, "setting": {}, "machine": {}, "rows": [{**ROW, **fields}]}


RESULTS = {
    "a list": "[]",
    "nested too deeply": "[" * 100_000 + "]" * 100_000,
    "an integer of many digits": "1" * 5000,
    "a setting that is a list": json.dumps({**results(), "setting": []}),
    "rows that are a number": json.dumps({**results(), "rows": 5}),
    "a row that is a number": json.dumps({**results(), "rows": [5]}),
    "a row without fields": json.dumps({**results(), "rows": [{}]}),
    "a codec that is a list": json.dumps(results(codec=["c"])),
    "a hash that is a list": json.dumps(results(document_sha256=[])),
    "a size that is a text": json.dumps(results(size="9")),
    "an error that is an object": json.dumps(results(keys_nmse={})),
    "a number beyond float64": json.dumps(results(ratio=10**400)),
    "a model that is a list": json.dumps(results(model=[1])),
    "a model without figures": json.dumps(results(model={"plain": None})),
    "a test that is a text": json.dumps(results(model={"plain": "x"})),
}


@pytest.mark.parametrize("text", RESULTS.values(), ids=RESULTS)
def test_results_that_are_none(cli: Cli, tmp_path: Path, text: str) -> None:
    """Rows of other types were taken, and ended in an internal error where they were summarized."""
    path = tmp_path / "results.json"
    path.write_text(text)
    found = cli("bench", "--compare", path, path)
    assert (found.code, found.err.count("\n")) == (4, 1), found.err
    path.write_text(json.dumps(results()))
    assert cli("bench", "--compare", path, path).code == 0

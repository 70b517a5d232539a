"""Captures of real runs: tiny models of every kind of attention, and the embedded model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import CONFIGS, REFUSED, save_model

from kvpack.capture.run import probe_positions
from kvpack.formats.source import Capture
from kvpack.jobs.reader import open_cache
from kvpack.numerics.floats import to_float32

Cli = Callable[..., Any]
TEXT = "The KV cache of a language model holds, for every layer, the keys and values of all tokens so far. " * 2

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(CONFIGS[request.param](), tmp_path_factory.mktemp(request.param))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def eager_run(folder: Path, ids: np.ndarray, dtype: torch.dtype = torch.float32) -> Any:
    """The same tokens through transformers' own code: the cache by SDPA, attention weights by eager."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    runs = []
    for implementation in ("sdpa", "eager"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=implementation
        ).eval()
        with torch.inference_mode():
            runs.append(model(tokens, use_cache=True, output_attentions=implementation == "eager"))
    return runs[0].get("cache", runs[0].get("past_key_values")), runs[1].attentions


def floats(cache: Capture, name: str) -> np.ndarray:
    return to_float32(cache.read(name), cache.tensors[name].dtype).astype(np.float64)


def test_capture_is_what_the_model_cached(cli: Cli, folder: Path, text: Path, tmp_path: Path) -> None:
    target = tmp_path / "c.safetensors"
    done = cli("capture", "-m", folder, "--text", text, "-o", target, "--queries", 5, "--device", "cpu")
    assert (done.code, done.err) == (0, "")
    cache = open_cache(target)
    ids = cache.read("tokens").view(np.int32)
    assert ids.tolist() == transformers.AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    expected, weights = eager_run(folder, ids)
    positions = cache.read("query_positions").view(np.int32)
    assert positions.tolist() == probe_positions(len(ids), 5)
    scale = json.loads(cache.metadata["attention"])["scale"]
    for i, layer in enumerate(expected.layers):
        assert (floats(cache, f"layers.{i}.keys") == layer.keys[0].double().numpy()).all()
        assert (floats(cache, f"layers.{i}.values") == layer.values[0].double().numpy()).all()
        p = weights[i][0].double().numpy()  # [H_q, Q, T]
        keys = np.repeat(floats(cache, f"layers.{i}.keys"), len(p) // layer.keys.shape[1], axis=0)
        rows = np.einsum("hpd,htd->hpt", floats(cache, f"queries.{i}"), keys) * scale
        rows[:, np.arange(len(ids))[None, :] > positions[:, None]] = -np.inf
        rows = np.exp(rows - rows.max(-1, keepdims=True))
        assert np.abs(rows / rows.sum(-1, keepdims=True) - p[:, positions]).max() < 1e-5
        mass = (p * (1 - p)).sum(1).reshape(layer.keys.shape[1], -1, len(ids)).sum(1)
        found = cache.read("attention_mass").view(np.float16)[i].astype(np.float64)
        assert np.abs(found - mass).max() < 2e-3 * max(mass.max(), 1)


def test_a_capture_is_deterministic_and_round_trips(cli: Cli, folder: Path, text: Path, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        assert cli("capture", "-m", folder, "--text", text, "-o", path, "--dtype", "bf16").code == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert cli("compress", paths[0]).code == 0
    assert cli("decompress", f"{paths[0]}.kvp", "-o", tmp_path / "back").code == 0
    assert (tmp_path / "back").read_bytes() == paths[0].read_bytes()
    assert cli("verify", paths[0], f"{paths[0]}.kvp", "--bit-exact", "--max-attn-err", "0").code == 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(CONFIGS["llama-gqa"](), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(("dtype", "spelling"), [("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32"), ("auto", "F32")])
def test_dtypes(cli: Cli, llama: Path, text: Path, tmp_path: Path, dtype: str, spelling: str) -> None:
    assert cli("capture", "-m", llama, "--text", text, "-o", tmp_path / "c", "--dtype", dtype).code == 0
    tensors = open_cache(tmp_path / "c").tensors
    assert {tensors[name].dtype for name in ("layers.1.keys", "layers.0.values", "queries.1")} == {spelling}


def test_schedules_are_recorded(cli: Cli, llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "c"
    options = ["--max-tokens", 50, "--chunk", 16, "--generate", 7, "--queries", 40]
    assert cli("capture", "-m", llama, "--text", "-", "-o", target, *options, stdin=TEXT.encode()).code == 0
    cache = open_cache(target)
    assert json.loads(cache.metadata["schedule"]) == {"prefill": [16, 16, 16, 2], "decode": 7}
    assert cache.tensors["layers.0.keys"].shape == (2, 57, 8)
    assert cache.tensors["tokens"].shape == (57,)
    assert cache.tensors["queries.0"].shape == (4, 29, 8)
    assert cache.read("query_positions").view(np.int32).tolist() == list(range(28, 57))
    ids = torch.from_numpy(cache.read("tokens").view(np.int32).astype(np.int64))[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.inference_mode():
        greedy = model(ids).logits[0].argmax(-1)
    assert greedy[49:56].tolist() == ids[0, 50:].tolist()


def test_no_queries(cli: Cli, llama: Path, text: Path, tmp_path: Path) -> None:
    assert cli("capture", "-m", llama, "--text", text, "-o", tmp_path / "c", "--queries", 0).code == 0
    assert not [name for name in open_cache(tmp_path / "c").tensors if "quer" in name]


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_cannot_be_represented_are_refused_by_name(cli: Cli, name: str, text: Path, tmp_path: Path) -> None:
    folder = save_model(REFUSED[name](), tmp_path / "model")
    result = cli("capture", "-m", folder, "--text", text, "-o", tmp_path / "c")
    assert result.code == 6
    assert result.err.startswith("kvpack: layer 0 of model is a ")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_bad_requests(cli: Cli, llama: Path, text: Path, tmp_path: Path) -> None:
    target = tmp_path / "c"
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"\xe9\xff")
    (tmp_path / "long").write_text(TEXT * 4)
    for options, code, words in (
        (["-m", llama, "--text", tmp_path / "empty"], 1, "there is no text in it"),
        (["-m", llama, "--text", tmp_path / "latin"], 1, "not UTF-8"),
        (["-m", llama, "--text", tmp_path / "long"], 2, "--max-tokens"),
        (["-m", llama, "--text", tmp_path / "nowhere"], 1, "No such file"),
        (["-m", tmp_path / "nowhere", "--text", text], 1, "cannot load"),
        (["-m", tmp_path / "nowhere.gguf", "--text", text], 1, "no such file"),
        (["-m", llama, "--text", text, "--dtype", "int3"], 2, "--dtype"),
    ):
        result = cli("capture", *options, "-o", target)
        assert (result.code, words in result.err, result.err.count("\n")) == (code, True, 1), result.err
        assert not target.exists()


WITHOUT_GGUF = "import sys; sys.modules['gguf'] = None; from kvpack.cli.main import main; main()"
"""Runs the command line as on a machine that has no package gguf."""


def test_a_model_that_is_no_gguf_file_takes_no_gguf(llama: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_GGUF, "capture", "-m", llama, "--text", text, "-o", tmp_path / "c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert open_cache(tmp_path / "c").tensors["layers.0.keys"].dtype == "F32"


@pytest.mark.long
def test_a_gguf_file_without_the_package_gguf(text: Path, tmp_path: Path) -> None:
    """A file by name, and the embedded model, which is one."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for model in (["-m", tmp_path / "x.gguf"], []):
        command = [sys.executable, "-c", WITHOUT_GGUF, "capture", *model, "--text", text, "-o", tmp_path / "c"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert ".gguf: a GGUF file needs gguf: pip install 'kvpack[capture]'" in done.stderr
        assert not (tmp_path / "c").exists()


def test_the_embedded_model(text: Path, tmp_path: Path) -> None:
    """As a process of its own, which must also keep the libraries' chatter to itself."""
    target = tmp_path / "c"
    command = [sys.executable, "-m", "kvpack", "capture", "--text", text, "-o", target, "--max-tokens", "30"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    cache = open_cache(target)
    assert cache.tensors["layers.29.values"].shape == (3, 30, 64)
    assert cache.tensors["layers.29.values"].dtype == "BF16"
    model = json.loads(cache.metadata["model"])
    assert model["architecture"] == "LlamaForCausalLM"
    assert len(model["weights_sha256"]) == 64
    assert json.loads(cache.metadata["rope"])["rope_theta"] == 100000.0

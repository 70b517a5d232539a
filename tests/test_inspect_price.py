"""``kvpack inspect`` names the cost of decoding where that runs the model, and runs none to find out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, write_tensors
from models import CONFIGS, save_model

from kvpack import jobs
from kvpack.cache.flops import Network
from kvpack.codecs.chain.codec import ChainCodec
from kvpack.codecs.recipes import CODECS
from kvpack.formats.source import Capture

Cli = Callable[..., Any]
SIZES = {"hidden_size": 576, "parameters": 134_515_008, "embedding_parameters": 28_311_552}


def replayed(folder: Path, **sizes: int) -> Path:
    """A file whose codec bears replay's name, of a capture that records these numbers of its model."""
    capture = Capture.open(SMALL)
    model = json.loads(capture.metadata["model"])
    model = {name: value for name, value in model.items() if name not in SIZES} | sizes
    tensors = {name: (spec.dtype, capture.read(name)) for name, spec in capture.tensors.items()}
    source = write_tensors(folder / "c.safetensors", tensors, {**capture.metadata, "model": json.dumps(model)})
    lossless = CODECS["lossless"]
    assert isinstance(lossless, ChainCodec)
    with (folder / "x.kvp").open("wb") as sink:
        jobs.compress(source, sink, replace(lossless, name="replay"))
    return folder / "x.kvp"


def test_decoding_that_runs_the_model_has_a_price(cli: Cli, tmp_path: Path) -> None:
    path = replayed(tmp_path, **SIZES)
    expected = Network(30, 9, 64, 134_515_008 - 28_311_552, 49152 * 576).prefill(160)
    report = json.loads(cli("inspect", path, "--json").out)
    assert (report["runs_model"], report["decode_flops"]) == (True, expected)
    assert expected == 2 * 106_203_456 * 160 + 4 * 30 * 9 * 64 * 160 * 161 // 2
    shown = cli("inspect", path).out
    assert "runs the model: 3.49e+10 floating-point operations" in shown


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_price_of_replay(cli: Cli, tmp_path: Path) -> None:
    """Tokens that the model codes are found token by token, with the output head, before the cache is computed."""
    folder = save_model(CONFIGS["llama-gqa"](), tmp_path / "model")
    text, path, packed = (tmp_path / name for name in ("t.txt", "c.safetensors", "c.kvp"))
    text.write_text("the price of a replay is a prefill " * 4)
    assert cli("capture", "-m", folder, "--text", text, "-o", path, "--max-tokens", 90).code == 0
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    prefill = 2 * weights * 90 + 4 * 2 * 32 * 90 * 91 // 2
    for coder, flops in (("fast", prefill), ("model", 2 * prefill + 2 * 256 * 32 * 90)):
        done = cli("compress", path, "-c", "replay", "-m", folder, "--token-coder", coder, "-o", packed, "-f")
        assert done.code == 0, done.err
        report = json.loads(cli("inspect", packed, "--json").out)
        assert (report["runs_model"], report["decode_flops"]) == (True, flops)


def test_a_price_that_cannot_be_known_is_not_zero(cli: Cli, tmp_path: Path) -> None:
    path = replayed(tmp_path)
    report = json.loads(cli("inspect", path, "--json").out)
    assert (report["runs_model"], report["decode_flops"]) == (True, None)
    assert "does not record how large" in cli("inspect", path).out


def test_other_files_run_no_model(cli: Cli, small: Path) -> None:
    assert cli("compress", small).code == 0
    for path in (small, Path(f"{small}.kvp")):
        report = json.loads(cli("inspect", path, "--json").out)
        assert (report["runs_model"], report["decode_flops"]) == (False, 0)
        assert "runs the model" not in cli("inspect", path).out


@pytest.mark.parametrize(
    ("options", "shown"),
    [([], "3.49e+10 floating-point operations"), (["--json"], '"decode_flops": 34875371520')],
    ids=["text", "json"],
)
def test_the_price_needs_neither_numpy_nor_torch(tmp_path: Path, options: list[str], shown: str) -> None:
    path = replayed(tmp_path, **SIZES)
    code = (
        "import sys; from kvpack.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert stop.code in (0, None)\n"
        "assert not {'numpy', 'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", *options, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout

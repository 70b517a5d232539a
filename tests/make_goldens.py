"""Writes the golden files of the format. It is run by hand, and only when the format changes on purpose.

    python tests/make_goldens.py

Goldens of format 1.0 are ``fixtures/goldens/1.0/{codec}.kvp``. Codecs with a calibration profile are given a smaller
capture (``profiles.tiny_capture``) and ``fixtures/tiny.kvprofile``. That profile is calibrated on the same capture, and
made here if it is not there. Goldens of later versions are ``fixtures/goldens/{version}/{feature}.kvp``, one or several
for each critical feature that the version has added.

Beside each golden of a lossless codec stands the SHA-256 of the capture that it decodes to, and ``SHA256SUMS`` lists
every file of a version. Goldens never change: a file that is there is left as it is.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from made_model import MadeModel, write_made
from newer import write_newer
from profiles import FIXTURES, THETA, TINY, model_metadata, tiny_capture
from test_origin import part_of, rows_of

from kvpack import jobs
from kvpack.calibration import FisherOptions, PredictorOptions, Sample, calibrate, prediction, scales, token_klt
from kvpack.codecs.chain.transforms.unrope import rotate
from kvpack.codecs.model import LanguageModel
from kvpack.codecs.protocol import Codec, Need
from kvpack.codecs.recipes import CODECS
from kvpack.codecs.replay import ReplayCodec
from kvpack.formats.source import Capture
from kvpack.jobs.reader import KvpFile
from kvpack.numerics.floats import to_float32
from kvpack.profiles import Profile, write_profile

CAPTURE = FIXTURES / "smollm2-160.safetensors"
RANK, SINKS, TABLE_BUDGET = 32, 1, 8192
GOLDENS = FIXTURES / "goldens"


def main() -> None:
    """Write every golden that is not there."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_capture(Path(folder) / "tiny.safetensors")
        if not TINY.exists():
            write_tiny_profile(tiny)
        profile = Profile.open(TINY)
        for name, codec in CODECS.items():
            write_golden(
                GOLDENS / "1.0" / f"{name}.kvp", tiny if Need.PROFILE in codec.traits.needs else CAPTURE, codec, profile
            )
        newer = write_newer(Path(folder) / "newer.safetensors")
        write_golden(GOLDENS / "1.1" / "newer-dtypes.kvp", newer, CODECS["lossless"])
        for name in ("lossless", "fisher-5", "local-4"):
            write_part(GOLDENS / "1.1" / f"origin-{name}.kvp", name, Capture.open(tiny))
        made = write_made(Path(folder) / "made.safetensors")
        for coder in ("fast", "model"):
            codec = ReplayCodec().with_token_coder(coder)
            write_golden(GOLDENS / "1.1" / f"replay-{coder}.kvp", made, codec, model=MadeModel())
    write_sums(GOLDENS / "1.0", TINY)
    write_sums(GOLDENS / "1.1")


def write_golden(
    path: Path, capture: Path, codec: Codec, profile: Profile | None = None, model: LanguageModel | None = None
) -> None:
    """Compress ``capture`` to ``path``, unless the golden is there already."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as sink:
        jobs.compress(capture, sink, codec, profile=profile, model=model)
    if codec.lossless:
        back = io.BytesIO()
        jobs.decompress(KvpFile.open(path, model=model), back)
        path.with_suffix(".sha256").write_text(hashlib.sha256(back.getvalue()).hexdigest() + "\n")


def write_part(path: Path, name: str, capture: Capture) -> None:
    """Compress the capture's last rows as a part of a text, by the codec's variant for stores, unless it was done."""
    if path.exists():
        return
    data = part_of(capture, name)
    path.write_bytes(data)
    if name == "lossless":
        digest = hashlib.sha256(rows_of(data, name, None)).hexdigest()
        path.with_suffix(".sha256").write_text(digest + "\n")


def write_sums(folder: Path, *others: Path) -> None:
    """List the SHA-256 of every golden in ``folder``, and of the ``others`` that they need."""
    files = [*others, *sorted(folder.glob("*.kvp")), *sorted(folder.glob("*.sha256"))]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def write_tiny_profile(path: Path) -> None:
    """Calibrate on the tiny capture itself; no model has one head, so ``fisher`` weighs all elements alike."""
    capture = Capture.open(path)
    frequencies = (THETA ** -(np.arange(32) / 32)).astype(np.float32)
    halves = {}
    for kind in ("keys", "values"):
        layers = [to_float32(capture.read(f"layers.{i}.{kind}"), "BF16") for i in (0, 29)]
        if kind == "keys":
            layers = [rotate(layer, frequencies, 0, -1) for layer in layers]
        halves[kind] = np.concatenate([layer[0] for layer in layers], axis=1)[None].astype(np.float16)
    tokens = capture.read("tokens").view(np.int32)[None].copy()
    both = np.concatenate([halves["keys"], halves["values"]], axis=2)
    sample = Sample(both, tokens, {0: np.ones(tokens.shape[1], np.float32)}, 2, 64, frequencies, [])
    arrays: dict[str, np.ndarray] = {"rope.inv_freq": frequencies}
    information = 1e-3 * torch.eye(64).repeat(4, 1, 1)
    embeddings = torch.randn(int(tokens.max()) + 1, 16, generator=torch.Generator().manual_seed(0))
    parts: dict[str, np.ndarray] = {}
    for _, found in token_klt.learn(sample, [0], information, SINKS, embeddings, RANK):
        parts |= found
    coordinates = token_klt.coordinates(sample, [0], parts, torch.device("cpu"))
    for _, found in prediction.learn(tokens, coordinates, embeddings, TABLE_BUDGET, PredictorOptions(8, 20)):
        parts |= found
    arrays |= {f"fisher.{name}": array for name, array in parts.items()}
    arrays |= {f"fisher.{name}": array for name, array in scales.scatter(sample, [0], arrays).items()}
    on_cpu: Any = SimpleNamespace(network=SimpleNamespace(device="cpu"))
    arrays |= calibrate(on_cpu, sample, ("kvtc", "aquakv"), FisherOptions())
    with TINY.open("wb") as sink:
        write_profile(arrays, {"model": model_metadata(path)}, sink)


if __name__ == "__main__":
    main()

"""Calibration profiles for tests: small ones that fit any shape, and the tiny capture that goldens are made of."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import numpy as np

from kvpack.calibration.aquakv import gaussian_grid
from kvpack.calibration.scales import CLASSES, UNIT_CLASS, tables
from kvpack.codecs.chain.packed import pack_matrix
from kvpack.codecs.chain.symbols import SMALLEST
from kvpack.codecs.chain.transforms.token_klt.model import DECAYS, LAGS, PLACES
from kvpack.codecs.protocol import Codec, Need, Scope
from kvpack.codecs.recipes import AQUAKV_BITS, CODECS, KVTC_RATES
from kvpack.formats.captures import layer_of
from kvpack.formats.safetensors import TensorFile, build_header
from kvpack.formats.source import Capture
from kvpack.profiles import Profile, write_profile

FIXTURES = Path(__file__).parent.parent / "fixtures"
TINY = FIXTURES / "tiny.kvprofile"
"""Calibrated on :func:`tiny_capture` by ``tests/make_goldens.py``."""

THETA = 100_000.0
"""RoPE's base in SmolLM2-135M."""

PROFILED = [name for name, codec in CODECS.items() if Need.PROFILE in codec.traits.needs]
STACKED = [name for name, codec in CODECS.items() if codec.traits.scope is not Scope.TENSOR]


def tiny_capture(path: Path) -> Path:
    """Head 0 of the small capture's two layers and its metadata: 160 tokens of 2 x 64 channels.

    Token ids are their ranks among the capture's own, so that a table of tokens is small.
    """
    source = Capture.open(FIXTURES / "smollm2-160.safetensors")
    names = [name for name, spec in source.tensors.items() if layer_of(spec) is not None]
    arrays = {name: np.ascontiguousarray(source.read(name)[:1]) for name in names}
    ranks = np.unique(source.read("tokens").view(np.int32), return_inverse=True)[1]
    arrays["tokens"] = ranks.astype(np.int32)
    header = build_header([(n, source.tensors[n].dtype, a.shape) for n, a in arrays.items()], source.metadata)
    data = b"".join(array.tobytes() for array in arrays.values())
    path.write_bytes(len(header.raw).to_bytes(8, "little") + header.raw + data)
    return path


@cache
def grids() -> dict[str, np.ndarray]:
    return {f"higgs.{4**bits}": gaussian_grid(4**bits) for bits in AQUAKV_BITS}


VOCABULARY = 49152
"""Token ids that :func:`fisher_arrays` knows: SmolLM2's."""


def matrix(name: str, values: np.ndarray, groups: int) -> dict[str, np.ndarray]:
    """A packed matrix under ``name``; ``groups`` groups of rows have steps of their own."""
    blocks = np.abs(values).reshape(groups, -1, values.shape[1])
    packed = pack_matrix(values.astype(np.float32), np.maximum(blocks.max(1) / 127, 1e-30).astype(np.float32))
    return {f"{name}.{field}": array for field, array in packed.items()}


@cache
def fisher_arrays(layers: int, heads: int, dims: int) -> dict[str, np.ndarray]:
    """No whitening, a random basis of everything and a local direction a layer, 16 random token vectors, small random
    weights, two units; one sink.
    """
    rng = np.random.default_rng(1)
    blocks, size = 2 * layers * heads, 2 * layers * heads * dims
    own, reach, units = 3, 2, 2
    inputs = own + (LAGS + len(DECAYS)) * reach + PLACES
    columns = size + layers
    centroids = np.zeros((CLASSES, 4), np.float32)
    centroids[:, 1:] = [-0.05, -0.02, -0.01]
    section = {
        "mean": np.zeros((2, size), np.float16),
        "spread": np.ones(size, np.float32),
        "order": (np.arange(VOCABULARY) % 16).astype(np.int32),
        "columns": np.full(columns, 8 * UNIT_CLASS + 4, np.int32),
        "tables": tables(np.zeros((CLASSES, len(SMALLEST)))),
        "centroids": centroids,
        **matrix("whiten", np.tile(np.eye(dims), (blocks, 1)), blocks),
        **matrix("basis", np.linalg.qr(rng.standard_normal((size, size)))[0], 1),
        **matrix("table", rng.standard_normal((16, own)), 4),
        "groups": np.arange(layers, dtype=np.int32),
        **matrix("local", rng.standard_normal((size, 1)), 1),
        "scale": np.ones(inputs, np.float32),
        **matrix("hidden", rng.standard_normal((inputs, units)), 1),
        **matrix("weights", 0.05 * rng.standard_normal((inputs + units, columns)), 1),
    }
    return {f"fisher.{name}": array for name, array in section.items()}


@cache
def arrays_for(layers: int, heads: int, dims: int) -> dict[str, np.ndarray]:
    """A random basis, small random predictors, a plan that keeps everything: sound, if not learnt."""
    rng = np.random.default_rng(0)
    channels, size = heads * dims, layers * heads * dims
    plan = [(1, 8)] * min(size, 2) + [(16, 8)] * ((size - 2) // 16)
    left = size - sum(n for n, _ in plan)
    plan += [(left - 1, 8), (1, 8)] if left > 1 else [(left, 8)] if left else []
    half = dims // 2
    arrays: dict[str, np.ndarray] = {"rope.inv_freq": (THETA ** -(np.arange(half) / max(half, 1))).astype(np.float32)}
    for kind in ("keys", "values"):
        arrays[f"kvtc.{kind}.mean"] = np.zeros(size, np.float32)
        arrays[f"kvtc.{kind}.basis"] = np.linalg.qr(rng.standard_normal((size, size)))[0].astype(np.float32)
        arrays |= {f"kvtc.{kind}.plan.{rate}": np.array(plan, np.int32).reshape(-1, 2) for rate in KVTC_RATES}
        inputs = channels * (1 + (kind == "values"))
        for bits in AQUAKV_BITS:
            weight = 0.1 * rng.standard_normal((max(layers - 1, 0), inputs, channels)) / np.sqrt(max(inputs, 1))
            arrays[f"aquakv-{bits}.{kind}.weight"] = weight.astype(np.float16)
            arrays[f"aquakv-{bits}.{kind}.bias"] = np.zeros((max(layers - 1, 0), channels), np.float16)
    return arrays | grids() | fisher_arrays(layers, heads, dims)


def write(path: Path, arrays: dict[str, np.ndarray], **metadata: object) -> Path:
    sink = io.BytesIO()
    write_profile(arrays, metadata, sink)
    path.write_bytes(sink.getvalue())
    return path


def profile_for(path: Path, codec: Codec) -> Profile | None:
    """A profile that fits the capture at ``path``, written beside it; None where the codec takes none."""
    if Need.PROFILE not in codec.traits.needs:
        return None
    shapes = {spec.shape for spec in TensorFile.open(path).tensors.values() if layer_of(spec) is not None}
    layers = {name.split(".")[1] for name, s in TensorFile.open(path).tensors.items() if layer_of(s) is not None}
    ((heads, _, dims),) = shapes
    beside = path.with_name(f"{path.name}.{len(layers)}.{heads}.{dims}.kvprofile")
    if not beside.exists():
        write(beside, arrays_for(len(layers), heads, dims))
    return Profile.open(beside)


def model_metadata(path: Path) -> dict[str, object]:
    """The model that a capture names."""
    return dict(json.loads(TensorFile.open(path).metadata["model"]))

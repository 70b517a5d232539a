"""Our versions of rival codecs against their authors' or packagers' own code, on the same capture.

Each test is skipped where the package is not installed; none is a dependency. To run them::

    pip install --no-deps turboquant optimum-quanto lmcache && pip install scipy cachetools
    pytest tests/test_rivals.py

``docs/evaluation.md`` says which rivals cannot be held against their own code, and why.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL

from kvpack.codecs.chain.base import Part, PlaneSpec
from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.codecs.chain.quantizers.affine import Affine
from kvpack.codecs.chain.quantizers.anchor_delta import quantize
from kvpack.codecs.chain.quantizers.lloyd_max import LloydMax
from kvpack.codecs.chain.transforms.rotation import Rotation
from kvpack.formats.source import Capture
from kvpack.numerics.floats import to_float32

pytestmark = pytest.mark.filterwarnings("ignore")


def imported(module: str) -> Any:
    return pytest.importorskip(module, exc_type=ImportError)


def heads(kind: str) -> np.ndarray:
    """``[L * H, T, D]`` of the small capture, without its attention sink."""
    capture = Capture.open(SMALL)
    layers = [to_float32(capture.read(f"layers.{i}.{kind}"), "BF16") for i in (0, 29)]
    return np.ascontiguousarray(np.concatenate(layers)[:, 4:])


def distortion(back: np.ndarray, values: np.ndarray) -> float:
    return float(np.square(back - values).sum() / np.square(values).sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_turboquant_is_no_worse_than_the_package(kind: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's ``turboquant`` splits the Beta distribution into parts of equal probability from 2 bits on, where the
    paper (and kvpack) minimise squared error: equal at 1 bit, worse above."""
    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)  # which turboquant 0.2.0 calls, and numpy 2.4 lacks
    core = imported("turboquant.core")
    values = heads(kind)
    theirs = core.TurboQuantMSE(64, bits=bits, device="cpu")
    with torch.inference_mode():
        rebuilt = theirs.dequantize(*theirs.quantize(torch.from_numpy(values))).numpy()
    part, rotation, quantizer = Part("F32", values.shape, 0, values.shape[1]), Rotation(1), LloydMax(bits, False, 2)
    codes = quantizer.encode(rotation.forward(values, part), part)
    ours = distortion(rotation.inverse(quantizer.decode(codes, part), part), values)
    print(f"{kind} {bits} bits: lloyd_max {ours:.5f}, turboquant {distortion(rebuilt, values):.5f}")
    assert ours <= 1.03 * distortion(rebuilt, values)
    if bits == 1:
        assert ours == pytest.approx(distortion(rebuilt, values), rel=0.05)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_affine_is_transformers_quantized_cache(kind: str, bits: int) -> None:
    """transformers' ``QuantizedCache`` with the backend quanto, groups of 64 along channels."""
    imported("optimum.quanto")
    from transformers.cache_utils import QuantoQuantizedLayer

    values = heads(kind)
    layer = QuantoQuantizedLayer(nbits=bits, axis_key=0, axis_value=0, q_group_size=64, residual_length=1)
    rebuilt = layer._dequantize(layer._quantize(torch.from_numpy(values)[None], axis=0))[0].numpy()
    part = Part("F32", values.shape, 0, values.shape[1])
    quantizer = Affine(bits=bits, axis="channel", group=64)
    ours = distortion(quantizer.decode(quantizer.encode(values, part), part), values)
    print(f"{kind} {bits} bits: affine {ours:.5f}, quanto {distortion(rebuilt, values):.5f}")
    assert ours == pytest.approx(distortion(rebuilt, values), rel=0.01)


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_cachegen_bins_are_lmcaches(kind: str) -> None:
    """The same symbol as from LMCache's own quantiser, but at exact ties (values of bf16 make some)."""
    encoder = imported("lmcache.storage_backend.serde.cachegen_encoder")
    values = heads(kind).reshape(2, 3, 156, 64).transpose(0, 2, 1, 3).reshape(2, 156, 192)
    bins = torch.tensor([32.0, 16.0])
    theirs, _ = encoder.torch_quant_vectorized(bins, torch.from_numpy(values))
    ours, _ = quantize(values, bins.numpy().astype(np.int64) // 2 - 1)
    difference = np.abs(ours.astype(int) - theirs.numpy())
    exact = values / np.abs(values).max(2, keepdims=True) * np.array([15, 7])[:, None, None]
    assert np.abs(np.abs(exact - np.trunc(exact)) - 0.5)[difference > 0].max() < 1e-4
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.005


def test_rans_is_no_larger_than_lmcaches_arithmetic_coder() -> None:
    """The same symbols; LMCache's bytes are its streams and its 16-bit tables a channel, ours the whole stream."""
    kernels = imported("lmcache.v1.platform.torch_ops.cachegen_kernels")
    values = heads("values").reshape(2, 3, 156, 64).transpose(0, 2, 1, 3).reshape(2, 156, 192)
    symbols, _ = quantize(values, np.array([7, 7]))
    tensor = torch.from_numpy(symbols).to(torch.int8)
    tables = kernels.calculate_cdf(tensor, 15)
    streams = torch.zeros((2, 192, 512), dtype=torch.uint8)
    lengths = torch.zeros((2, 192), dtype=torch.int32)
    kernels.encode_fast_new(tables, tensor, streams, lengths)
    spec = PlaneSpec("x", symbols.shape, 4)
    ours = len(Rans().encode(symbols, spec))
    print(f"rans {ours} bytes, lmcache {int(lengths.sum())} of streams and {2 * tables.numel()} of tables")
    assert 0 < int(lengths.sum()) < symbols.size
    assert ours < int(lengths.sum()) + 2 * tables.numel()

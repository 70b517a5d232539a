"""The bounds of ``kvpack bench``: the closed forms they stand for, and that no codec is drawn below them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import write_tensors
from hypothesis import given
from hypothesis import strategies as st

from kvpack.bench.bounds import BOUNDS, SINKS, Bound, ecsq, gaussian, simulate
from kvpack.fidelity import compare
from kvpack.formats.source import Capture
from kvpack.numerics.floats import from_float32


def correlated(seed: int, tokens: int = 20_000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(rng.standard_normal((4, 4)))[0] * np.array([4.0, 2.0, 1.0, 0.25])
    return np.asarray(rng.standard_normal((1, tokens, 4)) @ mix.T + 3, np.float32)


@pytest.mark.parametrize("level", [0.01, 0.1, 0.5])
def test_the_gaussian_bound_is_reverse_water_filling(level: int) -> None:
    """Cover & Thomas, theorem 10.3.3: rate and distortion of a Gaussian vector with known variances."""
    values = correlated(0)
    back, bits = gaussian(values, level, 0)
    variances = np.array([16.0, 4.0, 1.0, 0.0625])
    theta = level * variances.mean()
    rate = np.maximum(0, np.log2(variances / theta) / 2).sum()
    distortion = np.minimum(variances, theta).sum()
    assert bits / values.shape[1] == pytest.approx(rate, abs=0.03)
    assert np.square(back - values).sum(-1).mean() == pytest.approx(distortion, rel=0.03)


def test_ecsq_is_a_quarter_bit_above_the_gaussian_bound_at_high_rate() -> None:
    """log2(2 pi e / 12) / 2 = 0.2546 bits for a scalar Gaussian (Gish & Pierce 1968)."""
    values = np.random.default_rng(1).standard_normal((1, 200_000, 1)).astype(np.float32)
    back, bits = ecsq(values, 0.1)
    distortion = float(np.square(back - values).mean())
    assert distortion == pytest.approx(0.01 / 12, rel=0.01)
    assert bits / values.size - np.log2(1 / distortion) / 2 == pytest.approx(0.2546, abs=0.01)


@given(st.integers(1, 3), st.integers(0, 40), st.integers(1, 6), st.integers(0, 99))
def test_bounds_take_anything(heads: int, tokens: int, dims: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((heads, tokens, dims)).astype(np.float32)
    for some in (values, np.zeros_like(values)):
        for bound in BOUNDS:
            back, bits = bound.simulate(some)
            assert back.shape == some.shape
            assert np.isfinite(back).all()
            assert 0 <= bits < 64 * max(some.size, 1)


def test_simulated_captures_keep_sinks_and_order_by_rate(small: Path) -> None:
    capture = Capture.open(small)
    points = []
    for bound in (Bound("gaussian", 0.3), Bound("gaussian", 0.03), Bound("ecsq", 1.0), Bound("ecsq", 0.25)):
        simulated = simulate(capture, bound)
        for name in ("layers.0.keys", "layers.29.values"):
            assert (simulated.read(name)[:, :SINKS] == capture.read(name)[:, :SINKS]).all()
        assert (simulated.read("tokens") == capture.read("tokens")).all()
        report = compare(capture, simulated)
        points.append((simulated.bits_per_element, report.keys.nmse))
    for coarse, fine in (points[:2], points[2:]):
        assert coarse[0] < fine[0]
        assert coarse[1] > fine[1]


def test_sinks_are_counted_whole(tmp_path: Path) -> None:
    bits = from_float32(np.zeros((1, 8, 4), np.float32), "BF16")
    path = write_tensors(tmp_path / "x", {f"layers.0.{kind}": ("BF16", bits) for kind in ("keys", "values")})
    simulated = simulate(Capture.open(path), Bound("ecsq", 1.0))
    assert simulated.bits_per_element == 16 * SINKS / 8

"""Simulates bounds that no codec of a kind can beat; the model judges them like codecs.

Side information (means, variances, tables and the transform) costs nothing here. Attention sinks are counted
uncompressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from kvpack.codecs.chain.base import Floats
from kvpack.fidelity import CacheReader
from kvpack.formats.records import layer_tensors
from kvpack.formats.safetensors import TensorSpec
from kvpack.numerics.floats import Bits, from_float32, to_float32

SINKS = 4
"""Number of first tokens that are kept exactly; their outliers would dominate every covariance (arXiv 2309.17453)."""

ECSQ_STEPS = (0.25, 0.5, 1.0, 2.0)
GAUSSIAN_LEVELS = (0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Bound:
    """A bound at one setting.

    ``family`` is ``ecsq`` or ``gaussian``. ``setting`` is the step relative to the tensor's standard deviation, or the
    distortion relative to its variance.
    """

    family: str
    setting: float

    @property
    def name(self) -> str:
        """Name of the bound in result rows."""
        return f"{self.family}-{self.setting:g}"

    def simulate(self, values: Floats, seed: int = 0) -> tuple[Floats, float]:
        """Return what a decoder would have of one layer's ``values`` ``[H, T, D]``, and the number of bits it takes."""
        if not values.size:
            return values, 0.0
        if self.family == "ecsq":
            return ecsq(values, self.setting)
        return gaussian(values, self.setting, seed)


BOUNDS = (
    *(Bound("ecsq", step) for step in ECSQ_STEPS),
    *(Bound("gaussian", level) for level in GAUSSIAN_LEVELS),
)


def ecsq(values: Floats, step: float) -> tuple[Floats, float]:
    """Simulate an entropy-coded uniform scalar quantizer; return the decoded values and the number of bits.

    The bits are the empirical entropy of each channel's own codes. All channels of the tensor have the same step,
    ``step`` times the standard deviation around the channels' means. By reverse water-filling, this is the best choice
    for squared error.
    """
    tokens = values.shape[1]
    mean = values.mean(1, keepdims=True)
    centred = values - mean
    width = step * float(np.sqrt(np.square(centred, dtype=np.float64).mean())) or 1.0
    codes = np.rint(centred / width).astype(np.int64)
    bits = 0.0
    for channel in codes.transpose(0, 2, 1).reshape(-1, tokens):
        counts = np.bincount(channel - channel.min())
        share = counts[counts > 0] / tokens
        bits -= tokens * float((share * np.log2(share)).sum())
    return np.asarray(codes * width + mean, np.float32), bits


def gaussian(values: Floats, level: float, seed: int) -> tuple[Floats, float]:
    """Simulate the rate-distortion bound of Gaussian vectors; return the decoded values and the number of bits.

    The vectors have each head's covariance; this is the "per-vector Shannon limit". Reverse water-filling (Cover &
    Thomas, Elements of Information Theory, 10.3.3) has the water level theta, ``level`` times the tensor's mean
    variance. A vector takes the sum of max(0, log2(lambda / theta) / 2) bits. The decoded vectors are drawn from the
    test channel that attains the bound.
    """
    heads, tokens, dims = values.shape
    random = np.random.Generator(np.random.PCG64(seed))
    mean = values.mean(1, keepdims=True, dtype=np.float64)
    centred = values - mean
    theta = level * float(np.square(centred).mean())
    out = np.empty_like(centred)
    bits = 0.0
    for head in range(heads):
        variances, basis = np.linalg.eigh(centred[head].T @ centred[head] / max(tokens, 1))
        gain = np.maximum(0.0, 1 - theta / np.maximum(variances, 1e-300)) if theta else np.ones(dims)
        noise = random.standard_normal((tokens, dims)) * np.sqrt(theta * gain)
        out[head] = (centred[head] @ basis * gain + noise) @ basis.T
        bits -= tokens * float(np.log2(np.maximum(1 - gain, 1e-300))[gain > 0].sum()) / 2 if theta else 0.0
    return np.asarray(out + mean, np.float32), bits


@dataclass(frozen=True)
class Simulated:
    """A capture whose keys and values are replaced by what a bound's decoder would have."""

    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]
    replaced: Mapping[str, Bits]
    original: CacheReader
    bits_per_element: float

    def read(self, name: str, rows: slice | None = None) -> Bits:
        """Return a tensor's bit patterns, or of keys and values those of a range of rows."""
        if name not in self.replaced:
            return self.original.read(name, rows)
        return self.replaced[name] if rows is None else self.replaced[name][:, rows]

    def windows(self) -> Iterator[tuple[int, Mapping[str, Bits]]]:
        """Yield the keys and values of all layers, which are in memory, as one window."""
        if self.replaced:
            yield 0, self.replaced


def simulate(capture: CacheReader, bound: Bound) -> Simulated:
    """Apply ``bound`` to the keys and values of every layer, except the first :data:`SINKS` tokens."""
    replaced: dict[str, Bits] = {}
    bits, elements = 0.0, 0
    for names in layer_tensors(capture).values():
        for name in names.values():
            original, spec = capture.read(name), capture.tensors[name]
            values, cost = bound.simulate(to_float32(original[:, SINKS:], spec.dtype), seed=len(replaced))
            kept = original[:, :SINKS]
            replaced[name] = np.concatenate([kept, from_float32(values, spec.dtype)], axis=1)
            bits += cost + 8 * kept.nbytes
            elements += original.size
    return Simulated(capture.tensors, capture.metadata, replaced, capture, bits / elements)

"""Generates a synthetic profile, and a cache that is distributed accordingly, to measure the shapes of other models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Part
from kvpack.codecs.chain.entropy.scaled_rans.reference import PRECISION
from kvpack.codecs.chain.packed import pack_matrix
from kvpack.codecs.chain.symbols import ALPHABET, LARGEST, split, zigzag
from kvpack.codecs.chain.transforms.token_klt.model import DECAYS, LAGS, PLACES
from kvpack.codecs.recipes import fisher, fisher_log_step

CODEC = fisher(fisher_log_step(4), name="fisher-4")
CLASSES, UNIT_CLASS = 64, 20
"""Number of classes in the synthetic profile, and the class of coefficients whose scatter equals the step."""
ROUNDING = 0.4
"""Rounding offset of the synthetic tables: magnitudes are rounded down after this is added."""
VOCABULARY = 49152
THETA = 500_000.0


@dataclass(frozen=True)
class Shape:
    """Shape of a model's cache and of a profile for it.

    Attributes:
        name: name in the results.
        layers: number of layers.
        heads: number of KV heads.
        dims: head dimension.
        common: number of common directions.
        groups: number of layer groups.
        local: number of directions of each layer group.
        embedded: elements of a token's vector.
        reach: number of those elements from which later tokens are predicted.
        units: number of rectified units of the prediction.

    """

    name: str
    layers: int
    heads: int
    dims: int
    common: int
    groups: int
    local: int
    embedded: int
    reach: int = 192
    units: int = 1024

    @property
    def size(self) -> int:
        """Number of elements per token, P."""
        return 2 * self.layers * self.heads * self.dims

    @property
    def rank(self) -> int:
        """Number of coordinates per token."""
        return self.common + self.groups * self.local


EIGHT_B = Shape("8B shape", 32, 8, 128, 1792, 8, 32, 1024)


def deviations(shape: Shape) -> NDArray[np.float64]:
    """Return the standard deviations of the coordinates, ``[R]``: 64 steps down to a quarter step, even in octaves."""
    quantizer: Any = CODEC.keys.quantizer
    sigma: NDArray[np.float64] = np.exp2(quantizer.log_step / 32 + np.linspace(6, -2, shape.rank))
    return sigma


def tables(rng: np.random.Generator) -> NDArray[np.int32]:
    """Return symbol frequencies ``[K, 63]``, counted on samples of Laplace distributions a quarter octave apart."""
    out = np.empty((CLASSES, ALPHABET), np.int32)
    for k in range(CLASSES):
        scaled = rng.laplace(size=1 << 16) * 2.0 ** ((k + 0.5 - UNIT_CLASS) / 4 - 0.5)
        magnitude = np.minimum(np.floor(np.abs(scaled) + ROUNDING), LARGEST)
        symbols, _, _ = split(zigzag(np.where(scaled < 0, -magnitude, magnitude)))
        counts = np.bincount(symbols, minlength=ALPHABET)
        out[k] = 1 + counts * ((1 << PRECISION) - ALPHABET) // counts.sum()
        out[k, 0] += (1 << PRECISION) - out[k].sum()
    return out


def profile(shape: Shape, device: str) -> dict[str, NDArray[Any]]:
    """Return the arrays of a synthetic profile.

    It has random orthonormal directions, random predictions of half the deviation of their residual, and tables of
    Laplace distributions.
    """
    rng = np.random.default_rng(0)
    sigma = deviations(shape)
    linear: Any = torch.linalg
    basis = linear.qr(torch.randn(shape.size, shape.common, device=device)).Q.cpu().numpy()
    groups = np.arange(shape.layers, dtype=np.int32) * shape.groups // shape.layers
    member = np.tile(np.repeat(groups, shape.size // (2 * shape.layers)), 2)  # This is the group of each element.
    local = np.empty((shape.size, shape.local))
    for group in range(shape.groups):
        mine = np.flatnonzero(member == group)
        local[mine] = linear.qr(torch.randn(len(mine), shape.local, device=device)).Q.cpu().numpy()
    inputs = shape.embedded + (LAGS + len(DECAYS)) * shape.reach + PLACES
    weights = rng.standard_normal((inputs + shape.units, shape.rank)) * sigma / 2 / np.sqrt(inputs + shape.units)
    section: dict[str, NDArray[Any]] = {
        "mean": np.zeros((2, shape.size), np.float16),
        "spread": np.ones(shape.size, np.float32),
        "groups": groups,
        "order": np.arange(VOCABULARY, dtype=np.int32),
        "scale": np.ones(inputs, np.float32),
        "columns": np.rint(32 * np.log2(sigma)).astype(np.int32) + 8 * UNIT_CLASS + 4,
        "tables": tables(rng),
        "centroids": np.zeros((CLASSES, 4), np.float32),
    }
    matrices = {
        "whiten": np.tile(np.eye(shape.dims), (shape.size // shape.dims, 1)),
        "basis": basis,
        "local": local,
        "table": rng.standard_normal((VOCABULARY, shape.embedded)),
        "hidden": rng.standard_normal((inputs, shape.units)) / np.sqrt(inputs),
        "weights": weights,
    }
    for name, matrix in matrices.items():
        step = np.maximum(np.abs(matrix).max(0, keepdims=True) / 127, 1e-30).astype(np.float32)
        section |= {f"{name}.{field}": a for field, a in pack_matrix(matrix.astype(np.float32), step).items()}
    half = shape.dims // 2
    frequencies = (THETA ** -(np.arange(half) / half)).astype(np.float32)
    return {"rope.inv_freq": frequencies, **{f"fisher.{name}": array for name, array in section.items()}}


def cache(shape: Shape, part: Part, device: str) -> torch.Tensor:
    """Return bf16 tensors ``[S, H, T, D]`` whose coordinates scatter as in the profile.

    A little noise outside the profile's directions is added.
    """
    klt: Any = CODEC.keys.transforms[0]
    model, tokens = klt.model(part), part.shape[1]
    sigma = torch.from_numpy(deviations(shape).astype(np.float32)).to(device)
    z = torch.empty(tokens, shape.rank, device=device)
    z.copy_(torch.distributions.Laplace(0.0, 2**-0.5).sample(z.shape).to(device) * sigma)
    z += torch.from_numpy(model.predict(part)).to(device)
    x = z[:, : shape.common] @ torch.from_numpy(model.synthesis).to(device)
    half, at = shape.size // 2, shape.common
    for (a, b), synthesis in zip(model.local.bounds, model.local.synthesis, strict=True):
        keys, values = (z[:, at : at + shape.local] @ torch.from_numpy(synthesis).to(device)).chunk(2, 1)
        at += shape.local
        x[:, a:b] += keys
        x[:, half + a : half + b] += values
    x += x.std() * 0.05 * torch.randn_like(x)
    tensors = x.view(tokens, 2 * shape.layers, shape.heads, shape.dims).permute(1, 2, 0, 3).contiguous()
    del x, z
    steps = torch.from_numpy(model.frequencies.astype(np.float64)).to(device)
    angles = torch.arange(tokens, device=device)[:, None] * steps
    cosines, sines = angles.cos().float(), angles.sin().float()
    for keys in tensors[: shape.layers]:
        keys.copy_(turned(keys, cosines, sines))
    return tensors.bfloat16()


def turned(keys: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Return keys ``[..., D]`` whose pairs (i, i + D / 2) are rotated, as by RoPE.

    The angles have the ``cosines`` and ``sines`` ``[..., D / 2]``.
    """
    left, right = keys.chunk(2, -1)
    return torch.cat([left * cosines - right * sines, right * cosines + left * sines], -1)

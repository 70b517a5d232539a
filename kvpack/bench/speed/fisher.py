"""``fisher`` from device to device, on a made profile and a cache that scatters as it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.bench.speed.timing import Speed, Timed, by_kernel, seconds, speed
from kvpack.codecs import CODECS
from kvpack.device.joint import Compressed, Joint
from kvpack.stages.base import Part, Side
from kvpack.stages.device.tensors import product
from kvpack.stages.entropy.scaled_rans.reference import PRECISION
from kvpack.stages.packed import pack_matrix
from kvpack.stages.symbols import ALPHABET, LARGEST, split, zigzag
from kvpack.stages.transforms.token_klt.model import DECAYS, LAGS, PLACES

CODEC = CODECS["fisher-4"]
CLASSES, UNIT_CLASS = 64, 20
"""Classes of the made profile, and the one of a scatter as wide as the step."""
ROUNDING = 0.4
"""Magnitudes that the made tables count are rounded down after adding it."""
CHUNK = 2048
VOCABULARY = 49152
THETA = 500_000.0


@dataclass(frozen=True)
class Shape:
    """A model's cache and a profile: ``common`` directions and ``local`` ones of each of ``groups`` groups of layers,
    ``embedded`` elements of a token's vector, ``reach`` of which tell of others, ``units`` of the prediction.
    """  # fmt: skip

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
        """P."""
        return 2 * self.layers * self.heads * self.dims

    @property
    def rank(self) -> int:
        """Coordinates a token."""
        return self.common + self.groups * self.local


SHAPES = (Shape("8B shape", 32, 8, 128, 1792, 8, 32, 1024), Shape("SmolLM2 shape", 30, 3, 64, 960, 6, 448, 576))


def deviations(shape: Shape) -> NDArray[np.float64]:
    """Of the coordinates ``[R]``: from 64 steps down to a quarter of one, evenly in octaves."""
    quantizer: Any = CODEC.keys.quantizer
    sigma: NDArray[np.float64] = np.exp2(quantizer.log_step / 32 + np.linspace(6, -2, shape.rank))
    return sigma


def tables(rng: np.random.Generator) -> NDArray[np.int32]:
    """Frequencies ``[K, 63]`` of the symbols of Laplace's distribution, counted, a quarter of an octave a class."""
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
    """Random orthonormal directions, random predictions half as large as what they leave, Laplace's tables."""
    rng = np.random.default_rng(0)
    sigma = deviations(shape)
    linear: Any = torch.linalg
    basis = linear.qr(torch.randn(shape.size, shape.common, device=device)).Q.cpu().numpy()
    groups = np.arange(shape.layers, dtype=np.int32) * shape.groups // shape.layers
    member = np.tile(np.repeat(groups, shape.size // (2 * shape.layers)), 2)  # of each element
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
    """bf16 tensors ``[S, H, T, D]``: coordinates scatter as the profile says, and a little beside its directions."""
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
        left, right = keys.chunk(2, -1)
        keys.copy_(torch.cat([left * cosines - right * sines, right * cosines + left * sines], -1))
    return tensors.bfloat16()


def rows(gpu: Timed, shape: Shape, nbytes: int) -> Iterator[Speed]:
    """Compress and decompress of at least ``nbytes``, in chunks of 2,048 tokens, whole and kernel by kernel."""
    units = max(1, nbytes // (2 * shape.size * CHUNK))
    tokens, tensors = units * CHUNK, 2 * shape.layers
    ids = np.random.default_rng(1).integers(0, VOCABULARY, tokens).astype(np.int32)
    whole = (tensors * shape.heads, tokens, shape.dims)
    part = Part("BF16", whole, 0, tokens, shape.heads, profile=profile(shape, gpu.device), side=Side(ids))
    given, joint = cache(shape, part, gpu.device), Joint(gpu, CODEC.keys, part)
    out = torch.full_like(given, float("nan"))
    places = torch.arange(tensors, device=gpu.device) * given[0].numel() * 2
    offsets = places[None] + torch.arange(units, device=gpu.device)[:, None] * (2 * CHUNK * shape.dims)
    one, stride, levels = (shape.heads, CHUNK, shape.dims), tokens * shape.dims, joint.levels(0, units, CHUNK)

    def compress() -> Compressed:
        return joint.compress(offsets + given.data_ptr(), one, stride, 0, levels)

    done = compress()
    coded, shifts, size = done.coded, done.shifts.cpu().numpy(), 2 * given.numel()
    arena = torch.cat([coded.arena[: int(coded.places[-1])], coded.arena.new_zeros(4 * CHUNK * shape.rank)])
    streams, groups = coded.places[:-1] + arena.data_ptr(), CHUNK * shape.rank * 14 // 8 // 12288 + 2

    def decompress() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return joint.decompress(streams, coded.sizes, groups, offsets + out.data_ptr(), one, stride, 0, levels, shifts)

    unsound, sums, odd = decompress()
    error = float((out - given).float().square().mean() / given.float().square().mean())
    if done.faults.any() or unsound.any() or odd.any() or not torch.equal(sums, coded.checksums) or not error < 0.02:
        raise RuntimeError(f"{shape.name}: what comes back is not near what went in ({error})")
    label = f"{shape.name}, {units} x {CHUNK}, R {shape.rank}"
    bits = 8 * int(coded.sizes.sum()) / given.numel()
    yield speed("fisher compress", label, size, seconds(compress), f"{bits:.4f} bits an element, error {error:.4f}")
    yield speed("fisher decompress", label, size, seconds(decompress))
    for way, function in (("compress", compress), ("decompress", decompress)):
        for kernel, times in by_kernel(gpu, function).items():
            yield speed(f"  {way}: {kernel}", label, size, times, f"{median(times) * 1e6:.0f} us")
    yield from _products(joint, tokens, label, size)


def _products(joint: Joint, tokens: int, label: str, size: int) -> Iterator[Speed]:
    """The matrix products alone."""
    m = joint.matrices
    told, width, windows = m.told.shape[0], m.prediction.width, m.groups[-1].window.stop
    stack, coordinates = (torch.randn(tokens, n, device=m.means.device).half() for n in (m.size + told, windows))
    inputs, rows = stack[:, m.size : m.size + width].contiguous(), stack[:, : m.size].contiguous()
    z = torch.empty(tokens, m.rank, device=m.means.device)

    def analyse() -> None:
        product(z[:, : m.shared], stack[:, : len(m.common)], m.common)
        product(z[:, m.shared :], stack[:, m.size :], m.told)
        for group in m.groups:
            product(z[:, group.own], stack[:, group.columns], group.analysis, add=True)

    def predict() -> None:
        product(inputs[:, m.prediction.inputs :], inputs[:, : m.prediction.inputs], m.prediction.hidden)
        product(z, inputs, m.prediction.weights)

    def synthesise() -> None:
        for group in m.groups:
            product(rows[:, group.columns], coordinates[:, group.window], group.synthesis, scale=2.0**-20)

    analysis = m.common.numel() + m.told.numel() + sum(group.analysis.numel() for group in m.groups)
    for name, function, entries in (
        ("compress: project", analyse, analysis),
        ("decompress: predict", predict, m.prediction.hidden.numel() + m.prediction.weights.numel()),
        ("decompress: synthesis", synthesise, sum(group.synthesis.numel() for group in m.groups)),
    ):
        times = seconds(function)
        middle, flops = median(times), 2 * tokens * entries
        yield speed(f"  {name}", label, size, times, f"{middle * 1e6:.0f} us, {flops / middle / 1e12:.0f} TFLOP/s")

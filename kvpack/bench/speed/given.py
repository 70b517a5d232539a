"""Provides long captures in device memory for the speed bench: a repeated real one, or a synthetic one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.bench.speed import made as making
from kvpack.bench.speed.made import CODEC, Shape
from kvpack.bench.speed.timing import Timed
from kvpack.codecs.chain import pipeline
from kvpack.codecs.chain.base import Part
from kvpack.codecs.context import DecodeContext, StackHints
from kvpack.errors import UsageError
from kvpack.formats.captures import layer_of
from kvpack.formats.records import attention_mass, token_ids
from kvpack.formats.safetensors import build_header
from kvpack.formats.sink import as_bytes
from kvpack.formats.source import Capture
from kvpack.gpu.kernels.token_klt import SPAN
from kvpack.jobs.reader import KvpFile
from kvpack.numerics.floats import to_float32
from kvpack.profiles import Profile

CHUNK = 2048


@dataclass(frozen=True)
class Given:
    """A long capture in device memory, bf16 ``[S, H, T, D]``; ``chunk`` tokens are coded at a time.
    ``mass`` ``[T]`` is the attention mass of its tokens, if known.

    The squared error after decompression, relative to the squares of the original, must be below ``worst``.
    """

    name: str
    part: Part
    tensors: torch.Tensor
    chunk: int
    worst: float
    mass: NDArray[np.float32] | None = None
    names: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it to ``path`` as a capture."""
        tokens = self.part.context.tokens
        assert tokens is not None
        entries = [(name, "BF16", tuple(self.tensors.shape[1:])) for name in self.names]
        header = build_header([*entries, ("tokens", "I32", tokens.shape)], self.metadata)
        with path.open("wb") as sink:
            sink.write(len(header.raw).to_bytes(8, "little") + header.raw)
            for tensor in self.tensors:
                sink.write(as_bytes(tensor.view(torch.int16).cpu().numpy()))
            sink.write(as_bytes(tokens.view(np.uint32)))


def made(gpu: Timed, shape: Shape, nbytes: int) -> Given:
    """Return a synthetic cache of about ``nbytes`` bytes, a multiple of :data:`CHUNK` tokens."""
    tokens = max(1, nbytes // (2 * shape.size * CHUNK)) * CHUNK
    ids = np.random.default_rng(1).integers(0, making.VOCABULARY, tokens).astype(np.int32)
    whole = (2 * shape.layers * shape.heads, tokens, shape.dims)
    profile = making.profile(shape, gpu.device)
    part = Part("BF16", whole, 0, tokens, shape.heads, context=DecodeContext(profile, ids))
    return Given(shape.name, part, making.cache(shape, part, gpu.device), CHUNK, 0.02)


def real(gpu: Timed, source: Capture | KvpFile, profile: Profile, nbytes: int) -> Given:
    """Return the keys and values of a capture, repeated to at least ``nbytes`` bytes.

    Keys of each copy are rotated to their new positions. ``worst`` is 1.01 times the CPU's error on the first copy.
    """
    profile.require_model(source.metadata)
    layers = sorted({layer for spec in source.tensors.values() if (layer := layer_of(spec)) is not None})
    names = [f"layers.{layer}.{kind}" for kind in ("keys", "values") for layer in layers]
    ids, mass = token_ids(source), attention_mass(source)
    if ids is None or any(source.tensors[name].dtype != "BF16" for name in names):
        raise UsageError("--speed with a profile wants a capture in bf16 that has its tokens")
    tokens = min(CHUNK, source.tensors[names[0]].shape[1]) // SPAN * SPAN
    bits = np.stack([source.read(name)[:, :tokens] for name in names])
    tensors, heads, _, dims = bits.shape
    shape = (tensors * heads, tokens, dims)
    part = Part("BF16", shape, 0, tokens, heads, context=DecodeContext(profile, ids[:tokens]))
    copies = -(-nbytes // bits.nbytes)
    device = torch.from_numpy(bits.view(np.int16)).to(gpu.device).view(torch.bfloat16)
    context = DecodeContext(profile, np.tile(ids[:tokens], copies))
    whole = replace(part, shape=(shape[0], copies * tokens, dims), length=copies * tokens, context=context)
    masses = None if mass is None else np.tile(mass[:tokens], copies)
    hints = StackHints(None if mass is None else mass[:tokens])
    worst = 1.01 * error_of(bits.reshape(shape), part, hints)
    turned = turned_on(device, part, copies)
    return Given("capture", whole, turned, tokens, worst, masses, tuple(names), source.metadata)


def error_of(bits: NDArray[np.uint16], part: Part, hints: StackHints) -> float:
    """Return the CPU's squared error for a part, relative to the squares of its elements."""
    streams, _ = pipeline.encode(CODEC.keys, bits, part, hints)
    back, _ = pipeline.decode(CODEC.keys, [(name, memoryview(data)) for name, data in streams], part)
    before, after = (to_float32(array, "BF16") for array in (bits, back))
    return float(np.square(after - before).sum() / np.square(before).sum())


def turned_on(tensors: torch.Tensor, part: Part, copies: int) -> torch.Tensor:
    """Return tensors ``[S, H, T, D]`` repeated to ``[S, H, copies * T, D]``.

    Keys, the first half, are rotated by RoPE to their new positions.
    """
    klt: Any = CODEC.keys.transforms[0]
    steps = torch.from_numpy(klt.model(part).frequencies.astype(np.float64)).to(tensors.device)
    out = tensors.repeat(1, 1, copies, 1)
    tokens, half = tensors.shape[2], len(tensors) // 2
    keys = tensors[:half].float()
    for copy in range(1, copies):
        angles = copy * tokens * steps
        cosines, sines = angles.cos().float(), angles.sin().float()
        out[:half, :, copy * tokens : (copy + 1) * tokens] = making.turned(keys, cosines, sines).bfloat16()
    return out

"""``token_klt`` on a GPU: bf16 tensors to coordinates and back, matrices multiplied as halves with float32 sums.

Halves have 11 bits where the cache itself has 8, so their rounding is lost in the cache's own; bf16 would add as much
as the cache has (``docs/performance.md`` measures both). Powers of two bring matrices into the halves' range.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.stages.device.launch import Launcher
from kvpack.stages.device.tensors import product, scaled_product, sent
from kvpack.stages.transforms.token_klt.model import DECAYS, LAGS, PLACES, TokenModel

Tensor = torch.Tensor

SPAN = 64
"""Tokens whose sums ``inputs.cu`` takes at once."""

LARGEST = 10
"""A matrix' largest entry is brought near ``2**10``: entries ``2**-24`` times as large still have 11 bits."""

_FOLDER = "transforms/token_klt"


def supports(shape: tuple[int, int, int], frequencies: int) -> bool:
    """Whether the kernels take tensors ``[H, T, D]`` whose keys are turned in so many pairs: all of D, or none."""
    return shape[2] % 16 == 0 and frequencies in (0, shape[2] // 2)


def _exponent(*matrices: Tensor) -> int:
    """``e`` such that the largest entry times ``2**e`` is near ``2**LARGEST``."""
    most = max(float(matrix.abs().max()) if matrix.numel() else 0.0 for matrix in matrices)
    return LARGEST - ceil(log2(most)) if most > 0 else 0


@dataclass(frozen=True)
class Matrices:
    """A :class:`TokenModel` in device memory, of P elements, R coordinates, I inputs (a multiple of 8, the last zero).

    Halves: ``analysis`` ``[P + I, R]`` (of elements and, negative, of inputs) times ``2**analysis_exponent``;
    ``synthesis`` ``[R, P]`` and ``weights`` ``[I, R]`` with theirs; ``vectors`` ``[V, E]``. Float32: ``means``
    ``[S + 1, P]``, ``decays``.
    """

    analysis: Tensor
    synthesis: Tensor
    weights: Tensor
    vectors: Tensor
    means: Tensor
    decays: Tensor
    frequencies: NDArray[np.float32]
    reach: int
    analysis_exponent: int
    synthesis_exponent: int
    weights_exponent: int

    @classmethod
    def of(cls, model: TokenModel, device: str) -> Matrices:
        """Send and round a model."""

        def halves(matrix: Tensor, exponent: int) -> Tensor:
            return (matrix * 2.0**exponent).half()

        arrays = (model.analysis, model.synthesis, model.weights, model.table, model.mean)
        analysis, synthesis, weights, vectors, means = (sent(array, device).float() for array in arrays)
        reach = (len(weights) - PLACES - vectors.shape[1]) // (LAGS + len(DECAYS))
        small = -ceil(log2(max(float(vectors.abs().max()), 1e-30)))
        weights[: len(weights) - PLACES] *= 2.0**-small
        padding = torch.zeros(-len(weights) % 8, weights.shape[1], device=device)
        weights = torch.cat([weights, padding])
        both, out = _exponent(analysis, weights), _exponent(synthesis)
        own = _exponent(weights)
        return cls(
            torch.cat([halves(analysis, both), halves(-weights, both)]),
            halves(synthesis, out),
            halves(weights, own),
            halves(vectors, small),
            means,
            torch.tensor(DECAYS, dtype=torch.float32, device=device),
            model.frequencies,
            reach,
            both,
            out,
            own,
        )

    @property
    def size(self) -> int:
        """P."""
        return self.means.shape[1]

    @property
    def rank(self) -> int:
        """R."""
        return self.synthesis.shape[0]

    @property
    def sinks(self) -> int:
        """S."""
        return len(self.means) - 1

    @property
    def inputs(self) -> int:
        """I."""
        return len(self.weights)


@dataclass(frozen=True)
class Tokens:
    """A capture's token ids int32 ``[N]``, and sums of their vectors for ``inputs.cu``."""

    ids: Tensor
    sums: Tensor

    @classmethod
    def of(cls, gpu: Launcher, matrices: Matrices, ids: NDArray[np.int32]) -> Tokens:
        """Ids that the model has."""
        given = sent(ids, gpu.device)
        spans = -(-len(ids) // SPAN)
        sums = torch.empty(spans, len(DECAYS), matrices.reach, dtype=torch.float32, device=gpu.device)
        gpu.launch(f"{_FOLDER}/inputs:tally", {}, (spans, 1), 256, 0, matrices.vectors, given, len(ids),
                   matrices.vectors.shape[1], matrices.reach, matrices.decays, sums)  # fmt: skip
        return cls(given, sums)

    def inputs(self, gpu: Launcher, matrices: Matrices, first: int, out: Tensor) -> None:
        """Into ``out`` ``[T, I]``, rows of which may lie apart: what tokens from ``first`` on are predicted from."""
        width, count = matrices.vectors.shape[1], len(out)
        gpu.launch(f"{_FOLDER}/inputs:inputs", {}, (-(-count // SPAN), 1), 256, 0, matrices.vectors, self.ids, width,
                   matrices.reach, matrices.decays, self.sums, first, count, matrices.sinks, out, out.stride(0),
                   matrices.inputs)  # fmt: skip


@dataclass(frozen=True)
class Stacks:
    """Units of one shape: the tensors ``[H, T, D]`` of all layers, keys before values, bf16 in device memory.

    ``addresses`` int64 ``[U, S]``, 16 bytes aligned; heads lie ``head_stride`` elements apart. Unit u's first token
    stands at ``first + u * T``. ``cosines`` and ``sines`` ``[positions, D / 2]`` turn keys.
    """

    addresses: Tensor
    shape: tuple[int, int, int]
    head_stride: int
    first: int
    cosines: Tensor
    sines: Tensor

    @property
    def tokens(self) -> int:
        """Of all units."""
        return len(self.addresses) * self.shape[1]

    def launch(self, gpu: Launcher, name: str, before: tuple[Tensor, ...], *after: Tensor | int) -> None:
        """Run a kernel of ``rows.cu``."""
        heads, tokens, dims = self.shape
        units, tensors = self.addresses.shape
        firsts = torch.arange(units, device=gpu.device) * tokens + self.first
        tile = 256 // (dims // 16)
        defines = {"DIMS": dims, "TURNED": int(self.cosines.shape[1] > 0)}
        gpu.launch(f"{_FOLDER}/rows:{name}", defines, (-(-tokens // tile), units * tensors), 256, 0, *before,
                   self.addresses, self.head_stride, heads, tokens, tensors, firsts, self.cosines, self.sines,
                   *after)  # fmt: skip


def turns(frequencies: NDArray[np.float32], positions: int, device: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 ``[positions, pairs]``, of angles in float64 as on the CPU."""
    steps = sent(frequencies, device).double()
    angles = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * steps
    return angles.cos().float(), angles.sin().float()


def forward(
    gpu: Launcher, matrices: Matrices, stacks: Stacks, tokens: Tokens | None, faults: Tensor
) -> tuple[Tensor, Tensor]:
    """Coordinates float32 ``[U * T, R]`` times ``2**analysis_exponent``; digests int64 ``[U, S]`` of the originals.

    ``faults`` int32 ``[U]`` are set where a value is not finite.
    """
    units, tensors = stacks.addresses.shape
    heads, count, dims = stacks.shape
    inputs = matrices.inputs if tokens is not None else 0
    rows = torch.empty(stacks.tokens, matrices.size + inputs, dtype=torch.float16, device=gpu.device)
    nbytes = 2 * heads * count * dims
    digests = torch.full((units, tensors), nbytes, dtype=torch.int64, device=gpu.device)
    stacks.launch(gpu, "gather", (), matrices.means[matrices.sinks], rows, rows.shape[1], digests, faults)
    if tokens is not None:
        tokens.inputs(gpu, matrices, stacks.first, rows[:, matrices.size :])
    z = product(rows, matrices.analysis[: rows.shape[1]])
    z[: max(matrices.sinks - stacks.first, 0)] = 0
    return z, digests


def predict(gpu: Launcher, matrices: Matrices, tokens: Tokens, first: int, count: int) -> Tensor:
    """Expected coordinates float32 ``[count, R]`` times ``2**weights_exponent``, from position ``first`` on."""
    rows = torch.empty(count, matrices.inputs, dtype=torch.float16, device=gpu.device)
    tokens.inputs(gpu, matrices, first, rows)
    return product(rows, matrices.weights)


def inverse(gpu: Launcher, matrices: Matrices, z: Tensor, exponent: int, stacks: Stacks, faults: Tensor) -> None:
    """Coordinates times ``2**exponent`` (halves ``[U * T, R]``, with their prediction) into the stacks' tensors.

    ``faults`` int32 ``[U]`` are set where what comes out is not finite.
    """
    rows = scaled_product(z, matrices.synthesis, 2.0 ** -(exponent + matrices.synthesis_exponent))
    stacks.launch(gpu, "scatter", (rows,), matrices.means, matrices.sinks, faults)

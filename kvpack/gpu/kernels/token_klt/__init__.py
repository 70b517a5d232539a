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

from kvpack.codecs.chain.base import Floats
from kvpack.codecs.chain.transforms.token_klt.model import DECAYS, LAGS, PLACES, Predictor, TokenModel
from kvpack.gpu.kernels.constants import TOKEN_KLT
from kvpack.gpu.runtime.launch import Launcher
from kvpack.gpu.runtime.tensors import product, sent

Tensor = torch.Tensor

SPAN, THREADS = TOKEN_KLT["SPAN"], TOKEN_KLT["THREADS"]
"""Tokens whose sums a block of ``inputs.cu`` takes at once, and threads of every block."""

LARGEST = 10
"""A matrix' largest entry is brought near ``2**10``: entries ``2**-24`` times as large still have 11 bits."""

_FOLDER = "token_klt"


def supports(shape: tuple[int, int, int], model: TokenModel) -> bool:
    """Whether the kernels take tensors ``[H, T, D]``: keys are turned in all of D or not, groups are whole tensors."""
    heads, _, dims = shape
    whole = all(a % (heads * dims) == 0 for a, _ in model.local.bounds)
    return dims % 16 == 0 and len(model.frequencies) in (0, dims // 2) and whole


def _exponent(*matrices: Tensor) -> int:
    """``e`` such that the largest entry times ``2**e`` is near ``2**LARGEST``."""
    most = max(float(matrix.abs().max()) if matrix.numel() else 0.0 for matrix in matrices)
    return LARGEST - ceil(log2(most)) if most > 0 else 0


def _halves(matrix: Tensor, exponent: int) -> Tensor:
    return (matrix * 2.0**exponent).half()


@dataclass(frozen=True)
class Group:
    """Directions of a group of layers, whose elements are ``columns`` of rows, its own coordinates ``own`` of all.

    Halves, ``analysis`` ``[2 * n, C]``, whose columns are contiguous (cuBLAS is twice as fast then), and ``synthesis``
    ``[R + C, 2 * n]`` of a ``window`` of what is decoded: the common coordinates and, behind them, its own.
    """

    columns: slice
    own: slice
    window: slice
    analysis: Tensor
    synthesis: Tensor


@dataclass(frozen=True)
class Prediction:
    """In device memory, I inputs and H units (multiples of 8, the last ones zero).

    Halves: ``vectors`` ``[V, E]``; ``hidden`` ``[I, H]`` times ``2**hidden_exponent``, so that inputs give units
    times that, which are then brought to ``2**units_exponent``; ``weights`` ``[I + H, R + G * C]`` of both times
    ``2**weights_exponent``. Float32: ``decays``.
    """

    vectors: Tensor
    hidden: Tensor
    weights: Tensor
    decays: Tensor
    reach: int
    hidden_exponent: int
    units_exponent: int
    weights_exponent: int

    @classmethod
    def of(cls, gpu: Launcher, given: Predictor) -> tuple[Prediction, Tensor]:
        """Send and round one; the weights float32 too, as they are before they are rounded."""
        vectors, scale, hidden, weights = (
            sent(a, gpu.device).float() for a in (given.table, given.scale, given.hidden, given.weights)
        )
        own, count = vectors.shape[1], len(scale)
        reach = (count - PLACES - own) // (LAGS + len(DECAYS))
        small = -ceil(log2(max(float(vectors.abs().max()), 1e-30)))
        factor = 1 / scale
        factor[: count - PLACES] *= 2.0**-small

        def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
            return torch.nn.functional.pad(matrix, (0, columns, 0, rows))

        hidden = padded(hidden * factor[:, None], -count % 8, -hidden.shape[1] % 8)
        weights = torch.cat(
            [
                padded(weights[:count] * factor[:, None], -count % 8, 0),
                padded(weights[count:], -(len(weights) - count) % 8, 0),
            ]
        )
        most = float(hidden.abs().sum(0).max()) if hidden.numel() else 0.0  # inputs are no larger than 1
        units = 15 - ceil(log2(max(most, 1e-30)))
        weights[len(hidden) :] *= 2.0**-units
        first, second = _exponent(hidden), _exponent(weights)
        decays = torch.tensor(DECAYS, dtype=torch.float32, device=gpu.device)
        rounded = _halves(vectors, small), _halves(hidden, first), _halves(weights, second)
        return cls(*rounded, decays, reach, first, units, second), weights

    @property
    def inputs(self) -> int:
        """I."""
        return len(self.hidden)

    @property
    def width(self) -> int:
        """I + H."""
        return len(self.weights)


@dataclass(frozen=True)
class Matrices:
    """A :class:`TokenModel` in device memory, of P elements, R common and G * C local coordinates.

    Rows hold a group's keys and values side by side: ``places`` int64 ``[P]`` says where an element stands. Float32
    ``means`` ``[S + 1, P]`` in that order. Halves: ``common`` ``[P + I + H, R]`` (of elements and, negative, of inputs
    and units) and the groups' analysis times ``2**analysis_exponent``; ``told`` ``[I + H + R, G * C]``, negative, what
    inputs, units and common coordinates times ``2**exponent`` have told of the local ones; the groups' synthesis times
    ``2**synthesis_exponent``.
    """

    prediction: Prediction
    groups: tuple[Group, ...]
    places: Tensor
    means: Tensor
    common: Tensor
    told: Tensor
    frequencies: NDArray[np.float32]
    exponent: int
    analysis_exponent: int
    synthesis_exponent: int

    @classmethod
    def of(cls, gpu: Launcher, model: TokenModel, exponent: int) -> Matrices:
        """Send and round a model whose coordinates, times ``2**exponent``, are within the halves' range."""

        def to(array: Floats) -> Tensor:
            return sent(array, gpu.device).float()

        prediction, weights = Prediction.of(gpu, model.predictor)
        half, common = model.mean.shape[1] // 2, model.analysis.shape[1]
        order = np.concatenate([np.r_[a:b, half + a : half + b] for a, b in model.local.bounds])
        ordered, places = (sent(a, gpu.device) for a in (order, np.argsort(order)))
        analysis, synthesis = to(model.analysis)[ordered], to(model.synthesis)[:, ordered]
        cross = to(model.local.cross)
        # local coordinates are x @ own - (x @ analysis) @ cross - p, with p their prediction and q that of the common:
        # x @ own - (x @ analysis - q) @ cross - (p + q @ cross)
        told = -torch.cat([weights[:, common:] + weights[:, :common] @ cross, cross * 2.0**-exponent])
        both = torch.cat([analysis, -weights[:, :common]])
        own, back = ([to(array) for array in arrays] for arrays in (model.local.analysis, model.local.synthesis))
        into, out = _exponent(both, told, *own), _exponent(synthesis, *back)
        groups = []
        for index, ((a, b), one, other) in enumerate(zip(model.local.bounds, own, back, strict=True)):
            columns, width = slice(2 * a, 2 * b), one.shape[1]
            mine = slice(common + index * width, common + (index + 1) * width)
            window = slice(index * (common + width), (index + 1) * (common + width))
            back_again = torch.cat([synthesis[:, columns], other])
            groups.append(
                Group(columns, mine, window, _halves(one, into).t().contiguous().t(), _halves(back_again, out))
            )
        return cls(
            prediction,
            tuple(groups),
            places,
            to(model.mean)[:, ordered],
            _halves(both, into),
            _halves(told, into),
            model.frequencies,
            exponent,
            into,
            out,
        )

    @property
    def size(self) -> int:
        """P."""
        return self.means.shape[1]

    @property
    def shared(self) -> int:
        """R."""
        return self.common.shape[1]

    @property
    def rank(self) -> int:
        """R + G * C."""
        return self.shared + self.told.shape[1]

    @property
    def sinks(self) -> int:
        """S."""
        return len(self.means) - 1


@dataclass(frozen=True)
class Tokens:
    """A capture's token ids int32 ``[N]``, and sums of their vectors for ``inputs.cu``."""

    ids: Tensor
    sums: Tensor

    @classmethod
    def of(cls, gpu: Launcher, prediction: Prediction, ids: NDArray[np.int32]) -> Tokens:
        """Ids that the model has."""
        given = sent(ids, gpu.device)
        spans = -(-len(ids) // SPAN)
        sums = torch.empty(spans, len(DECAYS), prediction.reach, dtype=torch.float32, device=gpu.device)
        gpu.launch(f"{_FOLDER}/inputs:tally", {}, (spans, 1), THREADS, 0, prediction.vectors, given, len(ids),
                   prediction.vectors.shape[1], prediction.reach, prediction.decays, sums)  # fmt: skip
        return cls(given, sums)

    def inputs(self, gpu: Launcher, matrices: Matrices, first: int, out: Tensor) -> None:
        """Into ``out`` ``[T, I + H]``, rows of which may lie apart: inputs and units of tokens from ``first`` on."""
        its, count = matrices.prediction, len(out)
        gpu.launch(f"{_FOLDER}/inputs:inputs", {}, (-(-count // SPAN), 1), THREADS, 0, its.vectors, self.ids,
                   its.vectors.shape[1], its.reach, its.decays, self.sums, first, count, matrices.sinks, out,
                   out.stride(0), its.inputs)  # fmt: skip
        units = out[:, its.inputs :]
        product(units, out[:, : its.inputs], its.hidden, scale=2.0 ** (its.units_exponent - its.hidden_exponent))
        width = units.shape[1]
        gpu.launch(f"{_FOLDER}/inputs:rectify", {}, (-(-count * width // 8 // THREADS), 1), THREADS, 0, units, count,
                   units.stride(0), width)  # fmt: skip


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

    def launch(
        self, gpu: Launcher, name: str, matrices: Matrices, before: tuple[Tensor, ...], *after: Tensor | int
    ) -> None:
        """Run a kernel of ``rows.cu``."""
        heads, tokens, dims = self.shape
        units, tensors = self.addresses.shape
        firsts = torch.arange(units, device=gpu.device) * tokens + self.first
        tile = THREADS // (dims // 16)
        defines = {"DIMS": dims, "TURNED": int(self.cosines.shape[1] > 0)}
        gpu.launch(f"{_FOLDER}/rows:{name}", defines, (-(-tokens // tile), units * tensors), THREADS, 0, *before,
                   self.addresses, self.head_stride, heads, tokens, tensors, firsts, self.cosines, self.sines,
                   matrices.places, *after)  # fmt: skip


def turns(frequencies: NDArray[np.float32], positions: int, device: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 ``[positions, pairs]``, of angles in float64 as on the CPU."""
    steps = sent(frequencies, device).double()
    angles = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * steps
    return angles.cos().float(), angles.sin().float()


def forward(
    gpu: Launcher, matrices: Matrices, stacks: Stacks, tokens: Tokens | None, faults: Tensor
) -> tuple[Tensor, Tensor]:
    """Coordinates float32 ``[U * T, R + G * C]`` times ``2**analysis_exponent``; digests int64 ``[U, S]`` of originals.

    ``faults`` int32 ``[U]`` are set where a value is not finite.
    """
    units, tensors = stacks.addresses.shape
    heads, count, dims = stacks.shape
    size, shared = matrices.size, matrices.shared
    width = matrices.prediction.width if tokens is not None else 0
    stride = size + width + -(-shared // 8) * 8
    rows = torch.empty(stacks.tokens, stride, dtype=torch.float16, device=gpu.device)
    nbytes = 2 * heads * count * dims
    digests = torch.full((units, tensors), nbytes, dtype=torch.int64, device=gpu.device)
    stacks.launch(gpu, "gather", matrices, (), matrices.means[matrices.sinks], rows, stride, digests, faults)
    if tokens is not None:
        tokens.inputs(gpu, matrices, stacks.first, rows[:, size : size + width])
    z = torch.empty(stacks.tokens, matrices.rank, dtype=torch.float32, device=gpu.device)
    common, local = z[:, :shared], z[:, shared:]
    product(common, rows[:, : size + width], matrices.common[: size + width])
    held = rows[:, size + width : size + width + shared]
    torch.mul(common, 2.0 ** (matrices.exponent - matrices.analysis_exponent), out=held)
    product(local, rows[:, size : size + width + shared], matrices.told[-(width + shared) :])
    for group in matrices.groups:
        product(z[:, group.own], rows[:, group.columns], group.analysis, add=True)
    z[: max(matrices.sinks - stacks.first, 0)] = 0
    return z, digests


def predict(gpu: Launcher, matrices: Matrices, tokens: Tokens, first: int, count: int) -> Tensor:
    """Expected coordinates float32 ``[count, R + G * C]`` times ``2**weights_exponent``, from position ``first`` on."""
    weights = matrices.prediction.weights
    rows = torch.empty(count, len(weights), dtype=torch.float16, device=gpu.device)
    tokens.inputs(gpu, matrices, first, rows)
    expected = torch.empty(count, matrices.rank, dtype=torch.float32, device=gpu.device)
    product(expected, rows, weights)
    return expected


def inverse(gpu: Launcher, matrices: Matrices, z: Tensor, stacks: Stacks, faults: Tensor) -> None:
    """Coordinates into the stacks' tensors: halves times ``2**exponent``, ``[U * T, G * (R + C)]``, predictions added.

    A row has the common ones and its own for each group. ``faults`` int32 ``[U]`` are set where what comes out is not
    finite.
    """
    rows = torch.empty(stacks.tokens, matrices.size, dtype=torch.float16, device=gpu.device)
    for group in matrices.groups:
        scale = 2.0 ** -(matrices.exponent + matrices.synthesis_exponent)
        product(rows[:, group.columns], z[:, group.window], group.synthesis, scale=scale)
    stacks.launch(gpu, "scatter", matrices, (rows,), matrices.means, matrices.sinks, faults)

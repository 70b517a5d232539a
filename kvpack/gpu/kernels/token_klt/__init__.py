"""The ``token_klt`` transform on a GPU: bf16 tensors to coordinates and back.

Matrices are multiplied in fp16 with float32 sums. A fp16 number has 11 significant bits and the cache itself only 8, so
the rounding to fp16 is lost in the cache's own rounding; a rounding to bf16 would add as much again
(``docs/performance.md`` measures both). Matrices are multiplied by powers of two that bring them into fp16's range.

In shapes, S is the number of tensors of a unit (the keys of all layers, then the values), H, T and D are a tensor's
heads, tokens and dimensions, and U is the number of units. P = S * H * D is the number of elements of a token in all
tensors. A token has R common coordinates, and C coordinates for each of G groups of layers. I and W are the numbers of
inputs and of units of the predictor's hidden layer.
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
"""A matrix's largest entry is brought near ``2**10``; entries down to ``2**-24`` of it then keep all 11 bits."""


def supports(shape: tuple[int, int, int], model: TokenModel) -> bool:
    """Whether the kernels take tensors ``[H, T, D]`` with this model.

    D must be a multiple of 16; RoPE must turn all of D or nothing; and a group must consist of whole tensors.
    """
    heads, _, dims = shape
    whole = all(a % (heads * dims) == 0 for a, _ in model.local.bounds)
    return dims % 16 == 0 and len(model.frequencies) in (0, dims // 2) and whole


def _exponent(*matrices: Tensor) -> int:
    """Return ``e`` such that the largest entry of all matrices times ``2**e`` is near ``2**LARGEST``."""
    most = max(float(matrix.abs().max()) if matrix.numel() else 0.0 for matrix in matrices)
    return LARGEST - ceil(log2(most)) if most > 0 else 0


def _halves(matrix: Tensor, exponent: int) -> Tensor:
    """Return the matrix times ``2**exponent`` in fp16."""
    return (matrix * 2.0**exponent).half()


@dataclass(frozen=True)
class Group:
    """The directions of a group of layers, which has n elements of keys and n of values.

    Attributes:
        columns: which elements of a row are the group's.
        own: which of all coordinates are the group's own.
        window: which columns of the decoded coordinates are the group's: the common ones, then its own.
        analysis: fp16 ``[2 * n, C]``. Its columns are contiguous, with which cuBLAS is twice as fast.
        synthesis: fp16 ``[R + C, 2 * n]``, by which the window is multiplied.

    """

    columns: slice
    own: slice
    window: slice
    analysis: Tensor
    synthesis: Tensor


@dataclass(frozen=True)
class Prediction:
    """The predictor of coordinates in device memory. I and W are rounded up to multiples of 8 by zeros.

    Attributes:
        vectors: fp16 ``[V, E]``, a vector for each of V tokens of the vocabulary.
        hidden: fp16 ``[I, W]``, the hidden layer's weights times ``2**hidden_exponent``.
        weights: fp16 ``[I + W, R + G * C]``, the weights of inputs and units times ``2**weights_exponent``.
        decays: float32, the factors by which the weights of earlier tokens fall.
        reach: leading elements of a token's vector that later tokens are predicted from, too.
        hidden_exponent: see ``hidden``.
        units_exponent: the hidden layer's units are kept times ``2**units_exponent``.
        weights_exponent: see ``weights``.

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
        """Send a predictor to the device and round it; return also its weights in float32, before they were rounded."""
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
        """Number of inputs, I."""
        return len(self.hidden)

    @property
    def width(self) -> int:
        """Number of inputs and units, I + W."""
        return len(self.weights)


@dataclass(frozen=True)
class Matrices:
    """A :class:`TokenModel` in device memory.

    A row holds the P elements of a token, with a group's keys and values side by side.

    Attributes:
        prediction: the predictor of coordinates.
        groups: the groups' directions. Their analysis is times ``2**analysis_exponent``, their synthesis times
            ``2**synthesis_exponent``.
        places: int64 ``[P]``, where each element stands in a row.
        means: float32 ``[sinks + 1, P]`` in the order of rows: the mean of each of the first tokens, the attention
            sinks, and then that of all other tokens.
        common: fp16 ``[P + I + W, R]`` times ``2**analysis_exponent``: from elements to common coordinates, and the
            negative weights of inputs and units, which subtract the prediction.
        told: fp16 ``[I + W + R, G * C]`` times ``2**analysis_exponent``: the negative of what inputs, units and
            common coordinates (times ``2**exponent``) already tell of the groups' coordinates.
        frequencies: float32, the angles per position by which RoPE turns pairs of a key's elements; empty without it.
        exponent: coordinates are kept times ``2**exponent``.
        analysis_exponent: see above.
        synthesis_exponent: see above.

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
        """Send a model to the device and round it; its coordinates times ``2**exponent`` must be in fp16's range."""

        def to(array: Floats) -> Tensor:
            return sent(array, gpu.device).float()

        prediction, weights = Prediction.of(gpu, model.predictor)
        half, common = model.mean.shape[1] // 2, model.analysis.shape[1]
        order = np.concatenate([np.r_[a:b, half + a : half + b] for a, b in model.local.bounds])
        ordered, places = (sent(a, gpu.device) for a in (order, np.argsort(order)))
        analysis, synthesis = to(model.analysis)[ordered], to(model.synthesis)[:, ordered]
        cross = to(model.local.cross)
        # A group's coordinates are x @ own - (x @ analysis) @ cross - p, where p is their prediction. With the
        # prediction q of the common coordinates this is x @ own - (x @ analysis - q) @ cross - (p + q @ cross).
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
        """Number of elements of a token, P."""
        return self.means.shape[1]

    @property
    def shared(self) -> int:
        """Number of common coordinates, R."""
        return self.common.shape[1]

    @property
    def rank(self) -> int:
        """Number of all coordinates of a token, R + G * C."""
        return self.shared + self.told.shape[1]

    @property
    def sinks(self) -> int:
        """Number of attention sinks: the first tokens, which have a mean of their own and no coordinates."""
        return len(self.means) - 1


@dataclass(frozen=True)
class Tokens:
    """A capture's tokens in device memory.

    Attributes:
        ids: int32 ``[N]``, the token ids.
        sums: float32 ``[N / SPAN, decays, reach]``, sums of the vectors of each span, from which ``inputs.cu`` makes
            decaying means.

    """

    ids: Tensor
    sums: Tensor

    @classmethod
    def of(cls, gpu: Launcher, prediction: Prediction, ids: NDArray[np.int32]) -> Tokens:
        """Send token ids, all of which the model must have, to the device and sum their vectors."""
        given = sent(ids, gpu.device)
        spans = -(-len(ids) // SPAN)
        sums = torch.empty(spans, len(DECAYS), prediction.reach, dtype=torch.float32, device=gpu.device)
        gpu.launch("token_klt/inputs:tally", {}, (spans, 1), THREADS, 0, prediction.vectors, given, len(ids),
                   prediction.vectors.shape[1], prediction.reach, prediction.decays, sums)  # fmt: skip
        return cls(given, sums)

    def inputs(self, gpu: Launcher, matrices: Matrices, first: int, out: Tensor) -> None:
        """Write the inputs and units of tokens from ``first`` on into ``out``.

        Args:
            gpu: where the tokens are.
            matrices: the model.
            first: position of the first token, a multiple of ``SPAN``.
            out: fp16 ``[T, I + W]``, rows of which may lie apart.

        """
        its, count = matrices.prediction, len(out)
        gpu.launch("token_klt/inputs:inputs", {}, (-(-count // SPAN), 1), THREADS, 0, its.vectors, self.ids,
                   its.vectors.shape[1], its.reach, its.decays, self.sums, first, count, matrices.sinks, out,
                   out.stride(0), its.inputs)  # fmt: skip
        units = out[:, its.inputs :]
        product(units, out[:, : its.inputs], its.hidden, scale=2.0 ** (its.units_exponent - its.hidden_exponent))
        width = units.shape[1]
        gpu.launch("token_klt/inputs:rectify", {}, (-(-count * width // 8 // THREADS), 1), THREADS, 0, units, count,
                   units.stride(0), width)  # fmt: skip


@dataclass(frozen=True)
class Stacks:
    """Units of one shape in device memory: the bf16 tensors ``[H, T, D]`` of all layers, keys before values.

    Attributes:
        addresses: int64 ``[U, S]``, where each tensor begins; divisible by 16.
        shape: heads, tokens and dimensions of a tensor.
        head_stride: elements from the beginning of one head to that of the next.
        first: position of the first token of unit 0; the units follow each other.
        cosines: float32 ``[positions, D / 2]``, by which RoPE turns keys; ``[positions, 0]`` without RoPE.
        sines: as ``cosines``.

    """

    addresses: Tensor
    shape: tuple[int, int, int]
    head_stride: int
    first: int
    cosines: Tensor
    sines: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens of all units together."""
        return len(self.addresses) * self.shape[1]

    def launch(
        self, gpu: Launcher, name: str, matrices: Matrices, before: tuple[Tensor, ...], *after: Tensor | int
    ) -> None:
        """Launch the kernel ``name`` of ``rows.cu``; ``before`` and ``after`` are its first and its last arguments."""
        heads, tokens, dims = self.shape
        units, tensors = self.addresses.shape
        firsts = torch.arange(units, device=gpu.device) * tokens + self.first
        tile = THREADS // (dims // 16)
        defines = {"DIMS": dims, "TURNED": int(self.cosines.shape[1] > 0)}
        gpu.launch(f"token_klt/rows:{name}", defines, (-(-tokens // tile), units * tensors), THREADS, 0, *before,
                   self.addresses, self.head_stride, heads, tokens, tensors, firsts, self.cosines, self.sines,
                   matrices.places, *after)  # fmt: skip


def turns(frequencies: NDArray[np.float32], positions: int, device: str) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, float32 ``[positions, pairs]``, of angles that are float64 as on the CPU."""
    steps = sent(frequencies, device).double()
    angles = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * steps
    return angles.cos().float(), angles.sin().float()


def forward(
    gpu: Launcher, matrices: Matrices, stacks: Stacks, tokens: Tokens | None, faults: Tensor
) -> tuple[Tensor, Tensor]:
    """Transform the tensors of units to coordinates, from which predictions are subtracted.

    Args:
        gpu: where the units are.
        matrices: the model.
        stacks: the units.
        tokens: the tokens that coordinates are predicted from; None if nothing is predicted.
        faults: int32 ``[U]``, set to 1 where a value of a unit is not finite.

    Returns:
        Coordinates float32 ``[U * T, R + G * C]`` times ``2**analysis_exponent``, and digests int64 ``[U, S]``, the
        checksums of the original tensors.

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
    """Return predictions float32 ``[count, R + G * C]`` times ``2**weights_exponent``, from position ``first`` on."""
    weights = matrices.prediction.weights
    rows = torch.empty(count, len(weights), dtype=torch.float16, device=gpu.device)
    tokens.inputs(gpu, matrices, first, rows)
    expected = torch.empty(count, matrices.rank, dtype=torch.float32, device=gpu.device)
    product(expected, rows, weights)
    return expected


def inverse(gpu: Launcher, matrices: Matrices, z: Tensor, stacks: Stacks, faults: Tensor) -> None:
    """Transform coordinates to the tensors of units, which are overwritten.

    Args:
        gpu: where the units are.
        matrices: the model.
        z: fp16 ``[U * T, G * (R + C)]``, coordinates times ``2**exponent`` with their predictions added. A row has,
            for each group, the common coordinates and the group's own.
        stacks: the units.
        faults: int32 ``[U]``, set to 1 where a value that comes out is not finite.

    """
    rows = torch.empty(stacks.tokens, matrices.size, dtype=torch.float16, device=gpu.device)
    for group in matrices.groups:
        scale = 2.0 ** -(matrices.exponent + matrices.synthesis_exponent)
        product(rows[:, group.columns], z[:, group.window], group.synthesis, scale=scale)
    stacks.launch(gpu, "scatter", matrices, (rows,), matrices.means, matrices.sinks, faults)

"""``fisher`` on a GPU: keys and values of all layers of a chunk as one array, from bf16 tensors to streams and back.

All steps after the coefficients use integer arithmetic or the CPU's own code, so equal codes give the same bytes as on
the CPU. The coordinates are sums of rounded products in another order than on the CPU. A coefficient next to a bound
may therefore get the neighbouring code (``tests/gpu/test_joint_parity.py`` bounds how near and how often).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, log2

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Part, Scales
from kvpack.codecs.chain.chain import Chain
from kvpack.codecs.chain.entropy.scaled_rans import ScaledRans, checked
from kvpack.codecs.chain.quantizers.dead_zone import MIDDLE, DeadZone, token_levels
from kvpack.codecs.chain.quantizers.dead_zone.reference import MAX_SHIFT
from kvpack.codecs.chain.transforms.token_klt import TokenKlt
from kvpack.gpu.kernels import dead_zone
from kvpack.gpu.kernels import scaled_rans as coder
from kvpack.gpu.kernels import token_klt as klt
from kvpack.gpu.kernels.dead_zone import Choices, quantize, restore
from kvpack.gpu.kernels.scaled_rans import Classes, Coded, Tables, decode, encode
from kvpack.gpu.kernels.token_klt import Matrices, Stacks, Tokens, forward, inverse, predict, turns
from kvpack.gpu.runtime.launch import Launcher
from kvpack.gpu.runtime.tensors import sent

Levels = NDArray[np.int32]
"""Levels, or shifts, of the tokens of units of one length, ``[U, T]``."""


def is_fisher(chain: Chain) -> bool:
    """Return whether a chain is the chain of ``fisher``."""
    every = (chain.keep, chain.predictor, len(chain.transforms))
    return (
        every == (None, None, 1)
        and isinstance(chain.transforms[0], TokenKlt)
        and isinstance(chain.quantizer, DeadZone)
        and isinstance(chain.entropy, ScaledRans)
    )


@dataclass(frozen=True)
class Coefficients:
    """Encoded units in device memory: streams of the coefficients, shifts int32 ``[U, T]``, digests int64 ``[U, S]`` of
    the original tensors, and faults int32 ``[U]``, which are not 0 if the GPU cannot represent a unit.
    """  # fmt: skip

    coded: Coded
    shifts: torch.Tensor
    digests: torch.Tensor
    faults: torch.Tensor


def _positions(part: Part) -> int:
    """Return the number of positions for which RoPE's rotations are needed."""
    return part.origin + (part.first + part.shape[1] if part.length is None else part.length)


class FisherKernels:
    """A codec and a profile in device memory, for the units of one capture."""

    def __init__(self, gpu: Launcher, chain: Chain, part: Part) -> None:
        """Prepare the kernels for units like ``part``, which gives the cache's shape, length and context.

        Raises:
            MismatchError: The profile is not valid, or it is not for this cache.

        """
        klt, quantizer = chain.transforms[0], chain.quantizer
        assert isinstance(klt, TokenKlt)
        assert isinstance(quantizer, DeadZone)
        self._gpu, self._quantizer, self._part = gpu, quantizer, replace(part, first=0)
        model = klt.model(part)
        self._coordinates = klt.output(part)
        scales = self._scales(*np.zeros((2, part.shape[1]), np.int32))
        self._tables = Tables.of(scales.tables, gpu.device)
        self._choices = Choices.of(scales.tables, quantizer.centroids(part), gpu.device)
        widest = float(quantizer.steps(np.array([MIDDLE - 1], np.int32)).max())
        self.matrices = Matrices.of(gpu, model, -ceil(log2(widest)) - 1)  # so that no code times its step overflows
        self._tokens = None
        if part.context.tokens is not None:
            model.require(part.context.tokens)
            self._tokens = Tokens.of(gpu, self.matrices.prediction, part.context.tokens)
        self._cosines, self._sines = turns(model.frequencies, _positions(part), gpu.device)

    @property
    def rank(self) -> int:
        """Return the number of coordinates for each token."""
        return self.matrices.rank

    @staticmethod
    def supports(part: Part, chain: Chain, tensors: int, max_shared: int) -> bool:
        """Return whether the kernels support windows of ``tensors`` tensors, given ``max_shared`` bytes per block."""
        if part.dtype != "BF16" or not is_fisher(chain):
            return False
        stage = chain.transforms[0]
        assert isinstance(stage, TokenKlt)
        assert isinstance(chain.quantizer, DeadZone)
        model, (rows, tokens, dims) = stage.model(part), part.shape
        tables = len(chain.quantizer.tables(part))
        shape = (rows // tensors, tokens, dims)
        fits = dead_zone.supports(model.rank, tables, max_shared) and coder.supports(tokens, model.rank, tables)
        return fits and klt.supports(shape, model)

    def _scales(self, levels: NDArray[np.int32], shifts: NDArray[np.int32]) -> Scales:
        tokens, rank = len(levels), self._coordinates.shape[2]
        part = replace(self._coordinates, shape=(1, tokens, rank))
        plane = self._quantizer.planes(part)[2]
        before = {"levels": (levels + MIDDLE).astype(np.uint8), "shifts": (shifts + MAX_SHIFT).astype(np.uint8)}
        return checked(self._quantizer.scaled(plane, before, part))

    def levels(self, first: int, units: int, tokens: int, mass: NDArray[np.float32] | None) -> Levels:
        """Return the encoder's levels for rows from ``first`` on. ``mass`` is their attention mass ``[T]``, or None."""
        part = replace(self._part, first=first, shape=(1, units * tokens, 1))
        return token_levels(part, self._quantizer.importance, mass).reshape(units, tokens)

    def _classes(self, levels: Levels, shifts: Levels) -> tuple[Classes, NDArray[np.float32]]:
        """Return the classes in device memory, and each token's step ``[U * T]``."""
        scales = [self._scales(*both) for both in zip(levels, shifts, strict=True)]
        steps = self._quantizer.steps(levels.reshape(-1)).reshape(-1)
        return Classes.of(scales, self._tables, self._gpu.device), steps

    def _stacks(self, addresses: torch.Tensor, shape: tuple[int, int, int], head_stride: int, first: int) -> Stacks:
        return Stacks(addresses, shape, head_stride, first, self._cosines, self._sines)

    def compress(
        self, addresses: torch.Tensor, shape: tuple[int, int, int], head_stride: int, first: int, levels: Levels
    ) -> Coefficients:
        """Code the units whose tensors ``[H, T, D]`` lie at ``addresses`` ``[U, S]``, from token ``first`` on.

        ``S`` counts all layers' keys, followed by all layers' values. The call does not wait for the GPU.
        """
        gpu, matrices = self._gpu, self.matrices
        classes, steps = self._classes(levels, np.zeros_like(levels))
        faults = torch.zeros(len(addresses), dtype=torch.int32, device=gpu.device)
        stacks = self._stacks(addresses, shape, head_stride, first)
        z, digests = forward(gpu, matrices, stacks, self._tokens, faults)
        units = sent(steps * np.float32(2.0**matrices.analysis_exponent), gpu.device)
        codes, shifts, rows = quantize(gpu, z, units, classes.columns, classes.rows, self._choices, faults)
        del z
        classes = replace(classes, rows=rows.view(levels.shape))
        coded = encode(gpu, codes.view(*levels.shape, -1), classes)
        return Coefficients(coded, shifts.view(levels.shape), digests, faults)

    def decompress(
        self,
        streams: torch.Tensor,
        sizes: torch.Tensor,
        groups: int,
        addresses: torch.Tensor,
        shape: tuple[int, int, int],
        head_stride: int,
        first: int,
        levels: Levels,
        shifts: Levels,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode streams ``[U]`` to tensors: the inverse of :meth:`compress`.

        The streams have the form that :func:`scaled_rans.cuda.decode` takes. The results are, ``[U]`` each: faults of
        the streams, their checksums, and whether any value is not finite.
        """
        gpu, matrices = self._gpu, self.matrices
        classes, steps = self._classes(levels, shifts)
        codes, unsound, sums = decode(gpu, streams, sizes, classes, groups)
        predicted = None
        if self._tokens is not None:
            predicted = predict(gpu, matrices, self._tokens, first, levels.size)
        z = restore(gpu, codes.view(levels.size, -1), sent(steps, gpu.device), classes.columns, classes.rows,
                    self._choices, predicted, matrices.prediction.weights_exponent, matrices.exponent, matrices.shared,
                    len(matrices.groups))  # fmt: skip
        nonfinite = torch.zeros(len(levels), dtype=torch.int32, device=gpu.device)
        inverse(gpu, matrices, z, self._stacks(addresses, shape, head_stride, first), nonfinite)
        return unsound, sums, nonfinite

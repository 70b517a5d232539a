"""Quantizers with kernels for a file's planes: bf16 tensors to codes (a byte each) and halves, and back.

Each quantizer has one array in device memory for its ``codes``, and one for each pair of its float planes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kvpack.codecs.chain.chain import Chain
from kvpack.codecs.chain.quantizers.affine import Affine
from kvpack.codecs.chain.quantizers.lloyd_max import LloydMax
from kvpack.codecs.chain.transforms.rotation import Rotation
from kvpack.gpu.kernels import affine, lloyd_max
from kvpack.gpu.runtime.launch import Launcher

STEP = 8
"""The number of bits from one code to the next."""


class Kernels(Protocol):
    """A chain's transforms and quantizer on a GPU."""

    def compress(self, gpu: Launcher, tensors: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return arrays ``[P, ...]`` of bf16 ``tensors`` ``[P, H, T, D]``, and ``[P]`` whether one cannot be coded."""

    def decompress(self, gpu: Launcher, arrays: list[torch.Tensor]) -> torch.Tensor:
        """Return the tensors that arrays decode to: the inverse of :meth:`compress`."""


@dataclass(frozen=True)
class Kivi:
    """The quantizer ``affine`` with groups of 32."""

    quantizer: Affine

    def compress(self, gpu: Launcher, tensors: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return codes, scales and zeros. See :class:`Kernels`."""
        parts, heads, _, dims = tensors.shape
        own = self.quantizer
        arrays = affine.compress(gpu, tensors.reshape(parts * heads, -1, dims), own.bits, own.axis, STEP)
        codes, scales, zeros = (array.view(parts, heads, *array.shape[1:]) for array in arrays)
        sound = ~tensors.flatten(1).amax(1).isnan()  # infinities make scales or zeros infinite, which is checked below
        for parameters in (scales, zeros):
            sound &= parameters.isfinite().flatten(1).all(1)
        return [codes, scales, zeros], ~sound

    def decompress(self, gpu: Launcher, arrays: list[torch.Tensor]) -> torch.Tensor:
        """Return the decoded tensors. See :class:`Kernels`."""
        codes, scales, zeros = (array.flatten(0, 1) for array in arrays)
        own = self.quantizer
        return affine.decompress(gpu, codes, scales, zeros, own.bits, own.axis, STEP).view(arrays[0].shape)


@dataclass(frozen=True)
class TurboQuant:
    """The transform ``rotation`` and the quantizer ``lloyd_max``."""

    rotation: Rotation
    quantizer: LloydMax

    def compress(self, gpu: Launcher, tensors: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return codes and norms. See :class:`Kernels`."""
        vectors = tensors.reshape(-1, tensors.shape[-1])
        codes, norms = lloyd_max.compress(gpu, vectors, self.rotation.seed, self.quantizer.bits, STEP)
        lost = ~norms.isfinite() | (norms == 0) & (vectors != 0).any(1)
        return [codes.view(tensors.shape), norms.view(*tensors.shape[:3], 1)], lost.view(len(tensors), -1).any(1)

    def decompress(self, gpu: Launcher, arrays: list[torch.Tensor]) -> torch.Tensor:
        """Return the decoded tensors. See :class:`Kernels`."""
        codes, norms = arrays
        vectors = codes.reshape(-1, codes.shape[-1])
        seed, bits = self.rotation.seed, self.quantizer.bits
        return lloyd_max.decompress(gpu, vectors, norms.reshape(-1), seed, bits, STEP).view(codes.shape)


def kernels_of(chain: Chain, dims: int) -> Kernels | None:
    """Return the kernels of a chain for vectors of ``dims`` elements, or None if there are none."""
    quantizer, transforms = chain.quantizer, chain.transforms
    if chain.predictor is not None:
        return None
    if isinstance(quantizer, Affine) and not transforms and quantizer.group == affine.GROUP and affine.supports(dims):
        return Kivi(quantizer)
    if isinstance(quantizer, LloydMax) and not quantizer.prod and lloyd_max.supports(dims) and len(transforms) == 1:
        return TurboQuant(transforms[0], quantizer) if isinstance(transforms[0], Rotation) else None
    return None

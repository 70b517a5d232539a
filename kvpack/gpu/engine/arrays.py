"""The device-memory layout of a part for a lossy codec: tokens kept whole (bf16), codes (a byte each), and halves.

Each of these is an **array**, which holds one or two planes of the file. One launch codes all planes of one geometry,
whichever arrays and parts they belong to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from kvpack.cache import PartSpec
from kvpack.codecs.chain.base import Part, PlaneSpec
from kvpack.codecs.chain.chain import Chain
from kvpack.codecs.chain.codec import ChainCodec
from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.codecs.chain.pipeline import route_of
from kvpack.gpu.engine.quantizers import Kernels, kernels_of
from kvpack.gpu.kernels.rans import Parts, supports
from kvpack.gpu.runtime.launch import Launcher


class Geometry(NamedTuple):
    """What the planes coded by one launch have in common. Their array has ``item`` bytes per element."""

    shape: tuple[int, int, int]
    item: int
    shift: int
    width: int
    modelled: bool

    def parts(self, addresses: torch.Tensor) -> Parts:
        """Return the planes of the arrays at ``addresses``."""
        return Parts(addresses, self.shape, self.shape[1] * self.shape[2], self.item, self.shift, self.width)


class Plane(NamedTuple):
    """One plane of one array of a part."""

    name: str
    array: int
    geometry: Geometry


@dataclass(frozen=True)
class Layout:
    """The arrays of parts that a chain codes alike. Tokens ``[start, stop)`` are coded, the others are kept whole."""

    kernels: Kernels
    start: int
    stop: int
    kept: bool
    arrays: list[list[PlaneSpec]]
    planes: list[Plane]

    def gather(self, gpu: Launcher, tensors: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the arrays of bf16 ``tensors`` ``[P, H, T, D]``, and ``[P]`` whether a part cannot be represented."""
        arrays, lost = [], torch.zeros(len(tensors), dtype=torch.bool, device=gpu.device)
        if self.kept:
            arrays.append(torch.cat([tensors[:, :, : self.start], tensors[:, :, self.stop :]], 2))
        if self.start < self.stop:
            coded, lost = self.kernels.compress(gpu, tensors[:, :, self.start : self.stop].contiguous())
            arrays += coded
        return arrays, lost

    def scatter(self, gpu: Launcher, arrays: list[torch.Tensor], tensors: torch.Tensor) -> None:
        """Write the parts that ``arrays`` hold into ``tensors``: the inverse of :meth:`gather`."""
        if self.start < self.stop:
            tensors[:, :, self.start : self.stop] = self.kernels.decompress(gpu, arrays[self.kept :])
        if self.kept:
            tensors[:, :, : self.start] = arrays[0][:, :, : self.start]
            tensors[:, :, self.stop :] = arrays[0][:, :, self.start :]

    def empty(self, gpu: Launcher, count: int) -> list[torch.Tensor]:
        """Return uninitialized arrays for ``count`` parts."""
        dtypes = [torch.bfloat16] * self.kept + [torch.uint8] + [torch.float16] * len(self.arrays)
        shapes = [planes[0].shape for planes in self.arrays]
        return [torch.empty((count, *s), dtype=d, device=gpu.device) for s, d in zip(shapes, dtypes, strict=False)]


def layout_of(part: PartSpec, codec: ChainCodec) -> Layout | None:
    """Return a part's layout, or None unless kernels cover all of it: bf16 keys or values of a supported shape."""
    if part.tensor.layer is None or part.tensor.dtype != "BF16" or codec.stacked or not part.nbytes:
        return None
    array = Part(part.tensor.dtype, part.shape, part.first, part.length, origin=part.tensor.origin)
    return _layout(codec.chain_for(part), array)


@lru_cache(maxsize=4096)
def _layout(chain: Chain, part: Part) -> Layout | None:
    kernels = kernels_of(chain, part.shape[2])
    if kernels is None or not isinstance(chain.entropy, Rans):
        return None
    route = route_of(chain, part)
    floats = route.planes[1:]
    every = [route.whole, route.planes[:1], *(floats[i : i + 2] for i in range(0, len(floats), 2))]
    arrays = [planes for planes in every if planes and planes[0].size]
    planes = [plane for array in arrays for plane in _planes_of(arrays.index(array), array)]
    if not planes or not all(supports(p.geometry.shape, p.geometry.width, floats=False) for p in planes):
        return None
    return Layout(kernels, route.start, route.stop, bool(route.whole and route.whole[0].size), arrays, planes)


def _planes_of(number: int, array: list[PlaneSpec]) -> Iterator[Plane]:
    """Yield the planes of an array: one plane for bytes, two for the upper and lower bits of two-byte elements."""
    for i, spec in enumerate(array):
        shift = sum(lower.width for lower in array[i + 1 :])
        yield Plane(spec.name, number, Geometry(spec.shape, len(array), shift, spec.width, spec.modelled))


def addresses_of(array: torch.Tensor) -> list[int]:
    """Return the addresses at which the parts of an array ``[P, ...]`` begin."""
    stride = array.stride(0) * array.element_size()
    return list(range(array.data_ptr(), array.data_ptr() + len(array) * stride, stride))

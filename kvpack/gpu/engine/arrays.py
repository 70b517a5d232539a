"""A part in device memory as a lossy codec's planes see it: what is kept whole (bf16), codes (a byte each), halves.

Each of these is an **array**, which is one plane or two. Planes of one geometry are coded by one launch, whichever
arrays and parts they are of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from kvpack.codecs.chain.base import Part, PlaneSpec
from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.codecs.chain.pipeline import chain_of, plan_of
from kvpack.codecs.recipes import Chain, Codec
from kvpack.gpu.engine.quantizers import Kernels, kernels_of
from kvpack.kvp.layout import PartPlan

if TYPE_CHECKING:
    import torch

    from kvpack.gpu.kernels.rans import Parts
    from kvpack.gpu.runtime.launch import Launcher


class Geometry(NamedTuple):
    """What planes that are coded by one launch have in common; of an array of ``item`` bytes an element."""

    shape: tuple[int, int, int]
    item: int
    shift: int
    width: int
    modelled: bool

    def parts(self, addresses: torch.Tensor) -> Parts:
        """Planes of arrays at ``addresses``."""
        from kvpack.gpu.kernels.rans import Parts

        return Parts(addresses, self.shape, self.shape[1] * self.shape[2], self.item, self.shift, self.width)


class Plane(NamedTuple):
    """A plane of an array of a part."""

    name: str
    array: int
    geometry: Geometry


@dataclass(frozen=True)
class Layout:
    """How parts that a chain codes alike lie in arrays: tokens ``[start, stop)`` are coded, the others kept whole."""

    kernels: Kernels
    start: int
    stop: int
    kept: bool
    arrays: list[list[PlaneSpec]]
    planes: list[Plane]

    def gather(self, gpu: Launcher, tensors: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Arrays of bf16 ``tensors`` ``[P, H, T, D]``; and ``[P]``, whether one cannot be represented."""
        import torch

        arrays, lost = [], torch.zeros(len(tensors), dtype=torch.bool, device=gpu.device)
        if self.kept:
            arrays.append(torch.cat([tensors[:, :, : self.start], tensors[:, :, self.stop :]], 2))
        if self.start < self.stop:
            coded, lost = self.kernels.compress(gpu, tensors[:, :, self.start : self.stop].contiguous())
            arrays += coded
        return arrays, lost

    def scatter(self, gpu: Launcher, arrays: list[torch.Tensor], tensors: torch.Tensor) -> None:
        """The inverse, into ``tensors``."""
        if self.start < self.stop:
            tensors[:, :, self.start : self.stop] = self.kernels.decompress(gpu, arrays[self.kept :])
        if self.kept:
            tensors[:, :, : self.start] = arrays[0][:, :, : self.start]
            tensors[:, :, self.stop :] = arrays[0][:, :, self.start :]

    def empty(self, gpu: Launcher, count: int) -> list[torch.Tensor]:
        """Arrays of ``count`` parts, to be filled."""
        import torch

        dtypes = [torch.bfloat16] * self.kept + [torch.uint8] + [torch.float16] * len(self.arrays)
        shapes = [planes[0].shape for planes in self.arrays]
        return [torch.empty((count, *s), dtype=d, device=gpu.device) for s, d in zip(shapes, dtypes, strict=False)]


@lru_cache(maxsize=4096)
def _layout(chain: Chain, part: Part) -> Layout | None:
    from kvpack.gpu.kernels.rans import supports

    kernels = kernels_of(chain, part.shape[2])
    if kernels is None or not isinstance(chain.entropy, Rans):
        return None
    plan = plan_of(chain, part)
    floats = plan.planes[1:]
    every = [plan.whole, plan.planes[:1], *(floats[i : i + 2] for i in range(0, len(floats), 2))]
    arrays = [planes for planes in every if planes and planes[0].size]
    planes = [plane for array in arrays for plane in _planes_of(arrays.index(array), array)]
    if not planes or not all(supports(p.geometry.shape, p.geometry.width, floats=False) for p in planes):
        return None
    return Layout(kernels, plan.start, plan.stop, bool(plan.whole and plan.whole[0].size), arrays, planes)


def _planes_of(number: int, array: list[PlaneSpec]) -> Iterator[Plane]:
    """Two planes are the upper and the lower bits of two bytes, one is a byte."""
    for i, spec in enumerate(array):
        shift = sum(lower.width for lower in array[i + 1 :])
        yield Plane(spec.name, number, Geometry(spec.shape, len(array), shift, spec.width, spec.modelled))


def layout_of(plan: PartPlan, codec: Codec) -> Layout | None:
    """A part's layout, if there are kernels for all of it."""
    chain = chain_of(codec, plan.tensor.name)
    return _layout(chain, Part(plan.tensor.dtype, plan.shape, plan.first, plan.tensor.shape[1]))


def takes_planes(plan: PartPlan, codec: Codec) -> bool:
    """Whether the kernels code this part: bf16 keys or values, a lossy codec and a shape they are made for."""
    ours = plan.layer is not None and plan.tensor.dtype == "BF16" and not codec.stacked and prod(plan.shape) > 0
    return ours and layout_of(plan, codec) is not None


def by_chain(names: Sequence[str], codec: Codec) -> list[int]:
    """Positions of tensors, those of each chain next to each other, so that one launch takes them."""
    return sorted(range(len(names)), key=lambda i: codec.keys != chain_of(codec, names[i]))


def runs_of(plans: Sequence[PartPlan], codec: Codec) -> Iterator[tuple[slice, Layout]]:
    """Parts next to each other that have one layout."""
    stop = 0
    for layout, run in groupby(plans, key=lambda plan: layout_of(plan, codec)):
        start, stop = stop, stop + len(list(run))
        assert layout is not None
        yield slice(start, stop), layout


def addresses_of(array: torch.Tensor) -> list[int]:
    """Where the parts of an array ``[P, ...]`` begin."""
    stride = array.stride(0) * array.element_size()
    return list(range(array.data_ptr(), array.data_ptr() + len(array) * stride, stride))

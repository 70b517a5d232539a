"""What fidelity reads: caches as named tensors of bit patterns, and the layers among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import MismatchError
from kvpack.formats.captures import layer_of
from kvpack.formats.safetensors import TensorSpec
from kvpack.numerics.floats import FLOAT_BITS, Bits, to_float32


class CacheSource(Protocol):
    """A capture or a compressed file: tensors by name, string metadata, bit patterns on demand."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor's specification by name."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The safetensors ``__metadata__``."""

    def read(self, name: str) -> Bits:
        """The tensor's bit patterns in its shape: unsigned integers of the dtype's item size."""


@dataclass(frozen=True, eq=False)
class FloatHeads:
    """A layer's ``[H, T, D]`` bit patterns, read as float32 one head at a time to keep memory small."""

    bits: Bits
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """``(H, T, D)``."""
        return self.bits.shape

    def __getitem__(self, head: int, /) -> NDArray[np.float32]:
        """Values ``[T, D]`` of a head."""
        return to_float32(self.bits[head], self.dtype)


def is_float_tensor(spec: TensorSpec | None) -> bool:
    """Whether the tensor is ``[H, T, D]`` floats of a dtype whose values kvpack reads."""
    return spec is not None and len(spec.shape) == 3 and spec.dtype in FLOAT_BITS


def layer_tensors(source: CacheSource) -> dict[int, dict[str, str]]:
    """Names of layer tensors (``layers.{i}.keys|values``, floats of rank 3), by layer and which of the two.

    Layers ascend; keys come before values.
    """
    found = [
        (layer, name.rsplit(".", 1)[1], name)
        for name, spec in source.tensors.items()
        if (layer := layer_of(spec)) is not None
    ]
    layers: dict[int, dict[str, str]] = {}
    for index, what, name in sorted(found):
        layers.setdefault(index, {})[what] = name
    return layers


def require_same_layers(original: CacheSource, other: CacheSource) -> dict[int, dict[str, str]]:
    """The layer tensors that both sources hold, as :func:`layer_tensors`.

    Raises:
        MismatchError: a layer tensor is only in one of them, or differs in shape or dtype.

    """
    layers = layer_tensors(original)
    every = [*layers.values(), *layer_tensors(other).values()]
    for name in dict.fromkeys(name for names in every for name in names.values()):
        ours, theirs = (_describe(source.tensors.get(name)) for source in (original, other))
        if ours != theirs:
            raise MismatchError(f"{name}: {ours} in the original, {theirs} in the file compared with it")
    return layers


def same_tensor(first: TensorSpec, second: TensorSpec | None) -> bool:
    """Whether dtype and shape agree."""
    return second is not None and (first.dtype, first.shape) == (second.dtype, second.shape)


def _describe(spec: TensorSpec | None) -> str:
    return f"{spec.dtype} {list(spec.shape)}" if spec else "absent"

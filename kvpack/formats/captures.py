"""The names of a capture's tensors, and the cache that they describe. It uses only the standard library."""

from __future__ import annotations

import re
from math import prod

from kvpack.cache import CacheSpec, Role, TensorInfo
from kvpack.formats.safetensors import Header, TensorSpec

FLOAT_DTYPES = ("BF16", "F16", "F32")
_LAYER_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,8})\.(keys|values)")


def layer_of(entry: TensorSpec) -> int | None:
    """Return the layer's index for keys or values (``layers.{i}.keys``, floats ``[H, T, D]``), and else None."""
    found = _LAYER_NAME.fullmatch(entry.name)
    if found is None or len(entry.shape) != 3 or entry.dtype not in FLOAT_DTYPES:
        return None
    return int(found[1])


def tensor_info(entry: TensorSpec, origin: int = 0) -> TensorInfo:
    """Return the description of a cache's tensor, from its entry in a safetensors header.

    ``origin`` is the position of the first row, if the tensor is keys or values.

    The shape of a tensor that is neither keys nor values is folded to three axes: T is its longest axis, or the first
    of several longest axes.
    """
    layer = layer_of(entry)
    if layer is not None:
        heads, rows, dims = entry.shape
        role = Role(entry.name.rpartition(".")[2])
        return TensorInfo(entry.name, role, layer, entry.dtype, (heads, rows, dims), entry.itemsize, origin)
    return TensorInfo(entry.name, Role.OTHER, None, entry.dtype, _folded(entry.shape), entry.itemsize)


def _folded(shape: tuple[int, ...]) -> tuple[int, int, int]:
    longest = max(range(len(shape)), key=shape.__getitem__, default=0)
    return prod(shape[:longest]), prod(shape[longest : longest + 1]), prod(shape[longest + 1 :])


def cache_spec(header: Header, origin: int | None = None) -> CacheSpec:
    """Return the specification of the cache that a safetensors header describes.

    With ``origin``, keys and values begin at that position of a text, and more rows may follow.
    """
    tensors = [tensor_info(entry, origin or 0) for entry in header.tensors if entry.elements]
    layers = tuple(tensor for tensor in tensors if tensor.layer is not None)
    others = tuple(tensor for tensor in tensors if tensor.layer is None)
    return CacheSpec(layers, others, header.metadata, origin)

"""What this package reads: caches as named tensors of bit patterns, and the layers among them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

from kvpack.errors import FormatError, MismatchError
from kvpack.formats.records import layer_tensors
from kvpack.formats.safetensors import TensorSpec
from kvpack.numerics.floats import Bits


class CacheReader(Protocol):
    """A capture or a compressed file: tensors by name, string metadata, and bit patterns on demand.

    Bit patterns are unsigned integers of the item size of the tensor's dtype.
    """

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """The specification of every tensor by its name."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The ``__metadata__`` of the safetensors file."""

    def read(self, name: str, rows: slice | None = None) -> Bits:
        """Read one tensor in its shape, or of keys and values ``[H, T, D]`` only the tokens ``rows``."""

    def windows(self) -> Iterator[tuple[int, Mapping[str, Bits]]]:
        """Read the keys and values of all layers, range of tokens by range of tokens, in ascending order.

        Each item is the first token of a range, and by tensor name the bit patterns ``[H, t, D]`` of the tokens from
        there on. A tensor that ends before the range is left out. ``t`` is smaller for a tensor that ends within the
        range. Together the ranges hold every token of every tensor exactly once.
        """


def require_same_layers(original: CacheReader, other: CacheReader) -> dict[int, dict[str, str]]:
    """Return the layer tensors that both caches hold, in the form of :func:`layer_tensors`.

    Raises:
        MismatchError: A layer's tensor is in only one of the two, or differs in shape or dtype.

    """
    layers = layer_tensors(original)
    every = [*layers.values(), *layer_tensors(other).values()]
    for name in dict.fromkeys(name for names in every for name in names.values()):
        ours, theirs = (_describe(source.tensors.get(name)) for source in (original, other))
        if ours != theirs:
            raise MismatchError(f"{name}: {ours} in the original, {theirs} in the file compared with it")
    return layers


def walk(reader: CacheReader, names: Collection[str]) -> Iterator[tuple[int, dict[str, Bits]]]:
    """Yield ``reader.windows()`` with only the tensors ``names`` in them, and check that they come whole.

    Raises:
        FormatError: The reader repeats or leaves out tokens of a tensor, or gives them in another shape.

    """
    reached = dict.fromkeys(names, 0)
    for first, window in reader.windows():
        wanted = {name: window[name] for name in names if name in window}
        widest = max((bits.shape[1] for bits in wanted.values()), default=0)
        for name, bits in wanted.items():
            _require_next(reader.tensors[name], bits, (first, widest), reached[name])
            reached[name] += bits.shape[1]
        yield first, wanted
    for name, row in reached.items():
        spec = reader.tensors[name]
        if spec.elements and row != spec.shape[1]:
            raise FormatError(f"{name}: the reader gave {row} of {spec.shape[1]} tokens")


def same_tensor(first: TensorSpec, second: TensorSpec | None) -> bool:
    """Whether the second tensor exists and has the dtype and shape of the first."""
    return second is not None and (first.dtype, first.declared_shape) == (second.dtype, second.declared_shape)


def _require_next(spec: TensorSpec, bits: Bits, window: tuple[int, int], reached: int) -> None:
    """Check that a tensor's part of a window (its first token and its length) starts where the last one ended."""
    first, length = window
    heads, tokens, dims = spec.shape
    if first != reached:
        raise FormatError(f"{spec.name}: the reader gave tokens from {first} on where token {reached} is next")
    if bits.shape != (heads, min(length, tokens - first), dims):
        raise FormatError(f"{spec.name}: the reader gave {list(bits.shape)} at token {first} of {list(spec.shape)}")


def _describe(spec: TensorSpec | None) -> str:
    return f"{spec.dtype} {list(spec.declared_shape)}" if spec else "absent"

"""Codecs that pass each array through a chain of stages: one chain for keys, another for all other tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvpack.cache import PartSpec, Role, TensorInfo, Window, WindowSpec
from kvpack.codecs.chain import pipeline
from kvpack.codecs.chain.base import Part, Stage
from kvpack.codecs.chain.chain import Chain
from kvpack.codecs.chain.quantizers.dead_zone import DeadZone
from kvpack.codecs.context import DecodeContext, Hints, StackHints
from kvpack.codecs.protocol import PartStreams, Scope, Traits
from kvpack.errors import UnsupportedError
from kvpack.numerics.floats import Bits

ROLES = (Role.KEYS, Role.VALUES)


@dataclass(frozen=True)
class ChainCodec:
    """A codec of two chains. With ``stacked``, a window's keys of all layers are one array, and so are its values."""

    name: str
    stacked: bool
    keys: Chain
    values: Chain

    def __post_init__(self) -> None:
        """Check that stages that need stacked layers get them."""
        if not self.stacked and any(stage.scope is not Scope.TENSOR for stage in self.stages):
            raise ValueError("a stage needs the stack of all layers")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return all stages of both chains."""
        return self.keys.stages + self.values.stages

    @cached_property
    def traits(self) -> Traits:
        """Return the codec's traits. See :class:`kvpack.codecs.protocol.Codec`."""
        scope = Scope.KIND if self.stacked else Scope.TENSOR
        return Traits(
            scope=max(scope, *(stage.scope for stage in self.stages)),
            needs=frozenset(need for stage in self.stages for need in stage.needs),
            hints=frozenset(hint for stage in self.stages for hint in stage.hints),
            alike=self.stacked,
            prefix_stable=all(stage.prefix_stable for stage in self.stages),
        )

    @property
    def lossless(self) -> bool:
        """Return whether every bit is restored."""
        return self.keys.quantizer.exact and self.values.quantizer.exact

    @property
    def seeded(self) -> bool:
        """Return whether any stage uses random numbers."""
        return any(hasattr(stage, "seed") for stage in self.stages)

    def with_seed(self, seed: int) -> Self:
        """Return the same codec with other random matrices. Seed 0 gives the codec's own matrices."""
        return replace(self, keys=self.keys.with_seed(seed), values=self.values.with_seed(seed)) if seed else self

    def with_step(self, log_step: int) -> Self | None:
        """Return the same codec at another step, or None if its quantizer has no step."""
        quantizer = self.keys.quantizer
        if not isinstance(quantizer, DeadZone):
            return None
        chain = replace(self.keys, quantizer=replace(quantizer, log_step=log_step))
        return replace(self, keys=chain, values=chain)

    def expected_bits(self, context: DecodeContext, tokens: int) -> tuple[str, float] | None:
        """Return a stream's name and its expected bits for ``tokens`` tokens that vary as in calibration, or None."""
        quantizer = self.keys.quantizer
        if context.profile is None or not isinstance(quantizer, DeadZone):
            return None
        return "coefficients", quantizer.expected_bits(context.profile) * tokens

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form that a file carries."""
        return {
            "name": self.name,
            "stacked": self.stacked,
            "keys": self.keys.to_json(),
            "values": self.values.to_json(),
        }

    def blocks(self, spec: WindowSpec) -> Iterator[slice]:
        """Yield a block for each part, or one block of all keys and values of a window."""
        if self.traits.scope is Scope.TENSOR or not spec.layered:
            yield from (slice(i, i + 1) for i in range(len(spec.parts)))
        elif spec.parts:
            yield slice(0, len(spec.parts))

    def takes(self, tensor: TensorInfo) -> bool:
        """Return whether the codec can be given this tensor: all tensors of a dtype that its chain takes."""
        return self._chain(tensor).quantizer.takes(tensor.dtype)

    def exact(self, part: PartSpec) -> bool:
        """Return whether every bit of a part is restored."""
        return self.chain_for(part).quantizer.exact

    def chain_for(self, part: PartSpec) -> Chain:
        """Return the chain for a part's tensor. The keys' chain is for tensors whose name ends in ``.keys``."""
        return self._chain(part.tensor)

    def _chain(self, tensor: TensorInfo) -> Chain:
        return self.keys if tensor.name.endswith(".keys") else self.values

    def stack_key(self, part: PartSpec) -> object:
        """Return a key. Parts of a block that have equal keys form one array."""
        return part.tensor.role if self.traits.scope is Scope.KIND else None

    def stacks(self, block: WindowSpec) -> list[list[int]]:
        """Return which parts of a block form one array: keys before values, with layers ascending.

        Raises:
            UnsupportedError: Parts of one array differ in shape or dtype.

        """
        if len(block.parts) == 1 or self.traits.scope is Scope.TENSOR:
            return [[i] for i in range(len(block.parts))]
        order = sorted(range(len(block.parts)), key=lambda i: _rank(block.parts[i]))
        found: dict[object, list[int]] = {}
        for i in order:
            found.setdefault(self.stack_key(block.parts[i]), []).append(i)
        for stack in found.values():
            self._check(block.take(stack).parts)
        return list(found.values())

    def _check(self, stack: Sequence[PartSpec]) -> None:
        if len({(part.tensor.dtype, part.shape, part.length) for part in stack}) > 1:
            raise UnsupportedError(
                f"{self.name} codes all layers as one, but {stack[0].label} and others differ in shape or "
                "dtype: use a codec that codes each tensor by itself"
            )

    def array_of(self, stack: Sequence[PartSpec], context: DecodeContext) -> Part:
        """Return the description of a stack's parts as one array."""
        part = stack[0]
        heads, tokens, dims = part.shape
        ids = context.tokens if part.tensor.layer is not None else None
        if ids is not None and len(ids) != part.length and part.length is not None:
            ids = None
        return Part(
            part.tensor.dtype,
            (len(stack) * heads, tokens, dims),
            part.first,
            part.length,
            heads,
            keys=heads * sum(one.tensor.role is Role.KEYS for one in stack),
            origin=part.tensor.origin,
            context=DecodeContext(context.profile, ids),
        )

    def stream_names(self, block: WindowSpec, context: DecodeContext) -> set[str]:
        """Return the names of all streams that :meth:`encode` gives for a block."""
        names: set[str] = set()
        for stack in self.stacks(block):
            parts = block.take(stack).parts
            names.update(pipeline.stream_names(self.chain_for(parts[0]), self.array_of(parts, context)))
        return names

    def encode(self, block: Window, context: DecodeContext, hints: Hints) -> list[PartStreams]:
        """Return the streams of each part. The streams of a stack belong to the first of its parts.

        Raises:
            UnrepresentableError: A lossy chain cannot represent some values.

        """
        streams: list[PartStreams] = [[] for _ in block.arrays]
        reference = None
        for stack in self.stacks(block.spec):
            parts = block.spec.take(stack).parts
            joined = _joined([block.arrays[i] for i in stack])
            array, own = self.array_of(parts, context), stack_hints(hints, parts)
            streams[min(stack)], decoded = pipeline.encode(self.chain_for(parts[0]), joined, array, own, reference)
            reference = decoded if reference is None else reference
        return streams

    def decode(self, block: WindowSpec, streams: Sequence[PartStreams], context: DecodeContext) -> list[Bits]:
        """Return the bit patterns of each part, decoded from its streams: the inverse of :meth:`encode`.

        Raises:
            CorruptError: The streams do not decode to these parts.

        """
        out: dict[int, Bits] = {}
        reference = None
        for stack in self.stacks(block):
            parts = block.take(stack).parts
            mine = [stream for i in sorted(stack) for stream in streams[i]]
            chain = self.chain_for(parts[0])
            joined, decoded = pipeline.decode(chain, mine, self.array_of(parts, context), reference)
            reference = decoded if reference is None else reference
            heads = parts[0].shape[0]
            out.update((i, joined[k * heads : (k + 1) * heads]) for k, i in enumerate(stack))
        return [out[i] for i in range(len(block.parts))]


def _rank(part: PartSpec) -> tuple[int, int]:
    return ROLES.index(part.tensor.role), part.tensor.layer or 0


def _joined(arrays: Sequence[Bits]) -> Bits:
    return np.ascontiguousarray(arrays[0]) if len(arrays) == 1 else np.concatenate(arrays)


def stack_hints(hints: Hints, stack: Sequence[PartSpec]) -> StackHints:
    """Return the hints for one array: its mass if it covers every row, and weights if every tensor has some."""
    mass = hints.mass if hints.mass is not None and len(hints.mass) == stack[0].length else None
    known = hints.weights or {}
    weights: list[NDArray[np.float32]] = [known[p.tensor.name] for p in stack if p.tensor.name in known]
    whole = np.concatenate(weights) if len(weights) == len(stack) else None
    return StackHints(mass, hints.frequencies, whole)

"""Codecs that send each array through a chain of stages: one chain for keys, one for values and everything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvpack.cache import PartSpec, Role, Window, WindowSpec
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
    """A codec of two chains. With ``stacked`` the keys (and the values) of all layers of a window are one array."""

    name: str
    stacked: bool
    keys: Chain
    values: Chain

    def __post_init__(self) -> None:
        """Check that stages which need a stack get one."""
        if not self.stacked and any(stage.scope is not Scope.TENSOR for stage in self.stages):
            raise ValueError("a stage needs the stack of all layers")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages of both chains."""
        return self.keys.stages + self.values.stages

    @cached_property
    def traits(self) -> Traits:
        """See :class:`kvpack.codecs.protocol.Codec`."""
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
        """Whether every bit comes back."""
        return self.keys.quantizer.exact and self.values.quantizer.exact

    @property
    def seeded(self) -> bool:
        """Whether something in it is random."""
        return any(hasattr(stage, "seed") for stage in self.stages)

    def with_seed(self, seed: int) -> Self:
        """The same with other random matrices; 0 gives the codec's own."""
        return replace(self, keys=self.keys.with_seed(seed), values=self.values.with_seed(seed)) if seed else self

    def with_step(self, log_step: int) -> Self | None:
        """The same at another step where the quantizer has one, else None."""
        quantizer = self.keys.quantizer
        if not isinstance(quantizer, DeadZone):
            return None
        chain = replace(self.keys, quantizer=replace(quantizer, log_step=log_step))
        return replace(self, keys=chain, values=chain)

    def expected_bits(self, context: DecodeContext, tokens: int) -> tuple[str, float] | None:
        """Bits that the coefficients of ``tokens`` tokens take if they scatter as in calibration."""
        quantizer = self.keys.quantizer
        if context.profile is None or not isinstance(quantizer, DeadZone):
            return None
        return "coefficients", quantizer.expected_bits(context.profile) * tokens

    def to_json(self) -> dict[str, Any]:
        """The form that a file carries."""
        return {
            "name": self.name,
            "stacked": self.stacked,
            "keys": self.keys.to_json(),
            "values": self.values.to_json(),
        }

    def blocks(self, spec: WindowSpec) -> Iterator[slice]:
        """Each part by itself, or all keys and values of a window together."""
        if self.traits.scope is Scope.TENSOR or not spec.layered:
            yield from (slice(i, i + 1) for i in range(len(spec.parts)))
        elif spec.parts:
            yield slice(0, len(spec.parts))

    def exact(self, part: PartSpec) -> bool:
        """Whether every bit of a part comes back."""
        return self.chain_for(part).quantizer.exact

    def chain_for(self, part: PartSpec) -> Chain:
        """The chain of the tensor of a part: that for keys if its name ends in ``.keys``."""
        return self.keys if part.tensor.name.endswith(".keys") else self.values

    def stack_key(self, part: PartSpec) -> object:
        """Parts of a block that have the same key are one array."""
        return part.tensor.role if self.traits.scope is Scope.KIND else None

    def stacks(self, block: WindowSpec) -> list[list[int]]:
        """Which parts of a block are one array: keys before values, layers ascending.

        Raises:
            UnsupportedError: parts of one array differ in shape or dtype.

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
        """What the parts of a stack are as one array."""
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
        """Names of all streams that :meth:`encode` gives for a block."""
        names: set[str] = set()
        for stack in self.stacks(block):
            parts = block.take(stack).parts
            names.update(pipeline.stream_names(self.chain_for(parts[0]), self.array_of(parts, context)))
        return names

    def encode(self, block: Window, context: DecodeContext, hints: Hints) -> list[PartStreams]:
        """The streams of each part; those of a stack lie with the first of its parts.

        Raises:
            UnrepresentableError: a lossy chain met values it cannot represent.

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
        """The inverse of :meth:`encode`.

        Raises:
            CorruptError: the streams do not decode to these parts.

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
    """The hints for one array: mass where it is of every row, weights where there are some for every tensor."""
    mass = hints.mass if hints.mass is not None and len(hints.mass) == stack[0].length else None
    known = hints.weights or {}
    weights: list[NDArray[np.float32]] = [known[p.tensor.name] for p in stack if p.tensor.name in known]
    whole = np.concatenate(weights) if len(weights) == len(stack) else None
    return StackHints(mass, hints.frequencies, whole)

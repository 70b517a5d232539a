"""What a codec codes at once: one part, or the stack of all layers' parts of a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Part, Profile, Side
from kvpack.codecs.chain.pipeline import Bits, chain_of, decode, encode, stream_names
from kvpack.codecs.recipes import Codec
from kvpack.errors import UnsupportedError
from kvpack.kvp.layout import PartPlan

KINDS = ("keys", "values")


@dataclass(frozen=True)
class Unit:
    """Planned parts that are coded at once, in file order; each kind's streams lie with its first part."""

    plans: tuple[PartPlan, ...]
    codec: Codec
    profile: Profile | None = None
    side: Side = field(default=Side(), compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check that a stack can be built."""
        for stack in self._stacks():
            if len({(plan.tensor.dtype, plan.shape, plan.tensor.shape) for plan in stack}) > 1:
                raise UnsupportedError(
                    f"{self.codec.name} codes all layers as one, but {stack[0].name} and others differ in shape or "
                    "dtype: use a codec that codes each tensor by itself"
                )

    def _stacks(self) -> list[list[PartPlan]]:
        """Parts that are stacked, keys first, layers ascending; a lone part is a stack of one."""
        if not self.codec.stacked or self.plans[0].layer is None:
            return [[plan] for plan in self.plans]
        if self.codec.adaptive:
            return self._alike()
        kinds = [[plan for plan in self.plans if plan.tensor.name.endswith(f".{kind}")] for kind in KINDS]
        stacks = [sorted(kind, key=lambda plan: plan.layer or 0) for kind in kinds if kind]
        return [[plan for stack in stacks for plan in stack]] if self.codec.joint else stacks

    def _alike(self) -> list[list[PartPlan]]:
        """Joint stacks of parts of the same shape and dtype."""
        stacks: dict[tuple[object, ...], list[PartPlan]] = {}
        for plan in sorted(self.plans, key=lambda plan: (KINDS.index(_kind(plan)), plan.layer)):
            stacks.setdefault((plan.tensor.dtype, plan.shape, plan.tensor.shape), []).append(plan)
        return list(stacks.values())

    def _part(self, stack: list[PartPlan]) -> Part:
        plan = stack[0]
        heads, tokens, dims = plan.shape
        total = plan.tensor.shape[1] if plan.layer is not None else tokens
        ids, mass = self.side.tokens, self.side.mass
        side = Side(
            ids if ids is not None and len(ids) == total else None,
            mass if mass is not None and len(mass) == total else None,
            self.side.frequencies,
            _weights(self.side, stack),
        )
        return Part(
            plan.tensor.dtype,
            (len(stack) * heads, tokens, dims),
            plan.first,
            total,
            heads,
            keys=heads * sum(_kind(plan) == "keys" for plan in stack),
            profile=self.profile,
            side=side,
        )

    def joint_stack(self) -> tuple[list[PartPlan], Part]:
        """Of a joint codec: the parts in the order they are stacked in, and what they are as one."""
        (stack,) = self._stacks()
        return stack, self._part(stack)

    def stream_names(self) -> set[str]:
        """Names of all streams that :meth:`encode` gives."""
        names: set[str] = set()
        for stack in self._stacks():
            names.update(stream_names(chain_of(self.codec, stack[0].tensor.name), self._part(stack)))
        return names

    def encode(self, bits: Sequence[Bits]) -> list[list[tuple[str, bytes]]]:
        """Streams of each part, for bit patterns ``[H, T, D]`` of each.

        Raises:
            UnrepresentableError: a lossy chain met values it cannot represent.

        """
        streams: dict[PartPlan, list[tuple[str, bytes]]] = {plan: [] for plan in self.plans}
        given = dict(zip(self.plans, bits, strict=True))
        reference = None
        for stack in self._stacks():
            joined = given[stack[0]] if len(stack) == 1 else np.concatenate([given[plan] for plan in stack])
            chain = chain_of(self.codec, stack[0].tensor.name)
            first = next(plan for plan in self.plans if plan in stack)
            streams[first], decoded = encode(chain, joined, self._part(stack), reference)
            reference = decoded if reference is None else reference
        return [streams[plan] for plan in self.plans]

    def decode(self, streams: Sequence[list[tuple[str, memoryview]]]) -> list[Bits]:
        """The inverse of :meth:`encode`.

        Raises:
            CorruptError: streams that do not decode to these parts.

        """
        out: dict[PartPlan, Bits] = {}
        given = dict(zip(self.plans, streams, strict=True))
        reference = None
        for stack in self._stacks():
            chain = chain_of(self.codec, stack[0].tensor.name)
            mine = [stream for plan in self.plans if plan in stack for stream in given[plan]]
            joined, decoded = decode(chain, mine, self._part(stack), reference)
            reference = decoded if reference is None else reference
            heads = stack[0].shape[0]
            for i, plan in enumerate(stack):
                out[plan] = joined[i * heads : (i + 1) * heads]
        return [out[plan] for plan in self.plans]


def _kind(plan: PartPlan) -> str:
    return plan.tensor.name.rpartition(".")[2]


def _weights(side: Side, stack: list[PartPlan]) -> NDArray[np.float32] | None:
    """Weights of a stack's rows, where there are some of each of its tensors."""
    found = [side.weights[plan.tensor.name] for plan in stack if plan.tensor.name in (side.weights or ())]
    return np.concatenate(found) if len(found) == len(stack) else None


def units(plans: Sequence[PartPlan], stacked: bool) -> Iterator[tuple[PartPlan, ...]]:
    """Group a file's parts: one by one, or with ``stacked`` all layers' parts of a chunk together."""
    for layered, group in groupby(plans, key=lambda plan: plan.first if plan.layer is not None else None):
        members = tuple(group)
        if stacked and layered is not None:
            yield members
        else:
            yield from ((plan,) for plan in members)

"""Codecs: named lists of stages, one list for keys and one for values.

A file carries its codecs verbatim (:meth:`Codec.to_json`), so that a name here may get better settings later
without making old files unreadable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from kvpack.errors import FormatError, UsageError
from kvpack.stages.base import EntropyCoder, Quantizer, Stage, Transform
from kvpack.stages.entropy.rans import Rans
from kvpack.stages.entropy.zstd import Zstd
from kvpack.stages.quantizers.affine import Affine
from kvpack.stages.quantizers.byte_planes import BytePlanes
from kvpack.stages.quantizers.float_split import FloatSplit
from kvpack.stages.quantizers.lloyd_max import LloydMax
from kvpack.stages.registry import stage_from_json
from kvpack.stages.transforms.rotation import Rotation


@dataclass(frozen=True)
class Chain:
    """Transforms in order, a quantizer, an entropy coder."""

    transforms: tuple[Transform, ...]
    quantizer: Quantizer
    entropy: EntropyCoder

    def __post_init__(self) -> None:
        """Check that the stages fit together."""
        if self.quantizer.exact and self.transforms:
            raise ValueError(f"{self.quantizer.name} codes bit patterns: no transform can stand before it")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order."""
        return (*self.transforms, self.quantizer, self.entropy)

    def with_seed(self, seed: int) -> Chain:
        """The same with ``1000 * seed`` added to every stage's seed."""
        transforms = tuple(_reseeded(transform, seed) for transform in self.transforms)
        return Chain(transforms, _reseeded(self.quantizer, seed), self.entropy)

    def to_json(self) -> list[dict[str, Any]]:
        """The stages' JSON forms in order."""
        return [stage.to_json() for stage in self.stages]

    @classmethod
    def from_json(cls, document: Any) -> Chain:
        """Rebuild from :meth:`to_json`.

        Raises:
            FormatError: not a chain.
            UnsupportedError: a stage this kvpack does not have.

        """
        if not isinstance(document, list) or not 2 <= len(document) <= 16:
            raise FormatError("a codec's chain is not a list of stages")
        *transforms, quantizer, entropy = [stage_from_json(stage) for stage in document]
        checked = tuple(t for t in transforms if isinstance(t, Transform))
        if len(checked) != len(transforms) or not isinstance(quantizer, Quantizer):
            raise FormatError("a codec's stages stand in the wrong order")
        if not isinstance(entropy, EntropyCoder):
            raise FormatError("a codec's last stage is not an entropy coder")
        try:
            return cls(checked, quantizer, entropy)
        except ValueError as error:
            raise FormatError(str(error)) from None


@dataclass(frozen=True)
class Codec:
    """A named pipeline; ``lossless`` where both chains are exact."""

    name: str
    keys: Chain
    values: Chain

    @property
    def lossless(self) -> bool:
        """Whether every bit comes back."""
        return self.keys.quantizer.exact and self.values.quantizer.exact

    @property
    def seeded(self) -> bool:
        """Whether something in it is random."""
        return any(hasattr(stage, "seed") for stage in self.keys.stages + self.values.stages)

    def with_seed(self, seed: int) -> Codec:
        """The same with other random matrices; 0 gives the codec's own."""
        return replace(self, keys=self.keys.with_seed(seed), values=self.values.with_seed(seed)) if seed else self

    def to_json(self) -> dict[str, Any]:
        """The form that a file carries."""
        return {"name": self.name, "keys": self.keys.to_json(), "values": self.values.to_json()}

    @classmethod
    def from_json(cls, document: Any) -> Codec:
        """Rebuild from :meth:`to_json`; raises as :meth:`Chain.from_json`."""
        if not isinstance(document, dict) or set(document) != {"name", "keys", "values"}:
            raise FormatError("a codec is not {name, keys, values}")
        if not isinstance(document["name"], str):
            raise FormatError("a codec's name is not a string")
        return cls(document["name"], Chain.from_json(document["keys"]), Chain.from_json(document["values"]))


S = TypeVar("S", bound=Stage)


def _reseeded(stage: S, seed: int) -> S:
    changed: dict[str, Any] = {"seed": stage.seed + 1000 * seed} if hasattr(stage, "seed") else {}
    return replace(stage, **changed)


def _lossless() -> Codec:
    chain = Chain((), FloatSplit(), Rans())
    return Codec("lossless", chain, chain)


def _zstd() -> Codec:
    chain = Chain((), BytePlanes(), Zstd(level=3))
    return Codec("zstd", chain, chain)


def _kivi(bits: int) -> Codec:
    """KIVI as published: keys per channel over 32 tokens, values per token over 32 dimensions, 128 whole."""
    keys = Affine(bits=bits, axis="token", group=32, residual=128)
    values = Affine(bits=bits, axis="channel", group=32, residual=128)
    return Codec(f"kivi-{bits}", Chain((), keys, Rans()), Chain((), values, Rans()))


def _turboquant(bits: int, prod: bool) -> Codec:
    quantizer = LloydMax(bits=bits, prod=prod, seed=2)
    chain = Chain((Rotation(seed=1),), quantizer, Rans())
    return Codec(f"turboquant-{'prod-' if prod else ''}{bits}", chain, chain)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        _lossless(),
        _zstd(),
        *(_kivi(bits) for bits in (4, 3, 2)),
        *(_turboquant(bits, prod=False) for bits in (4, 3, 2, 1)),
        *(_turboquant(bits, prod=True) for bits in (4, 3, 2, 1)),
    )
}
"""Every codec the command line offers, by name; the first is the default."""


def codec_named(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UsageError: there is none; the message lists those there are.

    """
    if name not in CODECS:
        raise UsageError(f"no codec is named {name!r}; there are: {', '.join(CODECS)}")
    return CODECS[name]


def codecs_matching(names: Sequence[str]) -> list[Codec]:
    """Codecs by name or family (``kivi`` for all of KIVI's), or ``all``; in the order of :data:`CODECS`.

    Raises:
        UsageError: a name that is neither.

    """
    families = {name: family_of(name) for name in CODECS}
    for name in names:
        if name != "all" and name not in families.values():
            codec_named(name)
    return [codec for name, codec in CODECS.items() if {name, families[name], "all"} & set(names)]


def family_of(name: str) -> str:
    """A codec's name without its rate."""
    head, _, tail = name.rpartition("-")
    return head if head and tail.replace(".", "").isdigit() else name

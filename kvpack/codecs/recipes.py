"""Codecs: named lists of stages, one list for keys and one for values.

A file carries its codecs verbatim (:meth:`Codec.to_json`), so that a name here may get better settings later
without making old files unreadable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from kvpack.codecs.chain.base import EntropyCoder, Predictor, Quantizer, Stage, Transform
from kvpack.codecs.chain.entropy.deflate import Deflate
from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.codecs.chain.entropy.scaled_rans import ScaledRans
from kvpack.codecs.chain.entropy.zstd import Zstd
from kvpack.codecs.chain.keep import Keep
from kvpack.codecs.chain.predictors.cross_layer import CrossLayer
from kvpack.codecs.chain.quantizers.affine import Affine
from kvpack.codecs.chain.quantizers.anchor_delta import AnchorDelta
from kvpack.codecs.chain.quantizers.byte_planes import BytePlanes
from kvpack.codecs.chain.quantizers.component_groups import ComponentGroups
from kvpack.codecs.chain.quantizers.dead_zone import DeadZone
from kvpack.codecs.chain.quantizers.float_split import FloatSplit
from kvpack.codecs.chain.quantizers.higgs import Higgs
from kvpack.codecs.chain.quantizers.lloyd_max import LloydMax
from kvpack.codecs.chain.registry import stage_from_json
from kvpack.codecs.chain.transforms.klt import Klt
from kvpack.codecs.chain.transforms.merge_heads import MergeHeads
from kvpack.codecs.chain.transforms.rotation import Rotation
from kvpack.codecs.chain.transforms.token_klt import TokenKlt
from kvpack.codecs.chain.transforms.unrope import Unrope
from kvpack.codecs.low_rank import LowRank
from kvpack.errors import FormatError, UsageError


@dataclass(frozen=True)
class Chain:
    """What is kept whole, transforms in order, a predictor, a quantizer, an entropy coder."""

    keep: Keep | None
    transforms: tuple[Transform, ...]
    predictor: Predictor | None
    quantizer: Quantizer
    entropy: EntropyCoder

    @classmethod
    def of(cls, *stages: Stage) -> Self:
        """A chain of stages in their order: keep?, transforms, predictor?, quantizer, entropy coder.

        Raises:
            ValueError: stages that are missing, stand in another order, or do not fit together.

        """
        rest = list(stages)
        keep = rest.pop(0) if rest and isinstance(rest[0], Keep) else None
        transforms = []
        while rest and isinstance(rest[0], Transform):
            transforms.append(rest.pop(0))
        predictor = rest.pop(0) if rest and isinstance(rest[0], Predictor) else None
        if len(rest) != 2 or not isinstance(rest[0], Quantizer) or not isinstance(rest[1], EntropyCoder):
            raise ValueError("a codec's stages stand in the wrong order")
        if rest[0].exact and len(stages) > 2:
            raise ValueError(f"{rest[0].name} codes bit patterns: nothing can stand before it")
        return cls(keep, tuple(transforms), predictor, rest[0], rest[1])  # type: ignore[arg-type]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order."""
        every = (self.keep, *self.transforms, self.predictor, self.quantizer, self.entropy)
        return tuple(stage for stage in every if stage is not None)

    def with_seed(self, seed: int) -> Self:
        """The same with ``1000 * seed`` added to every stage's seed."""
        return self.of(*(_reseeded(stage, seed) for stage in self.stages))

    def to_json(self) -> list[dict[str, Any]]:
        """The stages' JSON forms in order."""
        return [stage.to_json() for stage in self.stages]

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """Rebuild from :meth:`to_json`.

        Raises:
            FormatError: not a chain.
            UnsupportedError: a stage this kvpack does not have.

        """
        if not isinstance(document, list) or not 2 <= len(document) <= 16:
            raise FormatError("a codec's chain is not a list of stages")
        try:
            return cls.of(*map(stage_from_json, document))
        except ValueError as error:
            raise FormatError(str(error)) from None


@dataclass(frozen=True)
class Codec:
    """A named pipeline. With ``stacked`` the keys (and the values) of all layers of a chunk are coded as one."""

    name: str
    stacked: bool
    keys: Chain
    values: Chain

    def __post_init__(self) -> None:
        """Check that stages which need a stack get one."""
        if not self.stacked and any(stage.stacked for stage in self.stages):
            raise ValueError("a stage needs the stack of all layers")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages of both chains."""
        return self.keys.stages + self.values.stages

    @property
    def lossless(self) -> bool:
        """Whether every bit comes back."""
        return self.keys.quantizer.exact and self.values.quantizer.exact

    @property
    def joint(self) -> bool:
        """Whether keys and values of all layers are coded as one, by the chain for keys."""
        return any(stage.joint for stage in self.stages)

    @property
    def adaptive(self) -> bool:
        """Whether it learns from each capture what it needs: layers may differ in shape."""
        return any(stage.adaptive for stage in self.stages)

    @property
    def profiled(self) -> bool:
        """Whether it needs a calibration profile."""
        return any(stage.profiled for stage in self.stages)

    @property
    def seeded(self) -> bool:
        """Whether something in it is random."""
        return any(hasattr(stage, "seed") for stage in self.stages)

    def with_seed(self, seed: int) -> Codec:
        """The same with other random matrices; 0 gives the codec's own."""
        return replace(self, keys=self.keys.with_seed(seed), values=self.values.with_seed(seed)) if seed else self

    def to_json(self) -> dict[str, Any]:
        """The form that a file carries."""
        return {
            "name": self.name,
            "stacked": self.stacked,
            "keys": self.keys.to_json(),
            "values": self.values.to_json(),
        }

    @classmethod
    def from_json(cls, document: Any) -> Codec:
        """Rebuild from :meth:`to_json`; raises as :meth:`Chain.from_json`."""
        if not isinstance(document, dict) or set(document) != {"name", "stacked", "keys", "values"}:
            raise FormatError("a codec is not {name, stacked, keys, values}")
        if not isinstance(document["name"], str) or not isinstance(document["stacked"], bool):
            raise FormatError("a codec's name or its stacking has the wrong type")
        chains = Chain.from_json(document["keys"]), Chain.from_json(document["values"])
        try:
            return cls(document["name"], document["stacked"], *chains)
        except ValueError as error:
            raise FormatError(str(error)) from None


S = TypeVar("S", bound=Stage)


def _reseeded(stage: S, seed: int) -> S:
    changed: dict[str, Any] = {"seed": stage.seed + 1000 * seed} if hasattr(stage, "seed") else {}
    return replace(stage, **changed)


def _lossless() -> Codec:
    chain = Chain.of(FloatSplit(), Rans())
    return Codec("lossless", False, chain, chain)


def _zstd() -> Codec:
    chain = Chain.of(BytePlanes(), Zstd(level=3))
    return Codec("zstd", False, chain, chain)


def _kivi(bits: int) -> Codec:
    """KIVI as published: keys per channel over 32 tokens, values per token over 32 dimensions, 128 whole."""
    keep = Keep(first=0, last=128, group=32)
    keys = Chain.of(keep, Affine(bits=bits, axis="token", group=32), Rans())
    values = Chain.of(keep, Affine(bits=bits, axis="channel", group=32), Rans())
    return Codec(f"kivi-{bits}", False, keys, values)


def _turboquant(bits: int, prod: bool) -> Codec:
    chain = Chain.of(Rotation(seed=1), LloydMax(bits=bits, prod=prod, seed=2), Rans())
    return Codec(f"turboquant-{'prod-' if prod else ''}{bits}", False, chain, chain)


def _cachegen(bits: int) -> Codec:
    """CacheGen: 32 bins in the leading layers, 16 after them, at ``bits`` 4; half or twice as many at 3 and 5."""
    leading, rest = 2 << bits, 1 << bits
    chains = (
        Chain.of(MergeHeads(), AnchorDelta(leading_bins=leading, bins=rest, leading=layers, group=10), Rans())
        for layers in (10, 2)
    )
    return Codec(f"cachegen-{bits}", True, *chains)


def _kvtc(rate: str, window: bool) -> Codec:
    """KVTC, ``rate`` bits an element before DEFLATE; first 4 and, with the window, last 128 tokens whole."""
    keep = Keep(first=4, last=128 if window else 0, group=1)
    coefficients = {
        tensor: (Klt(section=f"kvtc.{tensor}"), ComponentGroups(section=f"kvtc.{tensor}", plan=rate), Deflate(level=9))
        for tensor in ("keys", "values")
    }
    name = f"kvtc-{rate}" if window else f"kvtc-all-{rate}"
    return Codec(name, True, Chain.of(keep, Unrope(), *coefficients["keys"]), Chain.of(keep, *coefficients["values"]))


def _aquakv(bits: int) -> Codec:
    """AQUA-KV: first 4 and last 128 tokens whole, keys before RoPE, residuals by HIGGS."""
    keep, quantizer = Keep(first=4, last=128, group=1), Higgs(bits=bits, seed=3)
    keys, values = (CrossLayer(section=f"aquakv-{bits}.{tensor}") for tensor in ("keys", "values"))
    return Codec(
        f"aquakv-{bits}",
        True,
        Chain.of(keep, Unrope(), MergeHeads(), keys, quantizer, Rans()),
        Chain.of(keep, MergeHeads(), values, quantizer, Rans()),
    )


FISHER_IMPORTANCE = 25


def fisher(log_step: int, importance: int = FISHER_IMPORTANCE, name: str = "fisher") -> Codec:
    """kvpack's own codec (``docs/fisher.md``), at a step of ``2 ** (log_step / 32)`` in units of its calibration."""
    quantizer = DeadZone(section="fisher", log_step=log_step, importance=importance)
    chain = Chain.of(TokenKlt(section="fisher"), quantizer, ScaledRans())
    return Codec(name, True, chain, chain)


def fisher_log_step(level: int) -> int:
    """The step of ``fisher-{level}``: half an octave finer a level, which halves the squared error."""
    return -170 - 16 * level


FISHER_LEVELS = (8, 7, 6, 5, 4, 3, 2, 1)

LOCAL_IMPORTANCE = 10


def local(log_step: int, importance: int = LOCAL_IMPORTANCE, name: str = "local") -> Codec:
    """kvpack's own codec without a profile (``docs/fisher.md``), at a step of ``2 ** (log_step / 32)`` deviations."""
    chain = Chain.of(LowRank(log_step=log_step, importance=importance), ScaledRans())
    return Codec(name, True, chain, chain)


def local_log_step(level: int) -> int:
    """The step of ``local-{level}``: half an octave finer a level, which halves the squared error."""
    return 48 - 16 * level


LOCAL_LEVELS = (8, 7, 6, 5, 4, 3, 2, 1)

KVTC_RATES = ("2", "1", "0.5", "0.25")
"""Bits an element, before DEFLATE, that profiles have plans for."""

AQUAKV_BITS = (4, 3, 2)

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        _lossless(),
        _zstd(),
        *(_kivi(bits) for bits in (4, 3, 2)),
        *(_turboquant(bits, prod=False) for bits in (4, 3, 2, 1)),
        *(_turboquant(bits, prod=True) for bits in (4, 3, 2, 1)),
        *(fisher(fisher_log_step(level), name=f"fisher-{level}") for level in FISHER_LEVELS),
        *(local(local_log_step(level), name=f"local-{level}") for level in LOCAL_LEVELS),
        *(_cachegen(bits) for bits in (5, 4, 3)),
        *(_aquakv(bits) for bits in AQUAKV_BITS),
        *(_kvtc(rate, window) for window in (True, False) for rate in KVTC_RATES),
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

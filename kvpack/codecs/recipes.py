"""The codecs that kvpack offers by name: lists of stages with their settings.

A file carries its codecs verbatim (:meth:`kvpack.codecs.protocol.Codec.to_json`), so that a name here may get better
settings later without making old files unreadable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvpack.codecs.chain.chain import Chain
from kvpack.codecs.chain.codec import ChainCodec
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
from kvpack.codecs.chain.transforms.klt import Klt
from kvpack.codecs.chain.transforms.merge_heads import MergeHeads
from kvpack.codecs.chain.transforms.rotation import Rotation
from kvpack.codecs.chain.transforms.token_klt import TokenKlt
from kvpack.codecs.chain.transforms.unrope import Unrope
from kvpack.codecs.low_rank import LowRank
from kvpack.codecs.low_rank.codec import LowRankCodec
from kvpack.codecs.protocol import Codec
from kvpack.errors import UsageError


def _lossless() -> ChainCodec:
    chain = Chain.of(FloatSplit(), Rans())
    return ChainCodec("lossless", False, chain, chain)


def _zstd() -> ChainCodec:
    chain = Chain.of(BytePlanes(), Zstd(level=3))
    return ChainCodec("zstd", False, chain, chain)


def _kivi(bits: int) -> ChainCodec:
    """KIVI as published: keys per channel over 32 tokens, values per token over 32 dimensions, 128 whole."""
    keep = Keep(first=0, last=128, group=32)
    keys = Chain.of(keep, Affine(bits=bits, axis="token", group=32), Rans())
    values = Chain.of(keep, Affine(bits=bits, axis="channel", group=32), Rans())
    return ChainCodec(f"kivi-{bits}", False, keys, values)


def _turboquant(bits: int, prod: bool) -> ChainCodec:
    chain = Chain.of(Rotation(seed=1), LloydMax(bits=bits, prod=prod, seed=2), Rans())
    return ChainCodec(f"turboquant-{'prod-' if prod else ''}{bits}", False, chain, chain)


def _cachegen(bits: int) -> ChainCodec:
    """CacheGen: 32 bins in the leading layers, 16 after them, at ``bits`` 4; half or twice as many at 3 and 5."""
    leading, rest = 2 << bits, 1 << bits
    chains = (
        Chain.of(MergeHeads(), AnchorDelta(leading_bins=leading, bins=rest, leading=layers, group=10), Rans())
        for layers in (10, 2)
    )
    return ChainCodec(f"cachegen-{bits}", True, *chains)


def _kvtc(rate: str, window: bool) -> ChainCodec:
    """KVTC, ``rate`` bits an element before DEFLATE; first 4 and, with the window, last 128 tokens whole."""
    keep = Keep(first=4, last=128 if window else 0, group=1)
    coefficients = {
        tensor: (Klt(section=f"kvtc.{tensor}"), ComponentGroups(section=f"kvtc.{tensor}", plan=rate), Deflate(level=9))
        for tensor in ("keys", "values")
    }
    name = f"kvtc-{rate}" if window else f"kvtc-all-{rate}"
    return ChainCodec(
        name, True, Chain.of(keep, Unrope(), *coefficients["keys"]), Chain.of(keep, *coefficients["values"])
    )


def _aquakv(bits: int) -> ChainCodec:
    """AQUA-KV: first 4 and last 128 tokens whole, keys before RoPE, residuals by HIGGS."""
    keep, quantizer = Keep(first=4, last=128, group=1), Higgs(bits=bits, seed=3)
    keys, values = (CrossLayer(section=f"aquakv-{bits}.{tensor}") for tensor in ("keys", "values"))
    return ChainCodec(
        f"aquakv-{bits}",
        True,
        Chain.of(keep, Unrope(), MergeHeads(), keys, quantizer, Rans()),
        Chain.of(keep, MergeHeads(), values, quantizer, Rans()),
    )


FISHER_IMPORTANCE = 25


def fisher(log_step: int, importance: int = FISHER_IMPORTANCE, name: str = "fisher") -> ChainCodec:
    """kvpack's own codec (``docs/fisher.md``), at a step of ``2 ** (log_step / 32)`` in units of its calibration."""
    quantizer = DeadZone(section="fisher", log_step=log_step, importance=importance)
    chain = Chain.of(TokenKlt(section="fisher"), quantizer, ScaledRans())
    return ChainCodec(name, True, chain, chain)


def fisher_log_step(level: int) -> int:
    """The step of ``fisher-{level}``: half an octave finer a level, which halves the squared error."""
    return -170 - 16 * level


FISHER_LEVELS = (8, 7, 6, 5, 4, 3, 2, 1)

LOCAL_IMPORTANCE = 10


def local(log_step: int, importance: int = LOCAL_IMPORTANCE, name: str = "local") -> LowRankCodec:
    """kvpack's own codec without a profile (``docs/fisher.md``), at a step of ``2 ** (log_step / 32)`` deviations."""
    chain = Chain.of(LowRank(log_step=log_step, importance=importance), ScaledRans())
    return LowRankCodec(name, True, chain, chain)


def local_log_step(level: int) -> int:
    """The step of ``local-{level}``: half an octave finer a level, which halves the squared error."""
    return 48 - 16 * level


LOCAL_LEVELS = (8, 7, 6, 5, 4, 3, 2, 1)

KVTC_RATES = ("2", "1", "0.5", "0.25")
"""Bits an element, before DEFLATE, that profiles have plans for."""

AQUAKV_BITS = (4, 3, 2)


def _every() -> Iterable[Codec]:
    """All named codecs, the default first."""
    yield _lossless()
    yield _zstd()
    yield from (_kivi(bits) for bits in (4, 3, 2))
    yield from (_turboquant(bits, prod) for prod in (False, True) for bits in (4, 3, 2, 1))
    yield from (fisher(fisher_log_step(level), name=f"fisher-{level}") for level in FISHER_LEVELS)
    yield from (local(local_log_step(level), name=f"local-{level}") for level in LOCAL_LEVELS)
    yield from (_cachegen(bits) for bits in (5, 4, 3))
    yield from (_aquakv(bits) for bits in AQUAKV_BITS)
    yield from (_kvtc(rate, window) for window in (True, False) for rate in KVTC_RATES)


CODECS: dict[str, Codec] = {codec.name: codec for codec in _every()}
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

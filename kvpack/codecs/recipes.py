"""The codecs that kvpack offers by name: lists of stages with their settings.

A file carries its codecs verbatim (:meth:`kvpack.codecs.protocol.Codec.to_json`). A name here may therefore get better
settings later, and old files stay readable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches

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
from kvpack.codecs.protocol import Codec, Need
from kvpack.codecs.replay import ReplayCodec
from kvpack.errors import UsageError


def _lossless() -> ChainCodec:
    chain = Chain.of(FloatSplit(), Rans())
    return ChainCodec("lossless", False, chain, chain)


def _zstd() -> ChainCodec:
    chain = Chain.of(BytePlanes(), Zstd(level=3))
    return ChainCodec("zstd", False, chain, chain)


def _kivi(bits: int) -> ChainCodec:
    """Return KIVI as published: keys by channel in groups of 32 tokens, values by token in groups of 32 dimensions.

    The last 128 tokens are kept whole.
    """
    keep = Keep(first=0, last=128, group=32)
    keys = Chain.of(keep, Affine(bits=bits, axis="token", group=32), Rans())
    values = Chain.of(keep, Affine(bits=bits, axis="channel", group=32), Rans())
    return ChainCodec(f"kivi-{bits}", False, keys, values)


def _turboquant(bits: int, prod: bool) -> ChainCodec:
    chain = Chain.of(Rotation(seed=1), LloydMax(bits=bits, prod=prod, seed=2), Rans())
    return ChainCodec(f"turboquant-{'prod-' if prod else ''}{bits}", False, chain, chain)


def _cachegen(bits: int) -> ChainCodec:
    """Return CacheGen. With ``bits`` 4, the leading layers have 32 bins and the others 16.

    The numbers of bins are half as large with 3 bits, and twice as large with 5.
    """
    leading, rest = 2 << bits, 1 << bits
    chains = (
        Chain.of(MergeHeads(), AnchorDelta(leading_bins=leading, bins=rest, leading=layers, group=10), Rans())
        for layers in (10, 2)
    )
    return ChainCodec(f"cachegen-{bits}", True, *chains)


def _kvtc(rate: str, window: bool) -> ChainCodec:
    """Return KVTC with ``rate`` bits per element before DEFLATE.

    The first 4 tokens are kept whole and, with ``window``, the last 128.
    """
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
    """Return AQUA-KV, which codes keys as before RoPE and residuals by HIGGS.

    The first 4 and the last 128 tokens are kept whole.
    """
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
    """Return kvpack's codec (``docs/fisher.md``), at a step of ``2 ** (log_step / 32)`` in its calibration's units."""
    quantizer = DeadZone(section="fisher", log_step=log_step, importance=importance)
    chain = Chain.of(TokenKlt(section="fisher"), quantizer, ScaledRans())
    return ChainCodec(name, True, chain, chain)


def fisher_log_step(level: int) -> int:
    """Return the step of ``fisher-{level}``: half an octave finer for each level, which halves the squared error."""
    return -170 - 16 * level


FISHER_LEVELS = (8, 7, 6, 5, 4, 3, 2, 1)

LOCAL_IMPORTANCE = 10


def local(log_step: int, importance: int = LOCAL_IMPORTANCE, name: str = "local") -> LowRankCodec:
    """Return kvpack's codec without a profile, at a step of ``2 ** (log_step / 32)`` deviations (docs/fisher.md)."""
    chain = Chain.of(LowRank(log_step=log_step, importance=importance), ScaledRans())
    return LowRankCodec(name, True, chain, chain)


def local_log_step(level: int) -> int:
    """Return the step of ``local-{level}``: half an octave finer for each level, which halves the squared error."""
    return 48 - 16 * level


LOCAL_LEVELS = (8, 7, 6, 5, 4, 3, 2, 1)

KVTC_RATES = ("2", "1", "0.5", "0.25")
"""The rates, in bits per element before DEFLATE, for which profiles have plans."""

AQUAKV_BITS = (4, 3, 2)


def _every() -> Iterable[Codec]:
    """Yield all named codecs, beginning with the default."""
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
"""Every codec that works without a model, by name. The first one is the default."""


MODEL_CODECS: dict[str, Codec] = {"replay": ReplayCodec()}
"""Codecs that run the model that made the cache, by name."""


def codec_names() -> list[str]:
    """Return the names of all codecs, beginning with the default."""
    return [*CODECS, *MODEL_CODECS]


def codec_named(name: str) -> Codec:
    """Return the codec of that name.

    Raises:
        UsageError: There is no such codec. The message names those with similar names.

    """
    found = CODECS.get(name) or MODEL_CODECS.get(name)
    if found is None:
        near = " or ".join(get_close_matches(name, codec_names(), 2))
        hint = f"did you mean {near}? " if near else ""
        raise UsageError(f"no codec is named {name!r}: {hint}kvpack compress --list-codecs lists all")
    return found


PREFIX = "-prefix"
"""Ends the names of codecs that :func:`prefix_stable` derives from those of :data:`CODECS`."""


def prefix_stable(codec: Codec) -> Codec:
    """Return the codec itself if its frames do not depend on what follows, or else its nearest variant like that.

    The variant keeps no last tokens whole, does not arrange tokens in groups that begin behind kept ones, and codes
    all tokens alike, however far from the end they are. It is named ``{name}-prefix``, unless it is one of
    :data:`CODECS`.

    Raises:
        UsageError: There is no such variant.

    """
    if Need.MODEL in codec.traits.needs:
        raise UsageError(f"{codec.name} runs the model over a whole text: it cannot code a part of one")
    if codec.traits.prefix_stable:
        return codec
    if isinstance(codec, ChainCodec):
        keys, values = _prefix_stable(codec.keys), _prefix_stable(codec.values)
        found = replace(codec, name=codec.name + PREFIX, keys=keys, values=values)
        if found.traits.prefix_stable:
            return next((known for known in CODECS.values() if _chains(known) == _chains(found)), found)
    raise UsageError(f"{codec.name} codes tokens by what follows them, and has no variant that does not")


def _chains(codec: Codec) -> dict[str, object]:
    return {**codec.to_json(), "name": None}


def _prefix_stable(chain: Chain) -> Chain:
    keep, quantizer = chain.keep, chain.quantizer
    if keep is not None and not keep.prefix_stable:
        keep = Keep(first=keep.first, last=0, group=1) if keep.first else None
    if isinstance(quantizer, DeadZone | LowRank):
        quantizer = replace(quantizer, importance=0)
    return replace(chain, keep=keep, quantizer=quantizer)


def codecs_matching(names: Sequence[str]) -> list[Codec]:
    """Return the codecs of these names or families (``kivi`` is a family), or ``all``, in the order of
    :func:`codec_names`.

    Raises:
        UsageError: A name is neither a codec nor a family.

    """
    families = {name: family_of(name) for name in codec_names()}
    for name in names:
        if name != "all" and name not in families.values():
            codec_named(name)
    return [codec_named(name) for name, family in families.items() if {name, family, "all"} & set(names)]


def family_of(name: str) -> str:
    """Return a codec's name without its rate."""
    head, _, tail = name.rpartition("-")
    return head if head and tail.replace(".", "").isdigit() else name

"""What each family of codecs is, in a line, for people who choose one. What codecs can do, they say themselves."""

from __future__ import annotations

from dataclasses import dataclass

from kvpack.codecs.protocol import Codec
from kvpack.codecs.recipes import codec_named, codec_names, family_of

MEASURED = "SmolLM2-135M's bf16 cache of 1,792 tokens of English prose"
"""What the bits of :data:`ABOUT` were measured on: docs/benchmarks.md has the commands.

Those of ``replay`` are of 2,048 tokens (docs/replay.md): 17.0 bits a token, which has 11,520 elements.
"""

ABOUT: dict[str, tuple[float, float, str]] = {
    "lossless": (10.44, 10.44, "the default; kvpack's own"),
    "zstd": (11.16, 11.16, "zstandard, to compare with"),
    "kivi": (5.009, 3.033, "KIVI: rounds in groups of 32"),
    "turboquant": (3.612, 0.9818, "TurboQuant: rotates, then rounds"),
    "turboquant-prod": (3.840, 1.146, "TurboQuant for unbiased products"),
    "fisher": (0.2811, 0.02016, "kvpack's own, and the smallest"),
    "local": (2.617, 0.2019, "kvpack's own: learns from the file"),
    "cachegen": (4.498, 2.506, "CacheGen: differences of tokens"),
    "aquakv": (4.472, 2.669, "AQUA-KV: layers predict layers"),
    "kvtc": (2.542, 1.131, "KVTC, with 132 tokens kept whole"),
    "kvtc-all": (1.766, 0.2463, "KVTC, with 4 tokens kept whole"),
    "replay": (0.00148, 0.00148, "the text: the model runs to read it"),
}
"""By family: the bits an element of its largest and of its smallest codec on :data:`MEASURED`, and what it is."""


@dataclass(frozen=True)
class Family:
    """Codecs that differ by their rate alone, the largest first, and what is said of them.

    ``most`` and ``least`` are measured bits an element, of 16 in an uncompressed cache.
    """

    name: str
    codecs: tuple[Codec, ...]
    most: float
    least: float
    about: str


def families() -> list[Family]:
    """Return all families of codecs, in the order of :func:`kvpack.codecs.recipes.codec_names`."""
    found: dict[str, list[Codec]] = {}
    for name in codec_names():
        found.setdefault(family_of(name), []).append(codec_named(name))
    return [Family(name, tuple(codecs), *ABOUT[name]) for name, codecs in found.items()]

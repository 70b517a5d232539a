"""Lists all stages by wire name. To add a stage, write its folder and add its class here."""

from __future__ import annotations

from typing import Any

from kvpack.codecs.chain.base import Stage
from kvpack.codecs.chain.entropy.bitpack import BitPack
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
from kvpack.errors import FormatError, UnsupportedError


def _index(*stages: type[Stage]) -> dict[str, type[Stage]]:
    index: dict[str, type[Stage]] = {}
    for stage in stages:
        if stage.name in index:
            raise ValueError(f"two stages are named {stage.name!r}")
        index[stage.name] = stage
    return index


STAGES = _index(
    *(Keep, Rotation, Unrope, MergeHeads, Klt, TokenKlt, CrossLayer),
    *(FloatSplit, BytePlanes, Affine, LloydMax, AnchorDelta, ComponentGroups, Higgs, DeadZone, LowRank),
    *(BitPack, Rans, ScaledRans, Zstd, Deflate),
)
"""All stages by wire name."""


def stage_from_json(document: Any) -> Stage:
    """Return the stage that ``{"name", "version", "configuration"}`` from a file describes.

    Raises:
        FormatError: The document does not have this form, or its configuration is invalid.
        UnsupportedError: This kvpack does not have the stage or its version.

    """
    if not isinstance(document, dict) or set(document) != {"name", "version", "configuration"}:
        raise FormatError("a stage is not {name, version, configuration}")
    name, version, configuration = document["name"], document["version"], document["configuration"]
    if not isinstance(name, str) or not isinstance(version, int) or not isinstance(configuration, dict):
        raise FormatError("a stage's name, version or configuration has the wrong type")
    stage = STAGES.get(name)
    if stage is None or stage.version != version:
        raise UnsupportedError(f"needs the stage {name!r} version {version}: upgrade kvpack")
    return stage.from_configuration(configuration)

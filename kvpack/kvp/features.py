"""The critical features of the ``.kvp`` format: what a file may use that readers of format 1.0 do not know.

Each feature has a bit in the prologue. A reader that does not know a bit refuses the file, so that it never misreads
one. The section "Format 1.1" of ``docs/format.md`` is the specification and lists the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvpack.kvp.header import Header, runs_model

FIRST_VERSION = (1, 0)
"""The version of files that use no critical feature."""

NEWER_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"})
"""The safetensors dtypes that readers of format 1.0 reject as malformed."""


@dataclass(frozen=True)
class Feature:
    """One critical feature.

    ``bit`` is its position in the prologue's field, counted from the least significant bit. ``since`` is the version of
    the format that introduced it. ``used_by`` tells from the file's header whether the file uses it.
    """

    bit: int
    name: str
    since: tuple[int, int]
    used_by: Callable[[Header], bool]

    @property
    def mask(self) -> int:
        """Return the feature's bit as a number."""
        return 1 << self.bit


def _has_newer_dtypes(header: Header) -> bool:
    return any(spec.dtype in NEWER_DTYPES for spec in header.source_header().tensors)


def _is_replayed(header: Header) -> bool:
    return any(map(runs_model, header.codecs))


def _has_origin(header: Header) -> bool:
    return header.origin is not None


FEATURES = (
    Feature(0, "newer dtypes", (1, 1), _has_newer_dtypes),
    Feature(1, "replay", (1, 1), _is_replayed),
    Feature(2, "origin", (1, 1), _has_origin),
    Feature(3, "compact source header", (1, 1), lambda header: header.compact),
)
"""Every critical feature, by its bit. A later version of the format adds to this and never takes away."""

KNOWN_CRITICAL = sum(feature.mask for feature in FEATURES)
"""The bits of all features that this kvpack reads."""

VERSION = max((feature.since for feature in FEATURES), default=FIRST_VERSION)
"""The newest version of the format that this kvpack writes. It reads every minor version of the same major one."""


def critical_of(header: Header) -> int:
    """Return the bits of the features that a file with this header uses."""
    return sum(feature.mask for feature in FEATURES if feature.used_by(header))


def written_version(critical: int) -> tuple[int, int]:
    """Return the oldest version of the format that has all these features. Files that use them carry this version."""
    return max((feature.since for feature in FEATURES if feature.mask & critical), default=FIRST_VERSION)


def names_of(critical: int) -> list[str]:
    """Return the names of the features with these bits."""
    return [feature.name for feature in FEATURES if feature.mask & critical]

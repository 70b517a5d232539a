"""Sends a capture through a codec's real file and back, and measures sizes and seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from kvpack import jobs
from kvpack.cache.metadata import parse_metadata
from kvpack.capture import Model, ReplayModel
from kvpack.codecs.protocol import Codec, Need
from kvpack.formats.source import Capture
from kvpack.formats.temporary import scratch
from kvpack.jobs.reader import KvpFile
from kvpack.kvp.breakdown import Breakdown, breakdown
from kvpack.kvp.inspection import inspect
from kvpack.profiles import Profile


@dataclass(frozen=True)
class Coded:
    """A capture after a codec's file.

    ``size`` is the file's in bytes, ``bytes`` says where they went, ``ratio`` is the uncompressed size of what it holds
    over it. Seconds are those of the second of two runs, so that compilation is not counted.
    """

    cache: Capture
    size: int
    bytes: Breakdown
    ratio: float
    bits_per_element: float
    compress_seconds: float
    decompress_seconds: float


def needs_model(codec: Codec) -> bool:
    """Return whether the codec's decoder runs the model."""
    return Need.MODEL in codec.traits.needs


def can_replay(path: Path, model: Model | None) -> bool:
    """Return whether ``model`` may compute the capture ``path`` again: it records how, and the dtype is the model's."""
    metadata = parse_metadata(Capture.open(path).metadata)
    return model is not None and metadata.schedule is not None and metadata.dtype in (model.dtype, None)


def through_file(path: Path, codec: Codec, profile: Profile | None, model: Model | None) -> Coded:
    """Compress the capture ``path`` without probes and decompress it again, to temporary files that have no name.

    The errors are those of :func:`kvpack.jobs.compress` and :func:`kvpack.jobs.decompress`.
    """
    runs = ReplayModel(model) if model is not None and needs_model(codec) else None
    seconds: list[tuple[float, float]] = []
    for _ in range(2):
        with scratch() as (packing, packed), scratch() as (unpacking, back):
            start = time.perf_counter()
            jobs.compress(path, packing, codec, profile=profile, drop=jobs.PROBES, model=runs)
            packing.flush()
            middle = time.perf_counter()
            jobs.decompress(KvpFile.open(packed, profile, model=runs), unpacking)
            unpacking.flush()
            seconds.append((middle - start, time.perf_counter() - middle))
            look, pieces, cache = inspect(packed), breakdown(packed), Capture.open(back)
    return Coded(cache, look.size, pieces, look.ratio, look.bits_per_element or 0.0, *seconds[-1])

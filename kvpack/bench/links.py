"""Computes how slow a link must be before it pays to send fewer bytes and to compute more.

To load a cache takes the time of sending its bytes and the time of decoding them: ``bytes / speed + seconds``. Both
parts are measured; the speed of the link is the reader's. Of two ways, the one with fewer bytes and more seconds is
faster below the speed at which the two times are equal, and slower above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from kvpack.bench.results import RECOMPUTE, REPLAY, Interval, Row, Summary


def speed_below(small: tuple[float, float], large: tuple[float, float]) -> float:
    """Return the link speed in bytes per second below which the way ``small`` is faster than ``large``.

    Each way is its bytes and its seconds of decoding. Infinity means at every speed: ``small`` takes neither more bytes
    nor more seconds. 0 means that there is no such speed.
    """
    saved, longer = large[0] - small[0], small[1] - large[1]
    if longer <= 0:
        return math.inf if saved >= 0 else 0.0
    return max(saved, 0.0) / longer


def with_links(rows: Sequence[Row], summaries: Sequence[Summary]) -> list[Summary]:
    """Add two figures to the summaries of codecs, in bytes per second, from their rows' means over documents.

    ``raw_below`` is the speed below which the codec's file is faster than the uncompressed cache, and ``replay_below``
    that below which replay is faster than the codec's file. Replay's bytes and seconds are those of the codec
    ``replay`` where the rows have it, else those of ``recompute``. Without either, ``replay_below`` is left out.
    """
    ways = {summary.codec: found for summary in summaries if (found := _way(rows, summary.codec)) is not None}
    replay = REPLAY if REPLAY in ways else RECOMPUTE
    done = []
    for summary in summaries:
        figures = dict(summary.figures)
        if summary.codec in ways:
            raw, *way = ways[summary.codec]
            figures["raw_below"] = Interval(speed_below((way[0], way[1]), (raw, 0.0)), None)
            if replay in ways and summary.codec not in (replay, RECOMPUTE):
                figures["replay_below"] = Interval(speed_below(ways[replay][1:], (way[0], way[1])), None)
        done.append(replace(summary, figures=figures))
    return done


def _way(rows: Sequence[Row], codec: str) -> tuple[float, float, float] | None:
    """Bytes of the uncompressed cache, bytes of the file and seconds of decoding; None where no file was measured."""
    documents: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        if row.codec == codec:
            if row.size is None or row.ratio is None or row.decompress_seconds is None:
                return None
            documents.setdefault(row.document_sha256, []).append(
                (row.ratio * row.size, float(row.size), row.decompress_seconds)
            )
    means = [[mean(column) for column in zip(*some, strict=True)] for some in documents.values()]
    raw, size, seconds = (mean(column) for column in zip(*means, strict=True))
    return raw, size, seconds


def show_speed(speed: float) -> str:
    """Return a link speed in words: ``any``, ``never``, or bytes per second with a unit."""
    if math.isinf(speed):
        return "any"
    if speed <= 0:
        return "never"
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6)):
        if speed >= size:
            return f"{speed / size:.3g} {unit}"
    return f"{speed / 1e3:.3g} kB/s"

"""Find what a store holds of a text: walk from a kind along the objects whose tokens the text has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvpack.errors import KvpackError
from kvpack.store.keys import Ids, object_name, object_names
from kvpack.store.objects import Entry, open_object
from kvpack.store.place import Store

Wanted = Callable[[int], Collection[str]]
"""A function that says how an object may have been made, from the position in the text behind its last token."""

MAX_COMPARED = 64
"""The most objects behind one parent whose tokens are compared with a text, those that were used last first."""


@dataclass(frozen=True)
class Step:
    """An object on a text's way: its parent, its name, and the range ``[start, stop)`` of the text that it holds."""

    parent: str
    name: str
    start: int
    stop: int


def follow(
    store: Store, kind: str, tokens: Ids, window: int, wanted: Wanted, least: int = 1
) -> Iterator[tuple[Step, ...]]:
    """Yield every way from a kind along objects that lie whole in the text, each as long as it can be.

    Objects of fewer than ``least`` tokens are taken only where they end the text. The empty way is among them if
    nothing fits.
    """
    ways: list[tuple[Step, ...]] = [()]
    while ways:
        way = ways.pop()
        parent, at = (way[-1].name, way[-1].stop) if way else (kind, 0)
        further = [
            Step(parent, name, at, stop)
            for name, stop in _fitting(store, parent, tokens, at, window, wanted)
            if stop - at >= least or stop == len(tokens)
        ]
        if further:
            ways += [(*way, step) for step in further]
        else:
            yield way


def longest(ways: Iterator[tuple[Step, ...]]) -> tuple[Step, ...]:
    """Return the way that holds most of the text, and of several the one with the fewest objects."""
    return min(ways, key=lambda way: (-end_of(way), len(way), [step.name for step in way]))


def end_of(way: Sequence[Step]) -> int:
    """Return the number of the text's tokens that a way holds."""
    return way[-1].stop if way else 0


def _fitting(store: Store, parent: str, tokens: Ids, at: int, window: int, wanted: Wanted) -> Iterator[tuple[str, int]]:
    """Yield the name of each object behind ``parent`` that the text goes on with, and where it ends."""
    names = store.children(parent)
    most = min(window, len(tokens) - at)
    if not names or most < 1:
        return
    for made in wanted(at + most):
        whole = object_name(store.key, parent, made, tokens[at : at + most])
        if whole in names:
            yield whole, at + most
            names.discard(whole)
    for made in {made for stop in range(at + 1, at + most) for made in wanted(stop)}:
        if not names:
            return
        for n, name in enumerate(object_names(store.key, parent, made, tokens[at : at + most - 1]), 1):
            if name in names and made in wanted(at + n):
                yield name, at + n


def nearest(
    store: Store, parent: str, tokens: Ids, wanted: Wanted, at: int, least: int = 1
) -> tuple[Entry, int] | None:
    """Return the object behind ``parent`` that shares most of the text from position ``at`` on, and how many tokens.

    Only shares of at least ``least`` tokens and less than the whole object count, made in a wanted way: of an object
    that decode steps have finished, the tokens that were prefilled may be. Damaged objects are passed over.
    """
    best: tuple[Entry, int] | None = None
    for path in _last_used(store, parent):
        try:
            entry = open_object(store, path)
        except (KvpackError, OSError):
            continue
        share = _share(entry, common(entry.tokens, tokens[at:]), wanted, at)
        if share >= max(least, best[1] + 1 if best else 0):
            best = entry, share
    return best


def _share(entry: Entry, agreeing: int, wanted: Wanted, at: int) -> int:
    """Return how many of an object's ``agreeing`` first tokens were made in a wanted way, or 0."""
    prefilled = sum(entry.piece.prefill) if entry.piece else 0
    for share in sorted({agreeing, min(agreeing, prefilled)}, reverse=True):
        made = entry.piece.first(share).made if entry.piece else entry.made
        if 0 < share < len(entry.tokens) and made in wanted(at + share):
            return share
    return 0


def _last_used(store: Store, parent: str) -> list[Path]:
    paths = [store.object(parent, name) for name in store.children(parent)]
    times = {path: path.stat().st_mtime_ns for path in paths}
    return sorted(paths, key=lambda path: -times[path])[:MAX_COMPARED]


def common(ours: Ids, theirs: Ids) -> int:
    """Return the number of first tokens in which two texts agree."""
    length = min(len(ours), len(theirs))
    differ = np.flatnonzero(ours[:length] != theirs[:length])
    return int(differ[0]) if len(differ) else length

"""Compares two caches, one layer at a time, into a :class:`Report`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from kvpack.fidelity.probes import Probes, layers_text
from kvpack.fidelity.reconstruction import Reconstruction, measure_reconstruction
from kvpack.fidelity.source import CacheSource, FloatHeads, require_same_layers, same_tensor
from kvpack.fidelity.summary import Extras, LayerReport, Report, check

__all__ = ["CacheSource", "Report", "check", "compare"]

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, of the original's tensors."""


def compare(original: CacheSource, other: CacheSource, progress: Progress | None = None) -> Report:
    """Measure how near ``other`` is to ``original``; memory holds one layer of both at a time.

    Keys and values (``layers.{i}.keys|values``, ``[H, T, D]`` floats) are measured, every other tensor is
    compared bit by bit. Attention is measured where ``original`` holds probe queries.

    Raises:
        MismatchError: a layer's tensor is only in one of the two, or differs in shape or dtype.
        FormatError: the probe queries do not fit the layers, or a source is damaged.

    """
    layers = require_same_layers(original, other)
    steps = _Steps(original, progress)
    probes = Probes(original)
    reports = []
    for index, names in layers.items():
        reports.append(_compare_layer(index, names, original, other, probes))
        steps.advance(names.values())
    named = {name for names in layers.values() for name in names.values()}
    extras = _compare_extras(original, other, named, steps)
    notes = [] if layers else ["no keys or values in ORIGINAL: only bits were compared"]
    single = [index for index, names in layers.items() if len(names) == 1]
    if single:
        notes.append(f"only keys or only values in ORIGINAL ({layers_text(single)})")
    if layers:
        notes += probes.notes
    if dict(original.metadata) != dict(other.metadata):
        notes.append("the metadata of the two differ")
    return Report(tuple(reports), extras, tuple(notes))


class _Steps:
    """Reports progress by bytes of the original's tensors."""

    def __init__(self, source: CacheSource, progress: Progress | None) -> None:
        self._sizes = {name: spec.elements * spec.itemsize for name, spec in source.tensors.items()}
        self._total = sum(self._sizes.values())
        self._progress, self._done = progress, 0

    def advance(self, names: Iterable[str]) -> None:
        self._done += sum(self._sizes[name] for name in names)
        if self._progress:
            self._progress(self._done, self._total)


def _compare_layer(
    index: int, names: Mapping[str, str], original: CacheSource, other: CacheSource, probes: Probes
) -> LayerReport:
    figures = {"keys": Reconstruction(), "values": Reconstruction()}
    pairs: list[tuple[FloatHeads, FloatHeads]] = []
    for what, name in names.items():
        dtype = original.tensors[name].dtype
        ours, theirs = (FloatHeads(source.read(name), dtype) for source in (original, other))
        figures[what] = measure_reconstruction(ours.bits, theirs.bits, dtype)
        pairs.append((ours, ours if figures[what].bit_exact else theirs))
    attention = None
    if len(pairs) == 2:
        keys, values = pairs
        attention = probes.measure(index, (keys[0], values[0]), (keys[1], values[1]))
    return LayerReport(index, figures["keys"], figures["values"], attention)


def _compare_extras(original: CacheSource, other: CacheSource, layers: Collection[str], steps: _Steps) -> Extras:
    same, differ, missing = 0, [], []
    for name, spec in original.tensors.items():
        if name in layers:
            continue
        if name not in other.tensors:
            missing.append(name)
        elif same_tensor(spec, other.tensors[name]) and np.array_equal(original.read(name), other.read(name)):
            same += 1
        else:
            differ.append(name)
        steps.advance([name])
    added = tuple(name for name in other.tensors if name not in original.tensors)
    return Extras(same, tuple(differ), tuple(missing), added)

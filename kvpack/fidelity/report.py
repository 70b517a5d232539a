"""Compares two caches, window of tokens by window, into a :class:`Report`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from kvpack.fidelity.map import Bins, LayerMap, LossMap, TensorMap
from kvpack.fidelity.probes import Probes, layers_text
from kvpack.fidelity.reconstruction import Reconstruction, measure_reconstruction
from kvpack.fidelity.source import CacheReader, require_same_layers, same_tensor, walk
from kvpack.fidelity.summary import Extras, LayerReport, Report, check
from kvpack.formats.safetensors import TensorSpec
from kvpack.numerics.floats import Bits, to_float32

__all__ = ["CacheReader", "Report", "check", "compare"]

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, of the original's tensors."""


@np.errstate(all="ignore")  # caches may hold any number, a signalling NaN among them
def compare(original: CacheReader, other: CacheReader, progress: Progress | None = None, *, bins: int = 0) -> Report:
    """Measure how near ``other`` is to ``original``.

    ``other.windows()`` is walked once, and ``original`` is read at the same tokens, so memory holds one window of both
    and the state of the probe queries, however long the caches are. Keys and values (``layers.{i}.keys|values``,
    ``[H, T, D]`` floats) are measured, and every other tensor is compared bit by bit. Attention is measured where
    ``original`` holds probe queries. With ``bins``, the report also has the errors by at most so many ranges of tokens.

    Raises:
        MismatchError: A layer's tensor is in only one of the two, or differs in shape or dtype.
        FormatError: The probe queries do not fit the layers, or a file is damaged.

    """
    layers = require_same_layers(original, other)
    steps = _Steps(original, progress)
    probes = Probes(original)
    ranges = Bins.of(_longest(layers, original), bins) if bins else None
    meters = [_LayerMeter(index, names, original, probes, ranges) for index, names in layers.items()]
    named = {name for names in layers.values() for name in names.values()}
    for first, window in walk(other, named):
        for meter in meters:
            meter.add(first, window)
        steps.advance(sum(bits.nbytes for bits in window.values()))
    reports = tuple(meter.result() for meter in meters)
    extras = _compare_extras(original, other, named, steps)
    loss = LossMap(ranges, tuple(meter.map() for meter in meters)) if ranges else None
    return Report(reports, extras, tuple(_notes(layers, probes, original, other)), loss)


class _Steps:
    """Reports progress by bytes of the original's tensors."""

    def __init__(self, source: CacheReader, progress: Progress | None) -> None:
        self._total = sum(_size_of(spec) for spec in source.tensors.values())
        self._progress, self._done = progress, 0

    def advance(self, size: int) -> None:
        self._done += size
        if self._progress and size:
            self._progress(self._done, self._total)


class _LayerMeter:
    """Measures the keys and values of one layer, window by window."""

    def __init__(
        self, index: int, names: Mapping[str, str], original: CacheReader, probes: Probes, bins: Bins | None
    ) -> None:
        """Prepare for the tensors ``names``, by ``"keys"`` and ``"values"``; there may be only one of them."""
        self._index, self._names, self._original, self._probes = index, names, original, probes
        self._figures = {"keys": Reconstruction(), "values": Reconstruction()}
        shapes = [original.tensors[name].shape for name in names.values()]
        self._attention = probes.meter(index, *shapes, bins=bins) if len(shapes) == 2 else None
        self._maps = {what: TensorMap(bins) for what in self._figures} if bins else {}

    def add(self, first: int, window: Mapping[str, Bits]) -> None:
        """Take in a window of the other cache, which begins at token ``first``."""
        pairs: dict[str, tuple[Bits, Bits]] = {}
        for what, name in self._names.items():
            if name in window:
                theirs = window[name]
                ours = self._original.read(name, slice(first, first + theirs.shape[1]))
                part = measure_reconstruction(ours, theirs, self._original.tensors[name].dtype)
                self._figures[what] = Reconstruction.merge([self._figures[what], part])
                pairs[what] = (ours, ours if part.bit_exact else theirs)
                if self._maps:
                    self._maps[what].add(first, ours, theirs, self._original.tensors[name].dtype)
        if self._attention and "keys" in pairs:
            self._add_attention(first, {"values": self._empty(pairs["keys"]), **pairs})

    def result(self) -> LayerReport:
        """The figures of the layer."""
        attention = self._probes.result(self._index, self._attention) if self._attention else None
        return LayerReport(self._index, self._figures["keys"], self._figures["values"], attention)

    def map(self) -> LayerMap:
        """The errors of the layer by ranges of tokens, where they were asked for."""
        attention = self._attention.map() if self._attention else None
        return LayerMap(self._index, self._maps["keys"].result(), self._maps["values"].result(), attention)

    def _add_attention(self, first: int, pairs: Mapping[str, tuple[Bits, Bits]]) -> None:
        assert self._attention
        tokens = min(pairs["keys"][0].shape[1], self._attention.seen - first)
        if tokens <= 0:
            return
        keys, other_keys = self._floats("keys", pairs["keys"], tokens)
        values, other_values = self._floats("values", pairs["values"], tokens)
        self._attention.add(first, keys, values, other_keys, other_values)

    def _floats(
        self, what: str, pair: tuple[Bits, Bits], tokens: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The first tokens of both caches as float32; one and the same array where their bits are the same."""
        dtype = self._original.tensors[self._names[what]].dtype
        ours = to_float32(pair[0][:, :tokens], dtype)
        return ours, ours if pair[1] is pair[0] else to_float32(pair[1][:, :tokens], dtype)

    def _empty(self, keys: tuple[Bits, Bits]) -> tuple[Bits, Bits]:
        """Values for a window of keys whose values have no dimensions, so that a reader may leave them out."""
        spec = self._original.tensors[self._names["values"]]
        nothing: Bits = np.zeros((*keys[0].shape[:2], spec.shape[2]), f"<u{spec.itemsize}")
        return nothing, nothing


def _notes(
    layers: Mapping[int, Mapping[str, str]], probes: Probes, original: CacheReader, other: CacheReader
) -> list[str]:
    """What the reader of the report must know in addition to its figures."""
    notes = [] if layers else ["no keys or values in ORIGINAL: only bits were compared"]
    single = [index for index, names in layers.items() if len(names) == 1]
    if single:
        notes.append(f"only keys or only values in ORIGINAL ({layers_text(single)})")
    if layers:
        notes += probes.notes
    if dict(original.metadata) != dict(other.metadata):
        notes.append("the metadata of the two differ")
    return notes


def _compare_extras(original: CacheReader, other: CacheReader, layers: Collection[str], steps: _Steps) -> Extras:
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
        steps.advance(_size_of(spec))
    added = tuple(name for name in other.tensors if name not in original.tensors)
    return Extras(same, tuple(differ), tuple(missing), added)


def _longest(layers: Mapping[int, Mapping[str, str]], source: CacheReader) -> int:
    """The number of tokens of the longest tensor of keys or values."""
    return max((source.tensors[name].shape[1] for names in layers.values() for name in names.values()), default=0)


def _size_of(spec: TensorSpec) -> int:
    """The size in bytes of a tensor's data."""
    return spec.elements * spec.itemsize

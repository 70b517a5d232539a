"""The probe queries of a capture: where attention can be measured, with which scale, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.cache.metadata import parse_metadata
from kvpack.errors import FormatError
from kvpack.fidelity.attention import Attention, Shape
from kvpack.fidelity.map import Bins
from kvpack.fidelity.meter import AttentionMeter
from kvpack.fidelity.source import CacheReader
from kvpack.formats.records import has_queries, probe_positions, probe_queries

NO_QUERIES = "no probe queries in ORIGINAL: attention fidelity not measured (capture with --queries)"
NO_POSITIONS = "no query_positions in ORIGINAL: attention fidelity not measured (capture with --queries)"
ASSUMED_SCALE = "no attention scale in ORIGINAL's metadata: head_dim ** -0.5 assumed"
LAYER_WITHOUT_QUERIES = "no probe queries in ORIGINAL: attention not measured"
UNPAIRED = "keys and values are not of the same heads and tokens: attention not measured"
NOT_FINITE = "some attention rows are not finite in ORIGINAL itself and are left out"


class Probes:
    """The probe queries of a capture. It collects notes about layers that cannot be measured as they should be.

    Attributes:
        present: Whether any layer has probe queries.
        positions: ``[P]``, the tokens at which the queries were taken; None without queries or without positions.

    """

    def __init__(self, source: CacheReader) -> None:
        """Read the positions and find out which layers have queries.

        Raises:
            FormatError: ``query_positions`` is not a list of whole numbers.

        """
        self._source = source
        self._notes: list[tuple[int, str]] = []
        self._metadata = parse_metadata(source.metadata)
        self.present = has_queries(source)
        self.positions: NDArray[np.integer[Any]] | None = None
        if self.present:
            self.positions = probe_positions(source)

    @property
    def notes(self) -> list[str]:
        """What the reader of the figures must know, each with the layers it is about, in the order of layers."""
        if not self.present:
            return [NO_QUERIES]
        if self.positions is None:
            return [NO_POSITIONS]
        layers: dict[str, list[int]] = {}
        for layer, text in sorted(self._notes, key=lambda note: note[0]):
            layers.setdefault(text, []).append(layer)
        return [f"{text} ({layers_text(found)})" for text, found in layers.items()]

    def meter(self, layer: int, keys: Shape, values: Shape, *, bins: Bins | None = None) -> AttentionMeter | None:
        """Prepare to measure a layer, or return None (with a note) where it has no probes.

        Args:
            layer: The index of the layer.
            keys: The shape ``(H, T, D)`` of its keys.
            values: The shape ``(H, T, D_v)`` of its values.
            bins: The ranges of tokens of its map, if that is wanted.

        Raises:
            FormatError: The queries do not fit the layer.

        """
        if self.positions is None or not all(keys):
            return None
        if keys[:2] != values[:2]:
            self._note(UNPAIRED, layer)
            return None
        queries = self.queries(layer)
        if queries is None or not queries.size:
            self._note(LAYER_WITHOUT_QUERIES, layer)
            return None
        try:
            return AttentionMeter(queries, self.positions, self.scale_for(layer, keys[2]), keys, values, bins=bins)
        except FormatError as error:
            raise FormatError(f"layer {layer}: {error}") from None

    def result(self, layer: int, meter: AttentionMeter) -> Attention | None:
        """The figures of a layer, with a note where rows were left out; None where all were."""
        figures = meter.result()
        if figures.skipped:
            self._note(NOT_FINITE, layer)
        return figures if figures.rows else None

    def queries(self, layer: int) -> NDArray[np.float32] | None:
        """Return a layer's queries ``[H_q, P, D]``, float32, or None where it has none."""
        return probe_queries(self._source, layer)

    def scale_for(self, layer: int, head_dim: int) -> float:
        """The factor of q . k in a layer. Where the capture does not say, it is ``head_dim ** -0.5``, with a note."""
        scale = self._metadata.attention_scale(layer)
        if scale is None:
            self._note(ASSUMED_SCALE, layer)
            return float(head_dim**-0.5)
        return scale

    def _note(self, text: str, layer: int) -> None:
        self._notes.append((layer, text))


def layers_text(layers: Iterable[int]) -> str:
    """Name layers briefly: ``layers 0-2, 5`` for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layer{'' if len(runs) == 1 and runs[0][0] == runs[0][1] else 's'} {text}"

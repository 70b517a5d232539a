"""Probe queries of a capture: where attention can be measured, with which scale, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import FormatError
from kvpack.fidelity.attention import Attention, measure_attention
from kvpack.fidelity.source import CacheSource, FloatHeads, is_float_tensor
from kvpack.formats.safetensors import TensorSpec
from kvpack.numerics.floats import to_float32

NO_QUERIES = "no probe queries in ORIGINAL: attention fidelity not measured (capture with --queries)"
NO_POSITIONS = "no query_positions in ORIGINAL: attention fidelity not measured (capture with --queries)"
ASSUMED_SCALE = "no attention scale in ORIGINAL's metadata: head_dim ** -0.5 assumed"
LAYER_WITHOUT_QUERIES = "no probe queries in ORIGINAL: attention not measured"
UNPAIRED = "keys and values are not of the same heads and tokens: attention not measured"
NOT_FINITE = "some attention rows are not finite in ORIGINAL itself and are left out"


class Probes:
    """The probe queries of a capture; collects notes as its layers are measured."""

    def __init__(self, source: CacheSource) -> None:
        """Read the positions and find which layers have queries.

        Raises:
            FormatError: ``query_positions`` is not a list of whole numbers.

        """
        self._source = source
        self._notes: dict[str, list[int]] = {}
        self._scale = _scale_of(source.metadata)
        self.present = any(_is_queries(name, spec) for name, spec in source.tensors.items())
        self.positions: NDArray[np.integer[Any]] | None = None
        if self.present and "query_positions" in source.tensors:
            self.positions = _read_positions(source)

    @property
    def notes(self) -> list[str]:
        """What the reader of the figures must know, each with the layers it is about."""
        if not self.present:
            return [NO_QUERIES]
        if self.positions is None:
            return [NO_POSITIONS]
        return [f"{text} ({layers_text(layers)})" for text, layers in self._notes.items()]

    def measure(
        self, layer: int, original: tuple[FloatHeads, FloatHeads], other: tuple[FloatHeads, FloatHeads]
    ) -> Attention | None:
        """Attention fidelity of a layer's ``(keys, values)``, or None (with a note) where it has no probes.

        Raises:
            FormatError: the queries do not fit the layer.

        """
        keys, values = original
        if self.positions is None or not keys.bits.size:
            return None
        if keys.shape[:2] != values.shape[:2]:
            self._note(UNPAIRED, layer)
            return None
        queries = self.queries(layer)
        if queries is None or not queries.size:
            self._note(LAYER_WITHOUT_QUERIES, layer)
            return None
        try:
            figures = measure_attention(queries, self.positions, original, other, self.scale_for(layer, keys.shape[2]))
        except FormatError as error:
            raise FormatError(f"layer {layer}: {error}") from None
        if figures.skipped:
            self._note(NOT_FINITE, layer)
        return figures if figures.rows else None

    def queries(self, layer: int) -> NDArray[np.float32] | None:
        """A layer's queries ``[H_q, P, D]``, float32, or None."""
        name = f"queries.{layer}"
        spec = self._source.tensors.get(name)
        if spec is None or not _is_queries(name, spec):
            return None
        return to_float32(self._source.read(name), spec.dtype)

    def scale_for(self, layer: int, head_dim: int) -> float:
        """The factor of q . k in a layer; where the capture does not tell, ``head_dim ** -0.5`` and a note."""
        scale = self._scale.get(layer, self._scale.get(-1))
        if scale is None:
            self._note(ASSUMED_SCALE, layer)
            return float(head_dim**-0.5)
        return scale

    def _note(self, text: str, layer: int) -> None:
        self._notes.setdefault(text, []).append(layer)


def layers_text(layers: Iterable[int]) -> str:
    """``layers 0-2, 5`` for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layer{'' if len(runs) == 1 and runs[0][0] == runs[0][1] else 's'} {text}"


def _is_queries(name: str, spec: TensorSpec) -> bool:
    return name.startswith("queries.") and is_float_tensor(spec)


def _read_positions(source: CacheSource) -> NDArray[np.integer[Any]]:
    spec = source.tensors["query_positions"]
    if len(spec.shape) != 1 or spec.dtype[0] not in "IU":
        raise FormatError(f"query_positions is {spec.dtype} {list(spec.shape)}, not a list of whole numbers")
    bits = np.ascontiguousarray(source.read("query_positions"))
    return bits.view(f"<{spec.dtype[0].lower()}{spec.itemsize}")


def _scale_of(metadata: Mapping[str, str]) -> dict[int, float]:
    """Attention scale by layer from ``metadata["attention"]["scale"]``; one for all layers is under -1."""
    try:
        document = json.loads(metadata.get("attention", "null"))
    except (ValueError, RecursionError):
        return {}
    scale = document.get("scale") if isinstance(document, dict) else None
    entries: dict[int, Any] = dict(enumerate(scale)) if isinstance(scale, list) else {-1: scale}
    return {layer: float(value) for layer, value in entries.items() if _is_scale(value)}


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value > 0

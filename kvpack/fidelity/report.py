"""Compares a cache with its reconstruction, one layer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvpack.container import layer_of
from kvpack.errors import FormatError, MismatchError
from kvpack.fidelity import attention, reconstruction
from kvpack.fidelity.attention import Attention
from kvpack.fidelity.reconstruction import Reconstruction
from kvpack.floats import to_float32
from kvpack.tensorfile import TensorSpec

SCHEMA_VERSION = 1
Bits = NDArray[np.unsignedinteger[Any]]


class CacheSource(Protocol):
    """A capture or a ``.kvp`` file: tensors by name, read as bit patterns in their shape."""

    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Bits:
        """The tensor's bit patterns, unsigned integers."""
        ...


@dataclass(frozen=True)
class LayerReport:
    """One layer's fidelity; ``attention`` is None where the capture has no probe queries."""

    layer: int
    keys: Reconstruction
    values: Reconstruction
    attention: Attention | None


@dataclass(frozen=True)
class Report:
    """Fidelity of every layer, and of keys, values and attention over all layers."""

    layers: list[LayerReport]
    keys: Reconstruction
    values: Reconstruction
    attention: Attention | None
    differing: list[str]
    notes: list[str]

    @property
    def bit_exact(self) -> bool:
        """Whether every tensor, layers and others, is the same bit for bit."""
        return self.keys.bit_exact and self.values.bit_exact and not self.differing

    def to_json(self) -> dict[str, Any]:
        """JSON types only, with ``schema_version``."""
        overall = {"keys": self.keys, "values": self.values, "attention": self.attention}
        return {
            "schema_version": SCHEMA_VERSION,
            "bit_exact": self.bit_exact,
            "overall": {name: part.to_json() if part else None for name, part in overall.items()},
            "layers": [
                {
                    "layer": row.layer,
                    "keys": row.keys.to_json(),
                    "values": row.values.to_json(),
                    "attention": row.attention.to_json() if row.attention else None,
                }
                for row in self.layers
            ],
            "differing_tensors": self.differing,
            "notes": self.notes,
        }

    def failures(
        self, *, max_nmse: float | None = None, max_attn_err: float | None = None, bit_exact: bool = False
    ) -> list[str]:
        """What falls short of the thresholds, in words; a figure that was not measured falls short."""
        found = []
        nmse = max(self.keys.nmse, self.values.nmse)
        if max_nmse is not None and not nmse <= max_nmse:
            found.append(f"NMSE {nmse:.3g} is above {max_nmse:g}")
        if max_attn_err is not None and self.attention is None:
            found.append("attention error was not measured: the original has no probe queries")
        elif max_attn_err is not None and self.attention and not self.attention.output_error <= max_attn_err:
            found.append(f"attention error {self.attention.output_error:.3g} is above {max_attn_err:g}")
        if bit_exact and not self.bit_exact:
            found.append("not bit-exact")
        return found


def compare(
    original: CacheSource, other: CacheSource, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Measure ``other`` against ``original``.

    Raises:
        FormatError: ``original`` has no layers, or a layer without keys or values.
        MismatchError: a layer's tensor that is missing in ``other``, or has another shape or dtype.

    """
    layers = sorted({layer for spec in original.tensors.values() if (layer := layer_of(spec)) is not None})
    if not layers:
        raise FormatError("the original has no layers.N.keys and layers.N.values")
    for spec in original.tensors.values():
        if layer_of(spec) is not None:
            _check_same_shape(spec, other)
    probes = _Probes.of(original, layers)
    rows = []
    for done, layer in enumerate(layers):
        rows.append(_compare_layer(layer, original, other, probes))
        if progress:
            progress(done + 1, len(layers))
    measured = [row.attention for row in rows if row.attention]
    return Report(
        layers=rows,
        keys=reconstruction.merge([row.keys for row in rows]),
        values=reconstruction.merge([row.values for row in rows]),
        attention=attention.merge(measured) if measured else None,
        differing=_differing(original, other),
        notes=probes.notes,
    )


def _check_same_shape(spec: TensorSpec, other: CacheSource) -> None:
    found = other.tensors.get(spec.name)
    if found is None:
        raise MismatchError(f"{spec.name} is missing: not made from this original")
    if (found.shape, found.dtype) != (spec.shape, spec.dtype):
        raise MismatchError(
            f"{spec.name} is {found.dtype}{list(found.shape)}, in the original {spec.dtype}{list(spec.shape)}"
        )


def _differing(original: CacheSource, other: CacheSource) -> list[str]:
    """Names of tensors other than layers that are missing on one side or differ."""
    names = []
    for name, spec in original.tensors.items():
        found = other.tensors.get(name)
        if layer_of(spec) is not None:
            continue
        same = found is not None and (found.shape, found.dtype) == (spec.shape, spec.dtype)
        if not same or not np.array_equal(original.read(name), other.read(name)):
            names.append(name)
    return names + [name for name in other.tensors if name not in original.tensors]


@dataclass(frozen=True)
class _Probes:
    """A capture's probe queries: positions ``[P]`` and the attention scale by layer."""

    positions: NDArray[np.int64]
    scales: Mapping[int, float]
    notes: list[str]

    @classmethod
    def of(cls, source: CacheSource, layers: list[int]) -> _Probes:
        if "query_positions" not in source.tensors or not any(f"queries.{i}" in source.tensors for i in layers):
            note = "attention fidelity not measured: the original has no probe queries (capture with --queries)"
            return cls(np.zeros(0, np.int64), {}, [note])
        positions = source.read("query_positions").view(np.int32).astype(np.int64).reshape(-1)
        try:
            scale = json.loads(source.metadata["attention"])["scale"]
            scales = dict(zip(layers, scale, strict=True)) if isinstance(scale, list) else dict.fromkeys(layers, scale)
            return cls(positions, {layer: float(value) for layer, value in scales.items()}, [])
        except (KeyError, TypeError, ValueError):
            note = "the original does not say its attention scale: 1 / sqrt(head_dim) is assumed"
            return cls(positions, {}, [note])


def _compare_layer(layer: int, original: CacheSource, other: CacheSource, probes: _Probes) -> LayerReport:
    names = [f"layers.{layer}.{kind}" for kind in ("keys", "values")]
    for name in names:
        if name not in original.tensors:
            raise FormatError(f"the original has no {name}")
    dtypes = [original.tensors[name].dtype for name in names]
    pairs = [(original.read(name), other.read(name)) for name in names]
    errors = [
        reconstruction.compare_tensors(x, y, dtype) for (x, y), dtype in zip(pairs, dtypes, strict=True)
    ]
    sides = [
        (to_float32(pairs[0][side], dtypes[0]), to_float32(pairs[1][side], dtypes[1])) for side in (0, 1)
    ]
    measured = None
    spec = original.tensors.get(f"queries.{layer}")
    if spec is not None and len(probes.positions) and len(spec.shape) == 3:
        queries = to_float32(original.read(spec.name), spec.dtype)
        scale = probes.scales.get(layer, queries.shape[-1] ** -0.5)
        measured = attention.compare_attention(queries, probes.positions, sides[0], sides[1], scale)
    return LayerReport(layer, errors[0], errors[1], measured)

"""The report of a comparison: its figures, its JSON form, and the check against thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

from kvpack.fidelity.attention import Attention
from kvpack.fidelity.map import LossMap
from kvpack.fidelity.probes import layers_text
from kvpack.fidelity.reconstruction import Reconstruction

SCHEMA_VERSION = 1
"""The version of the JSON form, which changes when a field changes its meaning."""


@dataclass(frozen=True)
class LayerReport:
    """The figures of one layer; ``attention`` is None where it was not measured."""

    index: int
    keys: Reconstruction
    values: Reconstruction
    attention: Attention | None


@dataclass(frozen=True)
class Extras:
    """The tensors other than keys and values.

    Attributes:
        same: The number of tensors that are the same in both caches.
        differ: The names of those that differ in bits, dtype or shape.
        missing: The names of those that only the original has.
        added: The names of those that only the other cache has.

    """

    same: int = 0
    differ: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def bit_exact(self) -> bool:
        """Whether both caches have the same tensors with the same bits."""
        return not (self.differ or self.missing or self.added)


@dataclass(frozen=True)
class Report:
    """What :func:`kvpack.fidelity.compare` found, layer by layer; the overall figures follow from the layers.

    ``loss`` has the errors by ranges of tokens, where they were asked for.
    """

    layers: tuple[LayerReport, ...]
    extras: Extras
    notes: tuple[str, ...]
    loss: LossMap | None = None

    @property
    def keys(self) -> Reconstruction:
        """The error of the keys of all layers together."""
        return Reconstruction.merge(layer.keys for layer in self.layers)

    @property
    def values(self) -> Reconstruction:
        """The error of the values of all layers together."""
        return Reconstruction.merge(layer.values for layer in self.layers)

    @property
    def attention(self) -> Attention | None:
        """The attention fidelity of all measured layers (:meth:`Attention.merge`); None where none was measured."""
        measured = [layer.attention for layer in self.layers if layer.attention]
        return Attention.merge(measured) if measured else None

    @property
    def bit_exact(self) -> bool:
        """Whether every tensor has the same bits in both caches, keys and values as well as all others."""
        return self.keys.bit_exact and self.values.bit_exact and self.extras.bit_exact

    @property
    def unmeasured(self) -> tuple[int, ...]:
        """The indices of layers that hold something and whose attention was not measured."""
        return tuple(
            layer.index
            for layer in self.layers
            if layer.attention is None and layer.keys.elements + layer.values.elements
        )

    def to_json(self) -> dict[str, Any]:
        """The report in JSON types. An infinite figure is null, and its path is listed under ``infinite``."""
        document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "bit_exact": self.bit_exact,
            "keys": _reconstruction(self.keys),
            "values": _reconstruction(self.values),
            "attention": _attention(self.attention),
            "layers": [
                {
                    "index": layer.index,
                    "keys": _reconstruction(layer.keys),
                    "values": _reconstruction(layer.values),
                    "attention": _attention(layer.attention),
                }
                for layer in self.layers
            ],
            "extras": {
                "same": self.extras.same,
                "differ": list(self.extras.differ),
                "missing": list(self.extras.missing),
                "added": list(self.extras.added),
            },
            "notes": list(self.notes),
            "map": self.loss.to_json() if self.loss else None,
        }
        infinite: list[str] = []
        document = _finite(document, "", infinite)
        return {**document, "infinite": infinite}


def check(
    report: Report,
    max_nmse: float | None = None,
    max_attn_err: float | None = None,
    bit_exact: bool = False,
) -> list[str]:
    """Say in words where the report does not meet the thresholds; the list is empty if all is well.

    A check that cannot be made counts as failed.

    Args:
        report: The report of a comparison.
        max_nmse: The greatest overall NMSE that keys and values may each have.
        max_attn_err: The greatest overall relative error of the attention output.
        bit_exact: Whether every bit has to be the same.

    """
    failures: list[str] = []
    if max_nmse is not None:
        failures += _check_nmse(report, max_nmse)
    if max_attn_err is not None:
        failures += _check_attention(report, max_attn_err)
    if bit_exact and not report.bit_exact:
        failures.append(f"not bit-exact: {_several(_inexact(report))}")
    return failures


def _check_nmse(report: Report, limit: float) -> list[str]:
    figures = {"keys": report.keys, "values": report.values}
    if not any(figure.elements for figure in figures.values()):
        return ["NMSE cannot be checked: there are no keys or values"]
    name, worst = max(figures.items(), key=lambda item: item[1].nmse)
    return [] if worst.nmse <= limit else [f"NMSE of {name} is {worst.nmse:.3g}, above {limit:g}"]


def _check_attention(report: Report, limit: float) -> list[str]:
    if report.attention is None:
        return ["attention error cannot be checked: it was not measured (see the notes)"]
    if report.unmeasured:
        return [f"attention error cannot be checked: not measured in {layers_text(report.unmeasured)}"]
    error = report.attention.output_error
    return [] if error <= limit else [f"attention output error is {error:.3g}, above {limit:g}"]


def _inexact(report: Report) -> list[str]:
    names = [
        f"layers.{layer.index}.{what}"
        for layer in report.layers
        for what, figures in (("keys", layer.keys), ("values", layer.values))
        if not figures.bit_exact
    ]
    extras = report.extras
    names += [*extras.differ, *(f"{name} (missing)" for name in extras.missing)]
    return names + [f"{name} (added)" for name in extras.added]


def _several(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _reconstruction(figures: Reconstruction) -> dict[str, Any]:
    return {
        "elements": figures.elements,
        "nmse": figures.nmse,
        "max_abs_error": figures.max_abs_error,
        "cosine": figures.cosine,
        "bit_exact": figures.bit_exact,
    }


def _attention(figures: Attention | None) -> dict[str, Any] | None:
    if figures is None:
        return None
    return {
        "rows": figures.rows,
        "rows_skipped": figures.skipped,
        "kl": figures.kl,
        "kl_p99": figures.kl_p99,
        "output_error": figures.output_error,
        "topk_overlap": figures.topk_overlap,
    }


def _finite(value: Any, path: str, infinite: list[str]) -> Any:
    """The JSON value with infinite numbers as null; their paths (``layers[0].keys.nmse``) go to ``infinite``."""
    if isinstance(value, dict):
        return {k: _finite(v, f"{path}.{k}" if path else k, infinite) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(item, f"{path}[{i}]", infinite) for i, item in enumerate(value)]
    if isinstance(value, float) and not isfinite(value):
        infinite.append(path)
        return None
    return value

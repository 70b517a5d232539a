"""What a page shows of one file beside its row of figures: where the loss is, and where the bytes went."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, isinf, isnan
from typing import Any

from kvpack.fidelity.map import LossMap
from kvpack.kvp.breakdown import Breakdown, Piece
from kvpack.kvp.inspection import LayerBytes

BINS = 64
"""The most ranges of tokens that a heat map has."""

MAPS = ("keys_nmse", "values_nmse", "attention_moved", "output_error")
"""The figures of a layer that are lists by token, in the form of :meth:`kvpack.fidelity.map.LossMap.to_json`."""


@dataclass(frozen=True)
class Detail:
    """The two, of one file.

    Attributes:
        loss: The document of :meth:`kvpack.fidelity.map.LossMap.to_json` with its figures rounded
            (:func:`rounded`), or None where nothing was compared.
        bytes: Where the bytes of the file went.

    """

    loss: dict[str, Any] | None
    bytes: Breakdown

    @classmethod
    def of(cls, loss: LossMap | None, size: Breakdown) -> Detail:
        """Return what a page shows of a comparison and of a file."""
        if loss is None:
            return cls(None, size)
        document = loss.to_json()
        for layer in document["layers"]:
            layer.update({name: layer[name] and [rounded(figure) for figure in layer[name]] for name in MAPS})
        return cls(document, size)

    def to_json(self) -> dict[str, Any]:
        """Return both as JSON types."""
        return {"loss": self.loss, "bytes": self.bytes.to_json()}

    @classmethod
    def parse(cls, document: Any) -> Detail:
        """Read what :meth:`to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: It is not of that form.

        """
        loss, size = document["loss"], document["bytes"]
        pieces = tuple(Piece(str(p["what"]), str(p["stream"]), _whole(p["size"])) for p in size["pieces"])
        layers = tuple(
            LayerBytes(
                *(_whole(row["layer"]), _whole(row["tokens"]), _whole(row["keys"]), _whole(row["values"])),
                _number(row["bits_per_element"]),
            )
            for row in size["layers"]
        )
        return cls(None if loss is None else _loss(loss), Breakdown(_whole(size["size"]), pieces, layers))


def rounded(figure: float | None) -> float | str | None:
    """Return a figure of a chart with three significant digits; ``"inf"`` for infinity, None for NaN."""
    if figure is None or isnan(figure):
        return None
    return "inf" if isinf(figure) else float(f"{figure:.3g}")


def _loss(document: Any) -> dict[str, Any]:
    layers = [
        {
            "index": _whole(layer["index"]),
            "query_positions": _optional(layer["query_positions"], _whole),
            **{name: _optional(layer[name], _figure) for name in MAPS},
        }
        for layer in document["layers"]
    ]
    width = _whole(document["bin_tokens"])
    if not width:
        raise ValueError("a range has no tokens")
    return {"tokens": _whole(document["tokens"]), "bin_tokens": width, "layers": layers}


def _optional(values: Any, read: Any) -> list[Any] | None:
    return None if values is None else [read(value) for value in values]


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError("a number of a detail is not whole")
    return value


def _figure(value: Any) -> float | str | None:
    if value is None or value == "inf":
        return "inf" if value else None
    return _number(value)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not isfinite(value):
        raise TypeError("a figure of a detail is not a number")
    return float(value)

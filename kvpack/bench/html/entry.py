"""The sections that both pages have: where the loss is, and where the bytes went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from kvpack.bench.detail import Detail
from kvpack.bench.html.page import Page, chart, paragraph, table, text
from kvpack.cache.metadata import NeedleEntry
from kvpack.jobs import PROBES
from kvpack.kvp.breakdown import Breakdown

MAPS = (
    ("keys_nmse", "Keys", "Share of the energy of these tokens’ keys that is lost (NMSE)."),
    ("values_nmse", "Values", "Share of the energy of these tokens’ values that is lost (NMSE)."),
    (
        "attention_moved",
        "Attention moved",
        "How much of an attention weight of 1 moved to these tokens or away from them, mean over probe queries.",
    ),
    (
        "output_error",
        "Attention outputs",
        "Relative error of what attention hands on, by the position of the query that asks.",
    ),
)


@dataclass(frozen=True)
class Entry:
    """One file that a page shows.

    Attributes:
        name: The codec's name, or the file's.
        detail: What the charts are drawn from.
        found: Of every needle, whether the model found it; empty where no model ran.

    """

    name: str
    detail: Detail
    found: Sequence[bool] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it in the form that the page's script reads."""
        return {"name": self.name, "found": list(self.found), **self.detail.to_json()}


def add_entries(page: Page, entries: Sequence[Entry], needles: Sequence[NeedleEntry], original: Sequence[bool]) -> None:
    """Add both sections and their data to a page. ``original`` says which needles the uncompressed cache gives."""
    page.data["entries"] = [entry.to_json() for entry in entries]
    page.data["needles"] = [
        {"position": needle.position, "text": needle.question + needle.answer, "original": known}
        for needle, known in zip_longest(needles, original[: len(needles)])
    ]
    choice = _choice(entries) if len(entries) > 1 else ""
    page.section("loss", "Where the loss is", choice, *_loss(entries, needles))
    parts = [chart("shares", "Every file", "The shares of what is stored in it."), choice] if choice else []
    parts += [
        chart("pieces", "Kinds of streams", "The bytes of each kind of stream; the colour says what it belongs to."),
        chart("layers", "Layers", "The bytes of the keys and of the values of each layer."),
    ]
    page.section("bytes", "Where the bytes went", *parts, *_tables(entries))


def _choice(entries: Sequence[Entry]) -> str:
    options = "".join(f"<option>{text(entry.name)}</option>" for entry in entries)
    return f'<p class="controls"><label>Codec <select class="entry">{options}</select></label></p>'


def _loss(entries: Sequence[Entry], needles: Sequence[NeedleEntry]) -> list[str]:
    if not any(entry.detail.loss and entry.detail.loss["layers"] for entry in entries):
        return [paragraph("There are no keys or values that could be compared.")]
    words = (
        "Every cell is one layer at one range of tokens; a stronger colour is a greater error, on a logarithmic scale. "
        "Grey is no error at all."
    )
    marks = " Triangles mark the planted facts (needles)" if needles else ""
    if marks:
        marks += "; red ones the model finds with the original cache only." if any(e.found for e in entries) else "."
    figures = "".join(chart(f"map:{name}", title, what) for name, title, what in MAPS)
    return [
        paragraph(words + marks),
        f'<div class="grid">{figures}</div>',
        '<details class="cells"><summary>These figures as tables</summary><div></div></details>',
    ]


def _tables(entries: Sequence[Entry]) -> list[str]:
    """The bytes as tables: one for every file, of which the script shows the chosen one."""
    return [
        f'<div class="of" data-name="{text(entry.name)}">{_pieces(entry.name, entry.detail.bytes)}</div>'
        for entry in entries
    ]


def _pieces(name: str, size: Breakdown) -> str:
    rows = [[p.what, p.stream, f"{p.size:,}", f"{100 * p.size / size.size:.2f} %"] for p in size.pieces]
    rows.append(["all", "", f"{size.size:,}", "100.00 %"])
    found = table(f"Bytes of {name} by what they store", ("belongs to", "stream", "bytes", "share"), rows, left=2)
    found += _probes(size)
    if not size.layers:
        return found + paragraph("This codec codes layers together, so bytes cannot be told apart by layer.", "muted")
    layers = [[f"{r.layer}", f"{r.keys:,}", f"{r.values:,}", f"{r.bits_per_element:.3f}"] for r in size.layers]
    columns = ("layer", "keys, bytes", "values, bytes", "bits an element")
    return (
        f"{found}<details><summary>Bytes by layer as a table</summary>"
        f"{table(f'Bytes of {name} by layer', columns, layers)}</details>"
    )


def _probes(size: Breakdown) -> str:
    """Say how much of a file only serves to measure it, if that is much and could have been left out."""
    names = {name.removesuffix(".*") for name in PROBES}
    share = sum(piece.size for piece in size.pieces if piece.what in names) / size.size
    if share < 0.05 or any(piece.stream == "uncompressed" for piece in size.pieces):
        return ""
    return paragraph(
        f"{100 * share:.0f} % of this file only serves to measure what it lost (probe queries, attention mass, the "
        "text that follows). kvpack compress --drop-probes leaves it out."
    )


def found_by(model: Mapping[str, Any] | None) -> list[bool]:
    """Return which needles a model found, from the JSON form of its report."""
    return [bool(needle["found"]) for needle in model["needles"]] if model else []

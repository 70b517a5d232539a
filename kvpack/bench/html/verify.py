"""The page of ``kvpack verify --html``: what one file lost, where, and where its bytes went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING

from kvpack.bench.detail import Detail
from kvpack.bench.html.entry import Entry, add_entries
from kvpack.bench.html.made import Made
from kvpack.bench.html.page import Page, paragraph, table, text, tiles
from kvpack.cache.metadata import parse_metadata
from kvpack.fidelity.attention import Attention
from kvpack.fidelity.reconstruction import Reconstruction
from kvpack.fidelity.source import CacheReader
from kvpack.fidelity.summary import Report
from kvpack.kvp.breakdown import Breakdown
from kvpack.kvp.inspection import Inspection

if TYPE_CHECKING:
    from kvpack.fidelity.model import ModelReport

COLUMNS = (
    *("layer", "keys: NMSE", "max error", "cosine", "values: NMSE", "max error", "cosine"),
    *("attention: KL", "output error", "top-16 overlap"),
)


@dataclass(frozen=True)
class Verified:
    """What ``verify`` found of a file: its names, its figures, the model's, and the thresholds that it fails."""

    original: str
    file: str
    report: Report
    model: ModelReport | None
    failures: Sequence[str]


def verify_page(verified: Verified, reference: CacheReader, look: Inspection, size: Breakdown, made: Made) -> bytes:
    """Return the page as UTF-8.

    Args:
        verified: What was found.
        reference: The original, whose metadata name the model and the needles.
        look: What ``inspect`` says of the file.
        size: Where its bytes went.
        made: By which command, on which machine.

    """
    report, model = verified.report, verified.model
    intro = paragraph(f"{verified.file}, compared with {verified.original}", "muted") + tiles(_summary(verified, look))
    if verified.failures:
        intro += f'<p class="alarm">{text("Thresholds that are not met: " + "; ".join(verified.failures))}</p>'
    name = "standard input" if verified.file == "-" else Path(verified.file).name
    page = Page(f"What {name} kept", intro)
    needles = parse_metadata(reference.metadata).needles or ()
    found = [needle.found for needle in model.needles] if model else []
    known = [needle.original for needle in model.needles] if model else []
    entry = Entry(name, Detail.of(report.loss, size), found)
    if model:
        page.section("model", "What the model predicts from it", *_model(model))
    add_entries(page, [entry], needles, known)
    page.section("figures", "Figures by layer", *_figures(report))
    made.add_to(page, about=_about(reference, look))
    return page.render()


def _summary(verified: Verified, look: Inspection) -> dict[str, str]:
    report, model = verified.report, verified.model
    found = {"times smaller than its original": f"{look.ratio:.2f}"} if look.kind == "kvp" else {}
    if look.bits_per_element is not None:
        found["bits an element of keys and values"] = f"{look.bits_per_element:.3f}"
    for name, part in (
        ("KL, the text goes on", model and model.plain),
        ("KL, a passage repeated", model and model.repeat),
    ):
        if part:
            found[f"{name}, nats"] = f"{part.kl_mean:.4f}"
    if model and model.needles:
        count = sum(needle.found for needle in model.needles)
        found["needles found"] = f"{count} of {len(model.needles)}"
    if report.attention:
        found["relative error of attention outputs"] = f"{report.attention.output_error:.3g}"
    found["NMSE of keys"], found["NMSE of values"] = f"{report.keys.nmse:.2g}", f"{report.values.nmse:.2g}"
    found["every bit the same"] = "yes" if report.bit_exact else "no"
    return found


def _about(reference: CacheReader, look: Inspection) -> dict[str, object]:
    metadata, codec = parse_metadata(reference.metadata), look.codec or {}
    return {
        "Model of the capture": metadata.model_name,
        "Computed in": metadata.dtype,
        "Codec": codec.get("name"),
        "Profile": look.profile and f"{look.profile['name']}, SHA-256 {look.profile['sha256']}",
        "Written by": look.writer,
        "Size of the file": f"{look.size:,} bytes",
    }


def _figures(report: Report) -> list[str]:
    rows = [[str(r.index), *_cells(r.keys), *_cells(r.values), *_attention(r.attention)] for r in report.layers]
    rows.append(["all", *_cells(report.keys), *_cells(report.values), *_attention(report.attention)])
    parts = [table("Errors of every layer", COLUMNS, rows)]
    extras = report.extras
    for what, names in (("differs", extras.differ), ("missing", extras.missing), ("added", extras.added)):
        if names:
            more = f", and {len(names) - 4} more" if len(names) > 4 else ""
            parts.append(paragraph(f"Other tensors, {what}: {', '.join(names[:4])}{more}"))
    return parts + [paragraph(f"Note: {note}", "muted") for note in report.notes]


def _model(model: ModelReport) -> list[str]:
    rows = [
        [
            *(name, f"{part.positions}", f"{part.kl_mean:.3g}", f"{part.kl_p90:.3g}", f"{part.kl_p99:.3g}"),
            *(f"{part.top1:.3f}", f"{exp(part.nll):.3f}", f"{100 * part.ppl_change:+.2f} %"),
        ]
        for name, part in (("the text goes on", model.plain), ("a passage repeated", model.repeat))
        if part
    ]
    columns = (
        *("continuation", "tokens", "KL mean, nats", "KL 90th percentile", "KL 99th percentile"),
        *("same top token", "perplexity", "its change"),
    )
    same = f"Greedy generation is identical for {model.greedy_identical} of {model.greedy_length} tokens."
    notes = [paragraph(f"Note: {note}", "muted") for note in model.notes]
    return [table("Predictions from this file beside those from the original", columns, rows), paragraph(same), *notes]


def _cells(part: Reconstruction) -> list[str]:
    return [f"{part.nmse:.3g}", f"{part.max_abs_error:.3g}", f"{part.cosine:.4f}"]


def _attention(part: Attention | None) -> list[str]:
    if part is None:
        return ["–", "–", "–"]
    return [f"{part.kl:.3g}", f"{part.output_error:.3g}", f"{part.topk_overlap:.3f}"]

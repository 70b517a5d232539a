"""The page of ``kvpack bench --html``: rate against loss of every codec, where the loss is, where the bytes went."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from kvpack.bench.html.entry import Entry, add_entries, found_by
from kvpack.bench.html.made import Made
from kvpack.bench.html.page import Page, chart, commands, paragraph, table
from kvpack.bench.links import with_links
from kvpack.bench.report import COLUMNS, cells, noise_floor
from kvpack.bench.results import RECOMPUTE, Results, Summary, summarize
from kvpack.cache.metadata import NeedleEntry
from kvpack.codecs.recipes import family_of

PANELS = (
    ("kl_plain", "The text goes on", "KL in nats a token"),
    ("kl_repeat", "A passage is repeated", "KL in nats a token"),
    ("attention_error", "Attention", "relative error of attention outputs"),
)
"""What is drawn against the rate, if there are figures of it. Attention is drawn where no model ran."""

TITLES = {
    "bits": "bits an element",
    "ratio": "times smaller",
    "kl_plain": "KL, text goes on",
    "kl_repeat": "KL, repeated",
    "ppl_plain": "perplexity, text goes on",
    "ppl_repeat": "perplexity, repeated",
    "top1_plain": "same top token",
    "greedy": "greedy tokens",
    "attention_error": "attention error",
    "compress_seconds": "compress, s",
    "decompress_seconds": "decompress, s",
    "decode_flops": "decode, FLOPs",
}
"""Headings of the tables, longer than in a terminal."""


def bench_page(
    results: Results, needles: Sequence[NeedleEntry], capture: str, profile: str | None, made: Made
) -> bytes:
    """Return the page as UTF-8.

    Args:
        results: The rows to show, with the details of those that were measured on the first document.
        needles: The facts planted in that document.
        capture: Its file's name, for the commands that the page shows.
        profile: The profile's file name, likewise.
        made: By which command, on which machine.

    """
    documents = list(dict.fromkeys(row.document for row in results.rows))
    summaries = with_links(results.rows, summarize(results.rows))
    page = Page("Codecs for this cache", paragraph(_intro(results, documents)))
    ids = {summary.codec: f"row-{i}" for i, summary in enumerate(summaries)}
    page.data["rate"] = {"rows": [_point(s, ids[s.codec]) for s in summaries], "panels": _panels(summaries)}
    page.section("rate", "Rate against loss", *_rate(summaries))
    page.section("codecs", "Figures of every codec", *_tables(summaries, ids, len(documents)))
    entries, original = _entries(results)
    if entries:
        add_entries(page, entries, needles, original)
        first = next(iter(results.details))[0]
        name = next((row.document for row in results.rows if row.document_sha256 == first), "")
        page.sections.append(paragraph(f"Heat maps and bytes are those of {name}, with the first seed.", "muted"))
    options = ["-D", profile] if profile else []
    example = [
        ["kvpack", "compress", capture, "-c", "CODEC", *options, "--drop-probes", "-o", "FILE.kvp"],
        ["kvpack", "verify", capture, "FILE.kvp", *options, "--model", "embedded", "--html", "FILE.html"],
    ]
    made.add_to(
        page,
        paragraph("The bench keeps no files. These commands make the file of a codec, and a page about it:"),
        commands(shlex.join(line) for line in example),
        about=_about(results),
    )
    return page.render()


def _intro(results: Results, documents: Sequence[str]) -> str:
    judge = results.setting["model"]
    judged = f"judged by {judge} ({results.setting['dtype']})" if judge else "without a model"
    shown = ", ".join(documents[:6]) + (f" and {len(documents) - 6} more" if len(documents) > 6 else "")
    return f"Measured on {shown}, {judged}. A file holds keys, values and tokens; bits are those of the whole file."


def _panels(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """The panels for which there are figures: those of a model, else that of attention."""
    there = [p for p in PANELS if any(p[0] in s.figures for s in summaries)]
    chosen = [p for p in there if p[0].startswith("kl_")] or there
    return [
        {"name": name, "title": title, "axis": axis, "floor": noise_floor(summaries, name)}
        for name, title, axis in chosen
    ]


def _rate(summaries: Sequence[Summary]) -> list[str]:
    panels = _panels(summaries)
    if not panels:
        return [paragraph("Neither a model nor probe queries were there to judge the loss by.")]
    toggle = (
        '<p class="controls"><label>Rate <select id="rate-axis"><option value="bits">bits an element</option>'
        '<option value="ratio">times smaller</option></select></label></p>'
    )
    figures = "".join(
        chart(f"rate:{p['name']}", p["title"], "Lower is better, and so is a smaller file.") for p in panels
    )
    words = (
        "Every point is a codec at one setting. Rest on a point for its figures; click it for its row in the table; "
        "click a name in the legend to single out a family."
    )
    if any(summary.noise for summary in summaries):
        words += " A loss below the dashed line means nothing: another machine does as much."
    return [paragraph(words), toggle, f'<div class="grid">{figures}</div>']


def _point(summary: Summary, row: str) -> dict[str, Any]:
    figures = {name: [figure.mean, figure.half] for name, figure in summary.figures.items() if name in dict(_POINT)}
    kind = "noise" if summary.noise else "bound" if summary.bound else "codec"
    if kind == "codec" and "decode_flops" in summary.figures and summary.figures["decode_flops"].mean:
        kind = "replay"
    columns = [name for name, _ in _POINT]
    shown = cells(summary, columns)[1:]
    tip = {title: cell for (_, title), cell in zip(_POINT, shown, strict=True) if cell != "-"}
    return {
        "codec": summary.codec,
        "family": family_of(summary.codec),
        "kind": kind,
        "drawn": not summary.noise and summary.codec != RECOMPUTE,
        "row": row,
        "figures": figures,
        "tip": tip,
    }


_POINT = (
    ("bits", "bits an element"),
    ("ratio", "times smaller"),
    ("kl_plain", "KL, text goes on"),
    ("kl_repeat", "KL, repeated"),
    ("needles", "needles"),
    ("attention_error", "attention error"),
)


def _tables(summaries: Sequence[Summary], ids: dict[str, str], documents: int) -> list[str]:
    groups = {
        "Codecs": [s for s in summaries if not s.bound and not s.noise],
        "Hardware noise: the same tokens computed otherwise": [s for s in summaries if s.noise],
        "Bounds, simulated and not files": [s for s in summaries if s.bound],
    }
    parts = []
    for title, some in groups.items():
        if some:
            used = [name for name in COLUMNS if any(name in s.figures for s in some)]
            rows = [cells(summary, used) for summary in some]
            caption = (
                f"{title}. Means over {documents} documents ± 95 % confidence."
                if documents > 1
                else f"{title}. One document."
            )
            heads = ("codec", *(TITLES.get(name, COLUMNS[name][0]) for name in used))
            parts.append(table(caption, heads, rows, names=[ids[s.codec] for s in some]))
    return parts


def _entries(results: Results) -> tuple[list[Entry], list[bool]]:
    """The codecs whose details are known, and which needles the uncompressed cache gives."""
    models = {row.key: row.model for row in results.rows}
    entries = [
        Entry(key[1], detail, found_by(models.get(key))) for key, detail in results.details.items() if key in models
    ]
    model = next((models[key] for key in results.details if models.get(key)), None)
    return entries, [bool(needle["original"]) for needle in model["needles"]] if model else []


def _about(results: Results) -> dict[str, object]:
    profile, where = results.setting["profile"], results.machine
    return {
        "Judging model": results.setting["model"],
        "Weights, SHA-256": results.setting.get("weights_sha256"),
        "Profile": profile and f"{profile['name']}, {profile['size']:,} bytes, SHA-256 {profile['sha256']}",
        "Commit": where.get("commit"),
    }

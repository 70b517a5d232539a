"""Presents results as Markdown and as a plot (with matplotlib, the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvpack.bench.links import show_speed, with_links
from kvpack.bench.results import RECOMPUTE, TOKEN_ENTROPY, Interval, Results, Summary, summarize
from kvpack.errors import KvpackError
from kvpack.formats.output import atomic_output

COLUMNS: dict[str, tuple[str, str | Callable[[float], str]]] = {
    "bits": ("bits/elem", "{:#.4g}"),
    "ratio": ("ratio", "{:.2f}"),
    "kl_plain": ("KL plain", "{:.4f}"),
    "kl_repeat": ("KL repeat", "{:.4f}"),
    "ppl_plain": ("ppl plain", "{:+.2%}"),
    "ppl_repeat": ("ppl repeat", "{:+.2%}"),
    "top1_plain": ("top-1", "{:.3f}"),
    "greedy": ("greedy", "{:.0f}"),
    "needles": ("needles", "{:.1f}"),
    "attention_error": ("attn err", "{:.3f}"),
    "compress_seconds": ("in, s", "{:.2f}"),
    "decompress_seconds": ("out, s", "{:.2f}"),
    "decode_flops": ("out, FLOPs", "{:.2g}"),
    "raw_below": ("beats raw below", show_speed),
    "replay_below": ("replay beats it below", show_speed),
}
WITH_INTERVAL = ("kl_plain", "kl_repeat", "ppl_plain", "ppl_repeat")


SHORT = ("bits", "ratio", "kl_plain", "kl_repeat", "ppl_repeat", "top1_plain", "needles", "attention_error")
"""Columns of the first table in a terminal, which must be narrow."""

PRICE = ("ratio", "decompress_seconds", "decode_flops", "raw_below", "replay_below")
"""Columns of the second."""


def cells(summary: Summary, columns: Sequence[str] = tuple(COLUMNS), *, intervals: bool = True) -> list[str]:
    """Return a row of a table: the codec, then ``columns``, with 95 % intervals of KL and perplexity."""
    figures = [(summary.figures.get(name), COLUMNS[name][1], name in WITH_INTERVAL) for name in columns]
    return [summary.codec, *(_cell(figure, form, intervals and wanted) for figure, form, wanted in figures)]


def _cell(figure: Interval | None, form: str | Callable[[float], str], with_interval: bool) -> str:
    if figure is None:
        return "-"
    if not isinstance(form, str):
        return form(figure.mean)
    text = form.format(figure.mean)
    if with_interval and figure.half is not None and figure.half > 0:
        text += " ± " + form.replace("+", "").format(figure.half)
    return text


def markdown(results: Results) -> str:
    """Return a Markdown report: what was run, on which machine, and the tables of codecs and of bounds."""
    documents = list(dict.fromkeys(row.document for row in results.rows))
    summaries = with_links(results.rows, summarize(results.rows))
    originals = [s.figures["needles_original"].mean for s in summaries if "needles_original" in s.figures]
    lines = [
        f"Model {results.setting['model']} ({results.setting['dtype']}), documents: {', '.join(documents)}.",
        "Means over documents"
        + (" ± 95 % confidence" if len(documents) > 1 else "")
        + "; bits of the whole file, seconds of the second of two runs. A file holds keys, values and tokens; "
        "the ratio is theirs, uncompressed, over the whole file.",
    ]
    if originals:
        lines.append(f"Needles found with the uncompressed cache: {originals[0]:.1f}.")
    profile = results.setting["profile"]
    if profile:
        lines.append(
            f"Calibrated codecs use the profile {profile['name']} ({profile['size']:,} bytes, SHA-256 "
            f"{profile['sha256'][:12]}), which no ratio counts."
        )
    versions = ", ".join(f"{name} {version}" for name, version in results.setting["versions"].items())
    where = results.machine
    place = where["gpu"] or f"{where['cores']} cores of {where['processor']}"
    lines.append(f"{place}, Python {where['python']}, {versions}, commit {where['commit']}.")
    header = ["codec", *(title for title, _ in COLUMNS.values())]
    text = "\n".join(lines) + "\n"
    tables = {
        LINKS_TITLE: [s for s in summaries if not s.bound and not s.noise],
        noise_title(summaries): [s for s in summaries if s.noise],
        BOUNDS_TITLE: [s for s in summaries if s.bound],
    }
    for title, some in tables.items():
        table = [header, ["---"] * len(header), *map(cells, some)]
        text += f"{title}\n" + "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n" if some else ""
    return text


def noise_floor(summaries: Sequence[Summary], name: str) -> float | None:
    """Return the smallest figure ``name`` of all kinds of hardware noise, or None where none was measured."""
    found = [s.figures[name].mean for s in summaries if s.noise and name in s.figures]
    return min(found, default=None)


def noise_title(summaries: Sequence[Summary]) -> str:
    """Return what stands above the table of hardware noise."""
    floors = [
        f"{floor:.4f} nats while the text goes on" if name == "kl_plain" else f"{floor:.4f} where a passage is repeated"
        for name in ("kl_plain", "kl_repeat")
        if (floor := noise_floor(summaries, name)) is not None
    ]
    smallest = f" The smallest is {', and '.join(floors)}." if floors else ""
    return f"""
Hardware noise: caches of the same tokens, computed otherwise (`float32` arithmetic; another `schedule` of runs; another
`device`) and judged like those of codecs.{smallest} A loss below it means nothing: another machine does as much.
"""


LINKS_TITLE = f"""
`{RECOMPUTE}` is no file: the tokens as 32-bit integers, and the seconds of running the model over them, without writing
the cache. `out, FLOPs` are the floating-point operations of the model; codecs that run none have 0. Below the speed in
the column `beats raw below`, a link brings the codec's file, decoded, sooner than the uncompressed cache; below that in
the last column, running the model again on this machine is faster than loading the codec's file.
"""

BOUNDS_TITLE = """
Bounds, simulated and not files: an entropy-coded uniform scalar quantiser a channel (`ecsq`, by step over deviation),
the rate-distortion bound of Gaussian vectors of each head (`gaussian`, by distortion over variance), and the entropy of
the tokens under the model, from which replay makes the cache again.
"""

PANELS = (
    ("kl_plain", "next-token KL, text goes on (nats)", "log"),
    ("kl_repeat", "next-token KL, passage repeated (nats)", "log"),
    ("attention_error", "relative error of attention outputs", "log"),
    ("ppl_repeat", "perplexity change, passage repeated", "symlog"),
)


def plot(results: Results, path: Path, mode: int | None = None) -> None:
    """Draw each of :data:`PANELS` against bits per element to ``path``, with one line for each codec family.

    Raises:
        KvpackError: matplotlib is not installed, or it cannot write files of this type.

    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        raise KvpackError("--plot needs matplotlib: pip install 'kvpack[plot]'") from None
    from kvpack.codecs.recipes import family_of

    figure = Figure(figsize=(11, 8), layout="constrained")
    every = summarize(results.rows)
    drawn = [s for s in every if not s.noise and s.codec != RECOMPUTE]
    summaries = [s for s in drawn if "keys_nmse" in s.figures and s.figures["keys_nmse"].mean != 0]
    tokens = [s.figures["bits"].mean for s in every if s.codec == TOKEN_ENTROPY]
    families = list(dict.fromkeys(family_of(s.codec) for s in summaries))
    bounds = {family_of(s.codec) for s in summaries if s.bound}
    for axes, (name, title, scale) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for family in families:
            mine = [s.figures for s in summaries if family_of(s.codec) == family and name in s.figures]
            points = sorted((f["bits"].mean, f[name].mean, f[name].half or 0.0) for f in mine)
            if points:
                bits, values, halves = zip(*points, strict=True)
                low = [min(half, 0.99 * abs(value)) for value, half in zip(values, halves, strict=True)]
                style: dict[str, Any] = (
                    {"linestyle": "--", "linewidth": 1} if family in bounds else {"marker": "o", "markersize": 4}
                )
                axes.errorbar(bits, values, yerr=[low, halves], capsize=2, label=family, **style)
        axes.set(xscale="log", xlabel="bits an element, whole file", ylabel=title)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_yscale(scale, **({"linthresh": 0.01} if scale == "symlog" else {}))
        if scale == "symlog":
            axes.set_ylim(bottom=min(axes.dataLim.y0, 0) - 0.01)
        axes.grid(visible=True, which="both", alpha=0.25)
        left, _ = axes.get_xlim()
        for bits_of_tokens in tokens:  # It is far below all codecs; a line at the edge keeps the scale.
            label = f"token entropy (replay): {bits_of_tokens:.2g}, left of the scale"
            axes.axvline(left, linestyle=":", linewidth=4, color="black", label=label)
        axes.set_xlim(left=left)
        floor = noise_floor(every, name)
        if floor is not None and scale == "log" and floor > 0:
            axes.axhline(floor, linestyle="-.", linewidth=1, color="grey", label="hardware noise, the smallest kind")
            axes.annotate(
                f"hardware noise {floor:.2g}",
                (0.99, floor),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
                color="grey",
            )
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    try:
        with atomic_output(path, force=True, mode=mode) as sink:
            figure.savefig(sink, format=path.suffix[1:] or None)
    except ValueError as error:
        raise KvpackError(f"{path}: {error}") from None

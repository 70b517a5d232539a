"""The command ``kvpack demo``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli import common

if TYPE_CHECKING:
    from rich.table import Table

    from kvpack.bench.demo import Row

TITLE = "The KV cache of 1,792 tokens of a speech, by SmolLM2-135M: {size:.1f} MB"
COLUMNS = ("codec", "keeps", "MB", "smaller", "KL plain", "KL repeat", "facts")
WIDTH = 80
"""Columns of the table, in a terminal of any width."""

RESULTS = "results.json"
"""The file of the table's figures, as ``--json`` prints them."""

BEFORE = """\
kvpack demo runs SmolLM2-135M on 1,792 tokens of a speech, saves its KV cache, compresses it with nine codecs
and lets the model read each result. It takes one to two minutes on 2 cores, and 75 MB in {folder}."""
AFTER = """\
KL: how much the model's next-token predictions change, in nats, while the text
goes on (plain) and while a passage of it is repeated. A CPU and a GPU that
compute the same cache differ by 0.001 to 0.002.
Facts: sentences hidden in the text that the model must recite from its cache.
fisher uses a profile of 12 MB that comes with kvpack. It has seen no speeches.
replay stores the text alone, and runs the model again to get the cache."""


def demo(
    folder: Annotated[
        Path, typer.Option("-o", "--output", help="Write the files to this folder, which is made.", metavar="DIR")
    ] = Path("kvpack-demo"),
    svg: Annotated[
        Path | None, typer.Option(help="Also save the table as a picture.", show_default=False, metavar="FILE")
    ] = None,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Show what kvpack is for, on the cache of a small model that comes with it.

    The model reads a speech. Its cache is captured, compressed by nine codecs, and read by the model again. The
    capture, two compressed files and the figures are kept. An existing capture is used again.
    """
    for line in BEFORE.format(folder=folder).splitlines():
        common.say(line, quiet=quiet, to_stderr=True)
    folder.mkdir(parents=True, exist_ok=True)
    common.remark_leftovers(folder)
    from kvpack.bench import demo as work
    from kvpack.capture import load_model

    model = load_model(None)
    capture = folder / "capture.safetensors"
    if not capture.exists():
        with common.progress_bar("running SmolLM2-135M", quiet) as progress:
            work.capture_demo(model, capture, progress)
    with common.progress_bar("judging codecs", quiet) as progress:
        rows = list(work.judge(model, capture, progress))
    results = {"schema_version": 2, "capture": str(capture), "codecs": [asdict(row) for row in rows]}
    with common.writable(folder / RESULTS, True) as sink:
        sink.write(json.dumps(results, indent=1).encode() + b"\n")
    if as_json:
        common.print_json(results)
        return
    from rich.console import Console

    console = Console(highlight=False, record=svg is not None, width=WIDTH)
    console.print(_table(rows))
    console.print(AFTER, soft_wrap=True)
    console.print("\nTry next:", soft_wrap=True)
    console.print(f"  kvpack inspect {folder / 'fisher-5.kvp'}", markup=False, soft_wrap=True)
    console.print(f"  kvpack verify {capture} \\", markup=False, soft_wrap=True)
    console.print(f"    {folder / 'fisher-5.kvp'} --model embedded", markup=False, soft_wrap=True)
    if svg is not None:
        with common.writable(svg, True) as sink:
            sink.write(console.export_svg(title="kvpack demo").encode())


def _table(rows: list[Row]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    raw = rows[0].ratio * rows[0].size
    title = TITLE.format(size=raw / 1e6)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    found = f"{rows[0].needles_original} of {rows[0].needles_planted}"
    table.add_row("none", "every bit", f"{raw / 1e6:.1f}", "1.0 x", "0", "0", found)
    for row in rows:
        table.add_row(
            row.codec,
            row.keeps,
            f"{row.size / 1e6:.3f}" if row.size < 1e6 else f"{row.size / 1e6:.1f}",
            f"{row.ratio:.1f} x" if row.ratio < 100 else f"{row.ratio:,.0f} x",
            _kl(row.kl_plain),
            _kl(row.kl_repeat),
            f"{row.needles} of {row.needles_planted}",
        )
    return table


def _kl(nats: float) -> str:
    return f"{nats:.3f}" if nats else "0"

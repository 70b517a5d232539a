"""The command ``kvpack demo``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli import common

if TYPE_CHECKING:
    from rich.table import Table

    from kvpack.bench.demo import Row

TITLE = "SmolLM2-135M, bf16 cache of 2,048 tokens of English prose"
COLUMNS = ("codec", "bits/elem", "ratio", "K nmse", "V nmse", "attn err", "in, s", "out, s")


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
    """Show kvpack at work on a small model that comes with it.

    The text comes from Python's language reference. All files are kept, and an existing capture is used again.
    """
    from kvpack.bench import demo as work

    folder.mkdir(parents=True, exist_ok=True)
    common.remark_leftovers(folder)
    capture = folder / "capture.safetensors"
    if not capture.exists():
        with common.progress_bar("capturing SmolLM2-135M", quiet) as progress:
            if progress is None:
                common.say(f"capturing {work.TOKENS} tokens of SmolLM2-135M ...", quiet=quiet, to_stderr=True)
            work.capture_demo(capture, progress)
    rows = []
    with common.progress_bar("running every codec", quiet) as progress:
        for row in work.run_codecs(capture, folder):
            rows.append(row)
            if progress:
                progress(len(rows), len(work.SHOWN))
    if as_json:
        common.print_json({"schema_version": 1, "capture": str(capture), "codecs": [asdict(row) for row in rows]})
        return
    from rich.console import Console

    console = Console(highlight=False, record=svg is not None)
    console.print(_table(rows))
    console.print("Whole files; bits/elem leaves out other tensors than keys and values. Errors: see docs/fidelity.md.")
    console.print(f"Kept in {folder}: {capture.name}, a .kvp file for each codec. Look inside:")
    console.print(f"  kvpack inspect {folder / 'lossless.kvp'}", markup=False)
    console.print(f"  kvpack verify {capture} {folder / 'turboquant-4.kvp'}", markup=False)
    if svg is not None:
        with common.writable(svg, True) as sink:
            sink.write(console.export_svg(title="kvpack demo").encode())


def _table(rows: list[Row]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=TITLE, title_justify="left")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        errors = (row.keys_nmse, row.values_nmse, row.attention_error)
        table.add_row(
            row.codec,
            f"{row.bits_per_element:.3f}",
            f"{row.ratio:.3f}",
            *(["exact"] * 3 if row.bit_exact else [f"{error:.4f}" for error in errors]),
            f"{row.compress_seconds:.2f}",
            f"{row.decompress_seconds:.2f}",
        )
    return table

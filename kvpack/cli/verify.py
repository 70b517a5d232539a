"""``kvpack verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli import common
from kvpack.errors import MismatchError, QualityError

if TYPE_CHECKING:
    from kvpack.fidelity import Attention, Reconstruction, Report


def verify(
    original: Annotated[Path, typer.Argument(help="The capture that was compressed.", show_default=False)],
    file: Annotated[Path, typer.Argument(help="The .kvp file, or another capture.", show_default=False)],
    max_nmse: Annotated[float | None, typer.Option(help="Fail above this NMSE.", show_default=False)] = None,
    max_attn_err: Annotated[
        float | None, typer.Option(help="Fail above this relative error of attention outputs.", show_default=False)
    ] = None,
    bit_exact: Annotated[bool, typer.Option("--bit-exact", help="Fail unless every bit is the same.")] = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Measure what was lost: reconstruction error, and attention fidelity at the capture's probe queries.

    Needs no model. Exit code 3 where a threshold is not met, 5 where FILE was not made from ORIGINAL.
    """
    from kvpack.api import differing_parts
    from kvpack.archive import Archive, Capture, open_cache
    from kvpack.fidelity import check, compare
    from kvpack.tensorfile import TensorFile

    reference = Capture(TensorFile.open(original))
    other = open_cache(file)
    if isinstance(other, Archive):
        stranger = next(differing_parts(other, reference), None)
        if stranger is not None:
            raise MismatchError(f"{file}: was not made from {original} ({stranger} differs)")
    with common.progress_bar("verifying", quiet) as progress:
        report = compare(reference, other, progress)
    if as_json:
        common.print_json({"original": str(original), "file": str(file), **report.to_json()})
    elif not quiet:
        _print(report)
    failures = check(report, max_nmse, max_attn_err, bit_exact)
    if failures:
        raise QualityError(f"{file}: {'; '.join(failures)}")


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("layer", "K nmse", "K max", "K cos", "V nmse", "V max", "V cos", "KL", "attn err", "top16"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.layers:
        table.add_row(str(row.index), *_cells(row.keys), *_cells(row.values), *_attention_cells(row.attention))
    table.add_row("all", *_cells(report.keys), *_cells(report.values), *_attention_cells(report.attention))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"bit-exact: {'yes' if report.bit_exact else 'no'}")
    extras = report.extras
    for what, names in (("differs", extras.differ), ("missing", extras.missing), ("added", extras.added)):
        for name in names:
            console.print(f"{what}: {name}", markup=False)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)


def _cells(part: Reconstruction) -> list[str]:
    return [f"{part.nmse:.1e}", f"{part.max_abs_error:.1e}", f"{part.cosine:.4f}"]


def _attention_cells(part: Attention | None) -> list[str]:
    if part is None:
        return ["-", "-", "-"]
    return [f"{part.kl:.1e}", f"{part.output_error:.1e}", f"{part.topk_overlap:.3f}"]

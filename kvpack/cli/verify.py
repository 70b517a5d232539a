"""``kvpack verify``."""

from __future__ import annotations

from dataclasses import asdict
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cache.untrusted import printable
from kvpack.cli import common
from kvpack.errors import CorruptError, MismatchError, QualityError, UsageError

if TYPE_CHECKING:
    from kvpack.bench.html import Verified
    from kvpack.fidelity import Attention, CacheReader, Reconstruction, Report
    from kvpack.fidelity.model import ModelReport
    from kvpack.jobs import Integrity


def verify(
    original: Annotated[
        Path, typer.Argument(help="The capture that was compressed; or alone, a file to check.", show_default=False)
    ],
    file: Annotated[Path | None, typer.Argument(help="The .kvp file, or another capture.", show_default=False)] = None,
    max_nmse: Annotated[float | None, typer.Option(help="Fail above this NMSE.", show_default=False)] = None,
    max_attn_err: Annotated[
        float | None, typer.Option(help="Fail above this relative error of attention outputs.", show_default=False)
    ] = None,
    bit_exact: Annotated[bool, typer.Option("--bit-exact", help="Fail unless every bit is the same.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="Also run this model from both caches: a hub id, a directory, a .gguf file, or 'embedded'.",
            show_default=False,
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Fail above this mean next-token KL in nats. Needs --model.", show_default=False),
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Fail below this top-1 agreement. Needs --model.", show_default=False)
    ] = None,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(help="Fail above this relative increase in perplexity. Needs --model.", show_default=False),
    ] = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    profile: common.ProfileFile = None,
    memlimit: common.MemoryLimit = None,
    replay_model: Annotated[
        str | None,
        typer.Option(
            help="The model that made the cache, for files of the codec replay (default: that of --model, else the "
            "embedded one).",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also write a page with charts: where the loss is, where the bytes went (extra html).",
            show_default=False,
            metavar="FILE",
        ),
    ] = None,
    force: common.Force = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Measure what compression lost: the reconstruction error, and the attention error at the capture's probe queries.

    With --model, also compare the model's predictions from both caches: next-token KL, perplexity, greedy generation
    and needles. The exit code is 3 if a threshold is not met, and 5 if FILE was not made from ORIGINAL.

    With one file alone, check that it is as it was written: every checksum, and the digests of what is stored
    losslessly. The exit code is 4 if not, and each damaged part is named.
    """
    if file is None:
        limits = (max_nmse, max_attn_err, max_kl, min_top1, max_ppl_increase)
        if bit_exact or model is not None or html is not None or any(limit is not None for limit in limits):
            raise UsageError("thresholds, --model and --html compare two files: kvpack verify ORIGINAL FILE")
        _check_alone(original, profile, replay_model, device, memlimit, quiet, as_json)
        return
    if html is not None:
        _check_page(html, [original, file, profile, common.model_files(model)], force=force, as_json=as_json)
    from kvpack.bench.detail import BINS
    from kvpack.fidelity import check, compare
    from kvpack.formats.source import Capture
    from kvpack.jobs import KvpFile, differing_parts, open_cache

    if model is None and any(limit is not None for limit in (max_kl, min_top1, max_ppl_increase)):
        raise UsageError("--max-kl, --min-top1 and --max-ppl-increase need --model")
    if original == file == common.STDIO:
        raise UsageError("only one of the files can be standard input")
    with common.readable(original) as first, common.readable(file) as second:
        reference = Capture.open(first, str(original))
        other = open_cache(second, common.open_profile(profile), name=str(file))
        if isinstance(other, KvpFile):
            common.limit_memory(other, memlimit)
            stranger = next(differing_parts(other, reference), None)
            if stranger is not None:
                raise MismatchError(f"{file}: was not made from {original} ({stranger} differs)")
            common.attach_model(other, replay_model or model, device)
        with common.progress_bar("verifying", quiet) as progress:
            report = compare(reference, other, progress, bins=BINS if html is not None else 0)
        failures = check(report, max_nmse, max_attn_err, bit_exact)
        judged = None
        if model is not None:
            from kvpack.capture import load_model
            from kvpack.fidelity.model import Judge, check_model

            loaded = load_model(None if model == "embedded" else model, dtype, device)
            with common.progress_bar(f"running {loaded.name}", quiet) as progress:
                judged = Judge(loaded, reference, progress).measure(other)
            failures += check_model(judged, max_kl, min_top1, max_ppl_increase)
        if html is not None:
            from kvpack.bench.html import Verified

            page = _page(Verified(str(original), str(file), report, judged, failures), reference, second)
            with common.writable(html, force, [original, file]) as sink:
                sink.write(page)
    if as_json:
        document = {"original": str(original), "file": str(file), **report.to_json()}
        common.print_json({**document, "model": judged.to_json() if judged else None})
    elif not quiet and html != common.STDIO:
        _print(report)
        if judged:
            _print_model(judged)
    if failures:
        raise QualityError(f"{file}: {'; '.join(failures)}")


def _check_page(html: Path, read: common.Read, *, force: bool, as_json: bool) -> None:
    """Refuse a page that cannot be made or written, before the files are compared."""
    from kvpack.bench.html import javascript

    if as_json and html == common.STDIO:
        raise UsageError("--json and the page cannot both go to standard output")
    common.check_target(html, read, force=force)
    javascript()


def _page(verified: Verified, reference: CacheReader, file: Path) -> bytes:
    """Return the page of a comparison; ``file`` is where the second file can be read again."""
    from kvpack.bench.html import Made, verify_page
    from kvpack.kvp.breakdown import breakdown
    from kvpack.kvp.inspection import inspect

    look, size = inspect(file, verified.file), breakdown(file, verified.file)
    return verify_page(verified, reference, look, size, Made(common.command_line()))


def _check_alone(
    path: Path,
    profile: Path | None,
    replay_model: str | None,
    device: str,
    memlimit: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check one file by what it says of itself."""
    from kvpack.jobs import Integrity, KvpFile, examine, open_cache

    found = Integrity()
    with common.readable(path) as source, common.progress_bar("checking", quiet) as progress:
        opened = open_cache(source, common.open_profile(profile), name=str(path))
        if isinstance(opened, KvpFile):
            common.limit_memory(opened, memlimit)
            if replay_model is not None:
                common.attach_model(opened, replay_model, device)
            found = examine(opened, progress=progress)
    if as_json:
        kind = "kvp" if isinstance(opened, KvpFile) else "capture"
        common.print_json({"schema_version": 1, "file": str(path), "kind": kind, **asdict(found)})
    elif isinstance(opened, KvpFile):
        for damage in found.damage:
            others = common.counted(len(damage.parts) - 1, "part")
            more = f" (and {others} coded with it)" if len(damage.parts) > 1 else ""
            common.say(f"kvpack: {path}: {damage.reason}{more}", to_stderr=True)
        common.say(f"{path}: {_examined(found)}", quiet=quiet)
    else:
        common.say(f"{path}: header and size are right; a capture has no checksums of its data", quiet=quiet)
    if found.damage:
        parts = sum(len(damage.parts) for damage in found.damage)
        lost = "1 part is" if parts == 1 else f"{parts} parts are"
        raise CorruptError(f"{path}: {lost} damaged; decompress --salvage gives the others")


def _examined(found: Integrity) -> str:
    """Say what was verified of a file."""
    said = [f"compared {common.counted(found.checksums, 'checksum')}"]
    if found.exact:
        said.append(f"the digests of {common.counted(found.exact, 'part')} are those of the original")
    if found.lossy:
        said.append(f"decoded {common.counted(found.lossy, 'lossy part')}")
    if found.undecoded:
        what = found.lacking or "intact token ids"
        said.append(f"did not decode {common.counted(found.undecoded, 'part')}, because that needs {what}")
    return ", ".join(said)


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
            console.print(printable(f"{what}: {name}"), markup=False, emoji=False)
    for note in report.notes:
        console.print(printable(f"note: {note}"), markup=False, emoji=False)


def _print_model(report: ModelReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("continuation", "tokens", "KL mean", "KL p90", "KL p99", "top-1", "ppl", "ppl change"):
        table.add_column(column, justify="left" if column == "continuation" else "right", no_wrap=True)
    for name, part in (("plain", report.plain), ("repeat", report.repeat)):
        if part is None:
            continue
        kl = [f"{value:.2e}" for value in (part.kl_mean, part.kl_p90, part.kl_p99)]
        perplexity = [f"{exp(part.nll):.3f}", f"{100 * part.ppl_change:+.2f} %"]
        table.add_row(name, str(part.positions), *kl, f"{part.top1:.3f}", *perplexity)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"greedy generation identical: {report.greedy_identical} of {report.greedy_length} tokens")
    if report.needles:
        found, original = (sum(values) for values in zip(*((n.found, n.original) for n in report.needles), strict=True))
        console.print(f"needles found: {found} of {len(report.needles)} (original cache: {original})")
    for note in report.notes:
        console.print(printable(f"note: {note}"), markup=False, emoji=False)


def _cells(part: Reconstruction) -> list[str]:
    return [f"{part.nmse:.1e}", f"{part.max_abs_error:.1e}", f"{part.cosine:.4f}"]


def _attention_cells(part: Attention | None) -> list[str]:
    if part is None:
        return ["-", "-", "-"]
    return [f"{part.kl:.1e}", f"{part.output_error:.1e}", f"{part.topk_overlap:.3f}"]

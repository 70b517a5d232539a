"""``kvpack verify``."""

from __future__ import annotations

from dataclasses import asdict
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli import common
from kvpack.errors import CorruptError, MismatchError, QualityError, UsageError

if TYPE_CHECKING:
    from kvpack.bench.html import Verified
    from kvpack.fidelity import Attention, CacheReader, Reconstruction, Report
    from kvpack.fidelity.model import ModelReport
    from kvpack.jobs import Integrity

LIMITS = "Limits"
"""The panel of options that make the command fail when too much was lost."""


def verify(
    original: Annotated[
        Path,
        typer.Argument(
            help="The capture that was compressed. Without FILE: the file to check by itself.",
            show_default=False,
            metavar="ORIGINAL",
        ),
    ],
    file: Annotated[
        Path | None,
        typer.Argument(
            help="The .kvp file that was made from it, or another capture.", show_default=False, metavar="[FILE]"
        ),
    ] = None,
    max_nmse: Annotated[
        float | None,
        typer.Option(
            help="Fail if the squared error of keys or of values is above this share of their energy.",
            show_default=False,
            metavar="X",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_attn_err: Annotated[
        float | None,
        typer.Option(
            help="Fail if the relative error of attention outputs is above this.",
            show_default=False,
            metavar="X",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    bit_exact: Annotated[
        bool, typer.Option("--bit-exact", help="Fail unless every bit is the same.", rich_help_panel=LIMITS)
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="Also run this model from both caches: a hub id, a directory, a .gguf file, or 'embedded'.",
            show_default=False,
            metavar="MODEL",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Fail if the mean KL of next-token predictions is above this, in nats. Needs --model.",
            show_default=False,
            metavar="X",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            help="Fail if the most likely next token is the same less often than this (0 to 1). Needs --model.",
            show_default=False,
            metavar="X",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(
            help="Fail if perplexity grows by more than this share: 0.05 for 5 %. Needs --model.",
            show_default=False,
            metavar="X",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    profile: common.ProfileFile = None,
    memlimit: common.MemoryLimit = None,
    replay_model: Annotated[
        str | None,
        typer.Option(
            help="For files of the codec replay: the model that made the cache (default: that of --model, or else the "
            "embedded one).",
            show_default=False,
            metavar="MODEL",
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
    """Measure what compression lost, or check one file for damage.

    With two files, the error of keys and values is measured, and how much it changes what the model's attention reads,
    at the probe queries of ORIGINAL. With --model, the model itself runs from both caches, and its predictions are
    compared. The exit code is 3 if a limit is exceeded, and 5 if FILE was not made from ORIGINAL.

    With one file, every checksum is compared, and the digests of what is stored without loss. The exit code is 4 if
    something is damaged, and each damaged part is named.
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
    columns = ("layer", "K nmse", "K max", "K cos", "V nmse", "V max", "V cos", "KL", "attn err", "top16")
    rows = [
        (str(row.index), *_cells(row.keys), *_cells(row.values), *_attention_cells(row.attention))
        for row in report.layers
    ]
    rows.append(("all", *_cells(report.keys), *_cells(report.values), *_attention_cells(report.attention)))
    common.print_table(columns, rows)
    common.say(f"bit-exact: {'yes' if report.bit_exact else 'no'}")
    extras = report.extras
    for what, names in (
        ("other tensors that differ", extras.differ),
        ("tensors that the file leaves out", extras.missing),
        ("tensors that only the file has", extras.added),
    ):
        if names:
            common.say(f"{what}: {common.listed(names)}")
    for note in report.notes:
        common.say(f"note: {note}")


def _print_model(report: ModelReport) -> None:
    rows = []
    for name, part in (("plain", report.plain), ("repeat", report.repeat)):
        if part is None:
            continue
        kl = map(_short, (part.kl_mean, part.kl_p90, part.kl_p99))
        perplexity = (f"{exp(part.nll):.3f}", f"{100 * part.ppl_change:+.2f} %")
        rows.append((name, str(part.positions), *kl, f"{part.top1:.3f}", *perplexity))
    common.say("")
    columns = ("continuation", "tokens", "KL mean", "KL p90", "KL p99", "top-1", "ppl", "ppl change")
    common.print_table(columns, rows)
    common.say(f"greedy generation identical: {report.greedy_identical} of {report.greedy_length} tokens")
    if report.needles:
        found, original = (sum(values) for values in zip(*((n.found, n.original) for n in report.needles), strict=True))
        common.say(f"needles found: {found} of {len(report.needles)} (original cache: {original})")
    for note in report.notes:
        common.say(f"note: {note}")


def _short(number: float) -> str:
    """Return a number with two digits and its power of ten: 1.1e-2."""
    digits, _, power = f"{number:.1e}".partition("e")
    return f"{digits}e{int(power)}" if power else digits


def _cells(part: Reconstruction) -> list[str]:
    return [_short(part.nmse), _short(part.max_abs_error), f"{part.cosine:.4f}"]


def _attention_cells(part: Attention | None) -> list[str]:
    if part is None:
        return ["-", "-", "-"]
    return [_short(part.kl), _short(part.output_error), f"{part.topk_overlap:.3f}"]

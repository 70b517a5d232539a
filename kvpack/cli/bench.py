"""The command ``kvpack bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli import common
from kvpack.errors import UsageError

if TYPE_CHECKING:
    from kvpack.bench.results import Results
    from kvpack.profiles import Profile


def bench(
    captures: Annotated[
        list[Path] | None,
        typer.Argument(help="The captures that codecs are run over.", show_default=False, metavar="[FILE]..."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "-m",
            "--model",
            help="The model that judges: a hub id, a directory, a .gguf file, 'embedded', or 'none'.",
            metavar="MODEL",
        ),
    ] = "embedded",
    codecs: Annotated[
        str,
        typer.Option(help="Run these codecs or families of codecs, as kivi,turboquant-3, or all.", metavar="LIST"),
    ] = "all",
    profile: common.ProfileFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run few codecs, with one seed and no bounds.")] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Run codecs that use random matrices with this many seeds.", metavar="N")
    ] = 3,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Write the results to this JSON file. If it is there, what it lacks is added.",
            metavar="FILE",
        ),
    ] = Path("kvpack-bench.json"),
    report: Annotated[
        Path | None, typer.Option(help="Also write a report in Markdown.", show_default=False, metavar="FILE")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the curves: .png, .svg or .pdf.", show_default=False, metavar="FILE")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page with charts (extra html).", show_default=False, metavar="FILE"),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Run nothing: list what differs between two results.", metavar="OLD NEW", show_default=False),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure GB/s on a GPU, stage by stage, and nothing else.")
    ] = False,
    gib: Annotated[
        float, typer.Option(min=0.01, help="For --speed: repeat the captures to this many GiB.", metavar="X")
    ] = 1.0,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    force: common.Force = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Compare codecs on captures: how small, and how much is lost.

    Make the captures by kvpack capture --max-tokens 1792 --needles 8. With several captures, means have confidence
    intervals. A run that was interrupted is continued by the same command.
    """
    if compare is not None:
        _compare(*compare, as_json=as_json)
        return
    if not captures:
        raise UsageError("name at least one capture, or --compare OLD NEW")
    if speed:
        _speed(captures, gib, common.open_profile(profile), as_json=as_json)
        return
    read = [*captures, profile, common.model_files(model)]
    for path, others in ((output, [report, plot, html]), (report, [plot, html]), (plot, [html]), (html, [])):
        if path is not None:
            common.check_target(path, read, force=True)
            common.check_different(path, others)
    from kvpack.bench import report as pages
    from kvpack.bench import run
    from kvpack.bench.bounds import BOUNDS
    from kvpack.bench.coding import can_replay, needs_model
    from kvpack.bench.noise import variants
    from kvpack.bench.recompute import Recompute
    from kvpack.bench.results import Results, student_t
    from kvpack.cache.metadata import parse_metadata
    from kvpack.capture import load_model
    from kvpack.codecs.protocol import Need
    from kvpack.codecs.recipes import codecs_matching
    from kvpack.formats.source import Capture
    from kvpack.profiles import profile_for, section_of, sections_of

    if html is not None:
        from kvpack.bench.html import javascript

        javascript()  # If the package is missing, this says so now and not after hours of work.
    for path in captures:
        Capture.open(path)  # A file that is no capture is named now and not after hours of work.
    if len(captures) > 1:
        student_t(len(captures) - 1)  # If scipy is missing, this says so now and not after hours of work.
    names = ",".join(run.QUICK) if quick and codecs == "all" else codecs
    chosen = codecs_matching(names.split(","))
    first = Capture.open(captures[0])
    found = None if profile else profile_for(first.metadata, "fisher", first.tensors.values())
    opened = common.open_profile(profile) if profile else found
    known = sections_of(opened or ())
    unknown = [codec for codec in chosen if Need.PROFILE in codec.traits.needs and section_of(codec.name) not in known]
    if unknown:
        missing = ", ".join(dict.fromkeys(section_of(codec.name) for codec in unknown))
        if "all" not in codecs.split(","):
            raise UsageError(f"no profile for {missing}: give one with -D FILE, made by kvpack calibrate --codecs all")
        chosen = [codec for codec in chosen if codec not in unknown]
        common.say(f"no profile for {missing} (-D): these codecs are left out", quiet=quiet, to_stderr=True)
    judge = None if model == "none" else load_model(None if model == "embedded" else model, dtype, device)
    if any(map(needs_model, chosen)) and not all(can_replay(path, judge) for path in captures):
        if "all" not in codecs.split(","):
            raise UsageError("codecs that run the model need one of the captures' dtype, and captures with a schedule")
        chosen = [codec for codec in chosen if not needs_model(codec)]
        common.say(
            "the model does not replay these captures: codecs that run it are left out", quiet=quiet, to_stderr=True
        )
    extras: list[run.Extra] = [] if judge is None else [Recompute()]
    if not quick:
        extras += BOUNDS if judge is None else (*variants(judge), *BOUNDS, None)
    tasks = run.plan(captures, chosen, 1 if quick else seeds, extras, detailed=html is not None)
    results = Results(run.setting(judge, opened), run.machine(judge))
    if not force:
        results.resume(output)
    with common.progress_bar("running codecs", quiet) as progress:
        for _ in run.measure(tasks, judge, opened, results, progress):
            results.write(output, common.permissions(captures))
    wanted = {task.key for task in tasks}
    details = {task.key: results.details[task.key] for task in tasks if task.key in results.details}
    shown = Results(results.setting, results.machine, [row for row in results.rows if row.key in wanted], details)
    if report is not None:
        with common.writable(report, True, captures) as sink:
            sink.write(pages.markdown(shown).encode())
    if plot is not None:
        pages.plot(shown, plot, common.permissions(captures))
    if html is not None:
        from kvpack.bench.html import Made, bench_page

        needles = parse_metadata(Capture.open(captures[0]).metadata).needles or ()
        made = Made(common.command_line(), results.machine["gpu"])
        page = bench_page(shown, needles, str(captures[0]), None if profile is None else str(profile), made)
        with common.writable(html, True, captures) as sink:
            sink.write(page)
    if as_json:
        common.print_json(shown.to_json())
    elif not quiet:
        _print(shown)


def _speed(captures: list[Path], gib: float, profile: Profile | None, *, as_json: bool) -> None:
    from kvpack.bench.speed import measure, to_json

    lines = []
    for line in measure(captures, gib, profile):
        lines.append(line)
        if not as_json:
            spread = f"({line.slow:.1f} to {line.fast:.1f})"
            common.say(f"{line.what:30} {line.data:30} {line.gb_per_s:8.1f} GB/s {spread:20} {line.remark}".rstrip())
    if as_json:
        common.print_json(to_json(lines))


def _print(results: Results) -> None:
    from kvpack.bench.links import with_links
    from kvpack.bench.report import COLUMNS, PRICE, SHORT, cells
    from kvpack.bench.results import summarize

    summaries = with_links(results.rows, summarize(results.rows))
    for columns in (SHORT, PRICE):
        rows = [
            cells(summary, columns, intervals=False)
            for summary in summaries
            if columns is SHORT or not (summary.bound or summary.noise)
        ]
        common.print_table(("codec", *(COLUMNS[name][0] for name in columns)), rows)
        common.say("")


def _compare(old: Path, new: Path, *, as_json: bool) -> None:
    from kvpack.bench.results import Results, compare

    moved = compare(Results.read(old), Results.read(new))
    if as_json:
        rows = [{"codec": c, "metric": m, "old": before, "new": after} for c, m, before, after in moved]
        common.print_json({"schema_version": 1, "moved": rows})
        return
    for codec, metric, before, after in moved:
        common.say(f"{codec} {metric}: {before:.6g} -> {after:.6g}")
    if not moved:
        common.say("nothing moved by more than one percent")

"""The command ``kvpack inspect``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cache.untrusted import printable
from kvpack.cli import batch, common

if TYPE_CHECKING:
    from kvpack.kvp.inspection import Inspection


WIDEST = 48
"""The most characters that the column of names takes. Longer names are not cut, but others are not padded to them."""

MOST_EQUAL = 3
"""A longer list of equal values is not shown as a list."""

MOST_LAYERS = 4
"""Of a cache with more layers, what each takes is shown with -v alone."""

LONGEST_SETTING = 24
"""A setting of a codec with more characters is not shown. Its length is, and --json has it."""

NARROWEST = 30
"""Values are broken into lines of no fewer characters."""


def inspect(
    inputs: batch.Inputs = None,
    check: Annotated[bool, typer.Option("--check", help="Also compare the checksum of every stream.")] = False,
    files_from: batch.FilesFrom = None,
    recursive: batch.Recursive = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Show what is in a capture or a .kvp file, and where its bytes go.

    Several files may be given. A bad file does not stop the others: it is reported, and the exit code is the largest.
    --json prints one line for each file.
    """
    items = batch.gather(inputs, files_from, recursive, (".kvp", ".safetensors"))
    batch.report(
        _outcomes(items, check), partial(_show, quiet=quiet, verbose=verbose), as_json=as_json, total=len(items)
    )


@dataclass(frozen=True)
class _Inspected(batch.Outcome):
    """The outcome of inspecting a file, and what was found."""

    report: Inspection | None = None


def _outcomes(items: list[batch.Item], check: bool) -> Iterator[batch.Outcome]:
    from kvpack.kvp.inspection import inspect as look

    def work(item: batch.Item) -> batch.Outcome:
        with common.readable(item.path) as source:
            report = look(source, str(item.path), check=check)
        return _Inspected(str(item.path), {"input": str(item.path), **report.to_json()}, report=report)

    return batch.each(items, work)


def _show(outcome: batch.Outcome, *, quiet: bool, verbose: bool) -> None:
    if quiet:
        return
    from rich.console import Console
    from rich.text import Text

    assert isinstance(outcome, _Inspected)
    report = outcome.report
    assert report is not None
    console = Console(highlight=False)
    facts = _facts(report)
    width = min(max(15, *(len(name) for name, _ in facts)), WIDEST)
    for name, value in facts:
        first, *more = _wrapped(value, console.width - width - 2 if console.is_terminal else 0)
        console.print(Text.assemble((f"{name:<{width}}  ", "bold"), first), soft_wrap=True)
        for line in more:
            console.print(Text(f"{'':<{width}}  {line}"), soft_wrap=True)
    if report.streams:
        _show_streams(report)
    if report.layers and (verbose or len(report.layers) <= MOST_LAYERS):
        _show_layers(report)


def _wrapped(value: str, room: int) -> list[str]:
    """Return a value in lines of ``room`` characters, broken between words, or in one line if that is too little."""
    if room < NARROWEST:
        return [value]
    return textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False) or [value]


def _facts(report: Inspection) -> list[tuple[str, str]]:
    facts = [("file", f"{report.path} ({report.kind}, {report.size:,} bytes)")]
    if report.kind == "kvp":
        codec = report.codec or {}
        chains = [(which, " > ".join(map(_stage, codec[which]))) for which in ("keys", "values") if which in codec]
        settings: list[tuple[str, str]] = [*chains] if chains else [("configuration", _stage(codec))]
        label = "lossless" if report.lossless else "lossy"
        facts += [
            ("format", f"{_format(report)}, written by {report.writer}, chunks of {report.chunk_tokens} tokens"),
            ("codec", f"{codec['name']} ({label})"),
            *settings,
            *([("profile", f"{report.profile['name']}, SHA-256 {report.profile['sha256']}")] if report.profile else []),
            *([("decoding", _price(report))] if report.runs_model else []),
            ("original", f"{report.original_size:,} bytes, ratio {report.ratio:.3f}"),
            ("checksums", ", ".join(f"{name} {state}" for name, state in report.checksums.items())),
        ]
    if report.origin is not None:
        facts.append(("origin", f"begins at token {report.origin} of its text, and more tokens may follow"))
    if report.bits_per_element is not None:
        facts.append(("bits/element", f"{report.bits_per_element:.3f}"))
    for shape, names in report.shapes.items():
        shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)})"
        facts.append((shape, shown))
    facts += [(key, _value(value)) for key, value in report.identity.items()]
    if report.dropped:
        facts.append(("left out", common.listed(report.dropped)))
    if report.carried_losslessly:
        facts.append(("carried", f"{len(report.carried_losslessly)} parts losslessly"))
    return [(printable(name), printable(value)) for name, value in facts]


def _value(value: object) -> str:
    """Return a document of the metadata as text. Of a list of equal values one is shown, with their number."""
    if isinstance(value, list) and len(value) > MOST_EQUAL and all(one == value[0] for one in value):
        return f"{len(value)} x {json.dumps(value[0])}"
    return json.dumps(value)


def _price(report: Inspection) -> str:
    """What decoding costs where it runs the model."""
    if report.decode_flops is None:
        return "runs the model; the file does not record how large it is"
    return f"runs the model: {report.decode_flops:.3g} floating-point operations"


def _format(report: Inspection) -> str:
    """The format's version, and the critical features that the file uses, where there are any."""
    return f"{report.format} ({', '.join(report.features)})" if report.features else str(report.format)


def _stage(stage: dict[str, object]) -> str:
    configuration = stage["configuration"]
    assert isinstance(configuration, dict)
    inner = ", ".join(f"{name}={_short(value)}" for name, value in configuration.items())
    return f"{stage['name']}({inner})"


def _short(value: object) -> str:
    """Return a setting as text, or how long it is, as for replay's sample."""
    text = str(value)
    return text if len(text) <= LONGEST_SETTING else f"({len(text)} characters)"


def _show_streams(report: Inspection) -> None:
    rows = {**report.streams, "(header)": report.header, "(index, footer)": report.index}
    cells = [(name, f"{size:,}", f"{100 * size / report.size:.2f} %") for name, size in rows.items()]
    common.say("")
    common.print_table(("stream", "bytes", "share"), cells, "where the bytes went")


def _show_layers(report: Inspection) -> None:
    cells = [
        (str(row.layer), f"{row.tokens:,}", f"{row.keys:,}", f"{row.values:,}", f"{row.bits_per_element:.3f}")
        for row in report.layers
    ]
    common.say("")
    common.print_table(("layer", "tokens", "keys, bytes", "values, bytes", "bits/element"), cells, "layers")

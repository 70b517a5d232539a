"""The command ``kvpack claims``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli import common
from kvpack.cli.capture import read_text
from kvpack.errors import UsageError

if TYPE_CHECKING:
    from kvpack.bench.claims import Line

HEADER = (
    "stored",
    "bits a token",
    "raw / it",
    "TurboQuant / it",
    "3.25 bits / it",
    "FLOPs a token to read",
    "prefill, s",
    "how",
)


def claims(
    config: Annotated[
        list[Path] | None,
        typer.Option(
            "--config",
            help="The config.json of a model. Repeat the option for several.",
            show_default=False,
            metavar="FILE",
        ),
    ] = None,
    bits: Annotated[float, typer.Option(min=0.1, help="Bits that TurboQuant takes for an element.", metavar="X")] = 3.0,
    norm_bits: Annotated[
        float, typer.Option(min=0, help="Bits that TurboQuant takes for a norm, 0 in the paper.", metavar="X")
    ] = 0,
    token_bits: Annotated[
        float, typer.Option(min=0.001, help="The entropy of a token that is assumed, in bits.", metavar="X")
    ] = 4.3,
    context: Annotated[
        int, typer.Option(min=1, help="State the price of replay for a cache of this many tokens.", metavar="N")
    ] = 2048,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Measure the entropy of a token on this text instead of assuming it.",
            show_default=False,
            metavar="FILE",
        ),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            "--measured", help="Also measure codecs and replay on this capture.", show_default=False, metavar="FILE"
        ),
    ] = None,
    profile: common.ProfileFile = None,
    model: common.Model = None,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Read at most this many tokens of the text.", metavar="N")
    ] = 2048,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Compare the claim of arXiv 2604.15356 with measurements.

    The paper says that a token of a cache need take no more bits than the token itself. With --text, these bits are
    measured under --model. With --measured, real files of a capture are measured too. Who stores tokens runs the model
    again to read them: the table has the floating-point operations that this takes.
    """
    from kvpack.bench.claims import claim, lines, read_config

    if not config and measured is None:
        raise UsageError("name a model's configuration (--config) or a capture (--measured)")
    if model is not None and text is None and measured is None:
        raise UsageError("--model measures the entropy of a text, or a capture: give --text or --measured too")
    if profile is not None and measured is None:
        raise UsageError("--profile is for the codecs of --measured")
    shapes = {str(path): read_config(path) for path in config or ()}
    content = None if text is None else read_text(text)
    opened = common.open_profile(profile)
    loaded = None
    if content is not None or measured is not None:
        from kvpack.capture import load_model

        loaded = load_model(model)
    source, how = f"assumed, {token_bits:g} bits", "assumed"
    if content is not None and loaded is not None and text is not None:
        from kvpack.capture.entropy import token_bits as measure

        with common.progress_bar(f"running {loaded.name}", quiet) as progress:
            token_bits, count = measure(loaded, loaded.tokenizer(content).input_ids[:max_tokens], progress)
        source, how = f"measured under {loaded.name} on {count} tokens of {text.name}", "measured"
    rows, table = [], []
    for name, (shape, network) in shapes.items():
        found = {
            "query heads, as the paper counts": claim(
                shape, shape.query_heads, token_bits=token_bits, bits=bits, norm_bits=norm_bits
            ),
            "KV heads, as the model caches": claim(
                shape, shape.kv_heads, token_bits=token_bits, bits=bits, norm_bits=norm_bits
            ),
        }
        some = lines(f"{name}: {shape.name}", shape, found, network, context, how)
        rows += [{"config": name, "counting": counting, **one.to_json()} for counting, one in found.items()]
        table += some
    if measured is not None and loaded is not None:
        from kvpack.bench.measured import measured_lines

        with common.progress_bar(f"measuring {measured.name}", quiet) as progress:
            table += measured_lines(measured, loaded, opened, bits, progress)
    if as_json:
        document = {"schema_version": 1, "token_bits_source": source, "context": context, "claims": rows}
        common.print_json({**document, "table": [line.to_json() for line in table]})
        return
    _print(table, source, context)


def _print(table: list[Line], source: str, context: int) -> None:
    """Print the lines model by model, in columns that line up."""
    cells = [[HEADER, *map(_cells, some)] for some in _by_model(table).values()]
    widths = [max(len(row[i]) for rows in cells for row in rows) for i in range(len(HEADER))]
    for name, rows in zip(_by_model(table), cells, strict=True):
        common.say(name)
        for row in rows:
            padded = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            common.say(f"  {'  '.join(padded)}".rstrip())
        common.say("")
    common.say(f"A token's entropy in computed lines: {source}.")
    common.say(
        "What is replayed is read by running the model over all tokens. Operations are the mean over a cache of "
        f"{context:,} tokens in computed lines, over the capture in measured ones; of tokens by their entropy they "
        "include the run, token by token, that finds out what the tokens are, and seconds do not."
    )


def _by_model(table: list[Line]) -> dict[str, list[Line]]:
    models: dict[str, list[Line]] = {}
    for line in table:
        models.setdefault(line.model, []).append(line)
    return models


def _cells(line: Line) -> tuple[str, ...]:
    flops = "unknown" if line.flops is None else f"{line.flops:.3g}" if line.runs_model else "0"
    seconds = ("-" if line.seconds is None else f"{line.seconds:.2f}") if line.runs_model else "0"
    ratios = (f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.2f}x" for ratio in _ratios(line))
    bits = f"{line.bits:,.0f}" if line.bits >= 100 else f"{line.bits:.2f}"
    return (line.stored, bits, *ratios, flops, seconds, line.how)


def _ratios(line: Line) -> tuple[float, float, float]:
    return line.over_raw, line.over_turboquant, line.over_packed

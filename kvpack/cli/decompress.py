"""``kvpack decompress``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack.cli import batch, common
from kvpack.errors import UsageError


def decompress(
    inputs: batch.Inputs = None,
    output: batch.Output = None,
    layers: Annotated[
        str | None, typer.Option(help="Decompress these layers only, as 3-5,8.", show_default=False, metavar="LIST")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Decompress these tokens only, as 0:256 for the first 256.", show_default=False, metavar="START:STOP"
        ),
    ] = None,
    profile: common.ProfileFile = None,
    model: common.ReplayedBy = None,
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate",
            help="For the codec replay: accept what the model computes here, even if bits differ from the original's.",
        ),
    ] = False,
    salvage: Annotated[
        bool,
        typer.Option("--salvage", help="Of a damaged file, write what is intact. What is missing is written as NaN."),
    ] = False,
    test: Annotated[bool, typer.Option("-t", "--test", help="Decode and check everything. Write nothing.")] = False,
    files_from: batch.FilesFrom = None,
    recursive: batch.Recursive = False,
    jobs: batch.Jobs = 1,
    resume: batch.Resume = False,
    force: common.Force = False,
    keep: common.Keep = False,
    remove: common.Remove = False,
    threads: common.Threads = None,
    memlimit: common.MemoryLimit = None,
    device: common.Gpu = "auto",
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
    as_json: common.Json = False,
) -> None:
    """Decompress .kvp files to captures (safetensors).

    A file that was compressed without loss is restored byte for byte, and its digests prove it.

    Several files may be given. A bad file does not stop the others: it is reported, and the exit code is the largest.
    --json prints one line for each file.
    """
    partial_cache = layers is not None or tokens is not None
    if remove and (partial_cache or test):
        raise UsageError("--rm goes with decompressing a whole file")
    if test and (output is not None or resume):
        raise UsageError("-t writes nothing: it does not go with -o or --resume")
    if salvage and (remove or test or resume):
        raise UsageError("--salvage does not go with --rm, -t or --resume")
    chosen = parse_layers(layers), parse_tokens(tokens)
    items = batch.gather(inputs, files_from, recursive, (".kvp",))
    if not test:
        items = batch.with_targets(items, output, partial(_name_of, selection=partial_cache))
    common.check_streams([(item.path, item.target) for item in items], remove=remove, keep=keep, as_json=as_json)
    from kvpack.cli import workers
    from kvpack.cli.decompressing import Decompressing, Options

    options = Options(
        layers=chosen[0],
        tokens=chosen[1],
        profile=profile,
        model=model,
        approximate=approximate,
        salvage=salvage,
        output=output,
        resume=resume,
        force=force,
        remove=remove,
        threads=common.share(threads, jobs),
        memlimit=common.parse_size(memlimit),
        jobs=jobs,
        device=common.device_for(device, jobs),
        quiet=quiet,
    )
    outcomes = workers.run(partial(Decompressing, options), items, jobs)
    batch.report(outcomes, partial(_show, quiet=quiet, verbose=verbose), as_json=as_json, total=len(items))


SHOWN = 5
"""The number of damaged parts that are named unless the user asks for all."""


def _name_of(path: Path, *, selection: bool) -> Path:
    """Return the name of the output of the input ``path``."""
    if selection:
        raise UsageError("a selection needs -o: the default name is that of the whole capture")
    if path.suffix != ".kvp":
        if path.suffix == ".safetensors":
            raise UsageError(f"{path}: is a capture by its name, and decompress takes .kvp files")
        raise UsageError(f"{path}: does not end in .kvp; name the output with -o")
    return path.with_suffix("")


def _show(outcome: batch.Outcome, *, quiet: bool, verbose: bool) -> None:
    row = outcome.row
    assert row is not None
    if row["skipped"]:
        common.say(f"{row['input']}: {row['output']} is there already", quiet=quiet)
        return
    what = "ok" if row["output"] is None else f"-> {row['output']}"
    kind = "approximate" if row["differing"] else "bit-exact" if row["lossless"] else "lossy"
    kind = "salvaged" if row["missing"] else kind
    common.say(f"{row['input']} {what} ({kind})", quiet=quiet, to_stderr=row["output"] == str(common.STDIO))
    if row["differing"]:
        common.say(_distance(row), quiet=quiet, to_stderr=True)
    _say_missing(row, quiet, verbose)
    left = row["left_out"]
    if left:
        names = ", ".join(left if verbose or len(left) <= 3 else [*left[:3], "..."])
        of_what = "" if row["missing"] else " of the selection"
        line = f"kvpack: {row['input']}: left out{of_what}: {len(left)} tensors ({names})"
        common.say(line, quiet=quiet, to_stderr=True)


def _say_missing(row: dict[str, Any], quiet: bool, verbose: bool) -> None:
    """Say what is damaged in a file that was salvaged, and which tokens are whole."""
    for what in row["repaired"]:
        common.say(f"kvpack: {row['input']}: its {what} is damaged and was rebuilt", quiet=quiet, to_stderr=True)
    damages = row["missing"] if verbose else row["missing"][:SHOWN]
    for damage in damages:
        first, *others = damage["parts"]
        more = f" and {common.counted(len(others), 'part')} coded with it" if others else ""
        reason = damage["reason"].removeprefix(f"{first}: ")
        common.say(f"kvpack: {row['input']}: missing {first}{more}: {reason}", quiet=quiet, to_stderr=True)
    if len(damages) < len(row["missing"]):
        line = f"kvpack: {row['input']}: {len(row['missing']) - len(damages)} more are missing; -v names them"
        common.say(line, quiet=quiet, to_stderr=True)
    if row["missing"] and row["whole_tokens"]:
        whole = row["whole_tokens"]
        line = f"every layer is whole up to token {whole}: --tokens 0:{whole} gives these rows alone"
        common.say(f"kvpack: {row['input']}: {line}", quiet=quiet, to_stderr=True)


def _distance(row: dict[str, Any]) -> str:
    """Say how far an approximate result is from the original."""
    return (
        f"kvpack: {row['input']}: this machine computes the cache otherwise than the one that wrote the file: "
        f"{row['differing']} of {row['parts']} parts differ, and {row['differing_sampled']:.0%} of the sampled elements"
    )


def parse_layers(text: str | None) -> frozenset[int] | None:
    """Return the layers in a list: ``3-5,8`` gives {3, 4, 5, 8}.

    Raises:
        UsageError: The text is not such a list.

    """
    if text is None:
        return None
    layers: set[int] = set()
    for piece in text.split(","):
        first, dash, last = piece.partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)) or len(piece) > 12:
            raise UsageError(f"--layers takes a list like 3-5,8, not {text!r}")
        layers.update(range(int(first), int(last or first) + 1))
    if not layers:
        raise UsageError(f"--layers {text!r} names no layer")
    return frozenset(layers)


def parse_tokens(text: str | None) -> tuple[int, int] | None:
    """Return the limits of a range: ``0:256`` gives (0, 256).

    Raises:
        UsageError: The text is not such a range.

    """
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()) or int(start) >= int(stop):
        raise UsageError(f"--tokens takes a range like 0:256, not {text!r}")
    return int(start), int(stop)

"""``kvpack decompress``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli import common
from kvpack.errors import UsageError
from kvpack.formats.output import sync_folder

if TYPE_CHECKING:
    from kvpack.profiles import Profile


def decompress(
    inputs: common.Inputs,
    output: common.Output = None,
    layers: Annotated[
        str | None, typer.Option(help="Decompress only these layers, e.g. 3-5,8.", show_default=False, metavar="LIST")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Decompress only tokens START:STOP, e.g. 0:256.", show_default=False, metavar="RANGE"),
    ] = None,
    profile: common.ProfileFile = None,
    model: common.ReplayedBy = None,
    approximate: Annotated[
        bool,
        typer.Option("--approximate", help="Take what replay's model computes here even if it is not bit for bit."),
    ] = False,
    test: Annotated[bool, typer.Option("-t", "--test", help="Decode and check everything, but write nothing.")] = False,
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
    """Decompress .kvp files. A losslessly compressed file is restored byte for byte, and digests verify this."""
    common.check_inputs(inputs, output, keep=keep, remove=remove, as_json=as_json and not test)
    partial = layers is not None or tokens is not None
    if remove and (partial or test):
        raise UsageError("--rm goes with decompressing a whole file")
    chosen = parse_layers(layers), parse_tokens(tokens)
    opened = common.open_profile(profile)
    rows = []
    for path in inputs:
        target = _target(path, output, partial, test)
        if target is not None:
            common.check_target(target, [path, profile, common.model_files(model)], force=force)
        settings = _Settings(opened, model, approximate, remove, threads, memlimit, device)
        rows.append(_decompress_one(path, target, settings, chosen, force, quiet))
        row = rows[-1]
        if remove and target is not None:
            sync_folder(target)
            path.unlink()
        if not as_json:
            what = "ok" if test else f"-> {target}"
            kind = "approximate" if row["differing"] else "bit-exact" if row["lossless"] else "lossy"
            common.say(f"{path} {what} ({kind})", quiet=quiet, to_stderr=target == common.STDIO)
            if row["differing"]:
                common.say(_distance(row), quiet=quiet, to_stderr=True)
            left = row["left_out"]
            if left and not quiet:
                names = ", ".join(left if verbose or len(left) <= 3 else [*left[:3], "..."])
                common.say(f"kvpack: left out of the selection: {len(left)} tensors ({names})", to_stderr=True)
    if as_json:
        common.print_json({"schema_version": 1, "files": rows})


def _target(path: Path, output: Path | None, partial: bool, test: bool) -> Path | None:
    if test:
        return None
    if output is not None:
        return output
    if path == common.STDIO:
        return common.STDIO
    if partial:
        raise UsageError("a selection needs -o: the default name is that of the whole capture")
    if path.suffix != ".kvp":
        raise UsageError(f"{path}: does not end in .kvp; name the output with -o")
    return path.with_suffix("")


@dataclass(frozen=True)
class _Settings:
    """How to decompress files."""

    profile: Profile | None
    model: str | None
    approximate: bool
    remove: bool
    threads: int | None
    memlimit: str | None
    device: str


def _distance(row: dict[str, Any]) -> str:
    """Say how far an approximate result is from the original."""
    return (
        f"kvpack: {row['input']}: this machine computes the cache otherwise than the one that wrote the file: "
        f"{row['differing']} of {row['parts']} parts differ, and {row['differing_sampled']:.0%} of the sampled elements"
    )


def _decompress_one(
    path: Path,
    target: Path | None,
    settings: _Settings,
    chosen: tuple[frozenset[int] | None, tuple[int, int] | None],
    force: bool,
    quiet: bool,
) -> dict[str, Any]:
    from kvpack import jobs

    left_out: list[str] = []
    title = f"{'testing' if target is None else 'decompressing'} {path.name}"
    with common.readable(path) as source, common.progress_bar(title, quiet) as progress:
        file = jobs.KvpFile.open(source, settings.profile, str(path), approximate=settings.approximate)
        if settings.remove and file.needs_model:
            raise UsageError(f"{path}: --rm is refused with replay: only some machines can make this file again")
        common.limit_memory(file, settings.memlimit)
        common.attach_model(file, settings.model, settings.device, progress)
        exact = all(codec.lossless for codec in file.codecs)
        engine = common.engine(settings.device, [source], settings.threads, quiet, exact=exact)
        if target is None:
            jobs.check(file, engine=engine, progress=progress)
        else:
            with common.writable(target, force, [path]) as sink:
                left_out = jobs.decompress(file, sink, jobs.Selection(*chosen), engine=engine, progress=progress)
    return {
        "input": str(path),
        "output": None if target is None else str(target),
        "lossless": file.lossless,
        "left_out": left_out,
        "parts": len(file.container.parts),
        "differing": len(file.replay.differing) if file.replay else 0,
        "differing_sampled": file.replay.sampled if file.replay else 0.0,
    }


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

"""``kvpack compress``."""

from __future__ import annotations

from enum import StrEnum
from fnmatch import fnmatchcase
from functools import partial
from typing import Annotated, Any

import typer

from kvpack.cli import batch, common


def _codec_names() -> list[str]:
    from kvpack.codecs.recipes import codec_names

    return codec_names()


class TokenCoder(StrEnum):
    """How the codec ``replay`` stores token ids."""

    FAST = "fast"
    MODEL = "model"


def compress(
    inputs: batch.Inputs = None,
    output: batch.Output = None,
    codec: Annotated[
        str | None,
        typer.Option(
            "-c",
            "--codec",
            autocompletion=_codec_names,
            help="Use this codec (default: lossless). --list-codecs describes them all.",
            show_default=False,
            metavar="NAME",
        ),
    ] = None,
    list_codecs: Annotated[
        bool,
        typer.Option(
            "--list-codecs", help="Say what each codec is, what it needs and how small it is. -q lists names alone."
        ),
    ] = False,
    profile: common.ProfileFile = None,
    model: common.ReplayedBy = None,
    token_coder: Annotated[
        TokenCoder,
        typer.Option(
            help="For the codec replay: how to store the token ids. 'model' is smaller and slower than 'fast', and is "
            "read only on machines that compute as this one does.",
            metavar="fast|model",
        ),
    ] = TokenCoder.FAST,
    quality: Annotated[
        str | None,
        typer.Option(
            help="Choose a lossy codec by quality: high, balanced or small. Needs a profile (-D).",
            show_default=False,
            metavar="LEVEL",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Choose a lossy codec by the loss that was measured when the profile was made: the next-token KL in "
            "nats. Other texts may lose more. Needs a profile (-D).",
            show_default=False,
            metavar="X",
        ),
    ] = None,
    max_attn_err: Annotated[
        float | None,
        typer.Option(
            help="Choose a lossy codec by the relative error of attention outputs, measured at the capture's probe "
            "queries.",
            show_default=False,
            metavar="X",
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Make the file at least this many times smaller, with as little loss as that takes.",
            show_default=False,
            metavar="X",
        ),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(
            help="Code this many tokens together, a multiple of 128 (default: 2048; for replay, all). To read a few "
            "tokens, all of their chunk are decoded.",
            show_default=False,
            metavar="N",
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out the tensors of this name or pattern, as 'queries.*'. May be repeated.",
            show_default=False,
            metavar="NAME",
        ),
    ] = None,
    drop_probes: Annotated[
        bool | None,
        typer.Option(
            "--drop-probes/--keep-probes",
            help="Leave out, or keep, the tensors that only measure quality, as verify does with the original "
            "(default: lossless files keep them, lossy files do not).",
            show_default=False,
        ),
    ] = None,
    files_from: batch.FilesFrom = None,
    recursive: batch.Recursive = False,
    jobs: batch.Jobs = 1,
    resume: batch.Resume = False,
    force: common.Force = False,
    keep: common.Keep = False,
    remove: common.Remove = False,
    lossy_ok: Annotated[
        bool,
        typer.Option(
            "--lossy-ok",
            help="With --rm: delete inputs even if their outputs are lossy or leave tensors out.",
            rich_help_panel=common.FILES,
        ),
    ] = False,
    threads: common.Threads = None,
    device: common.Gpu = "auto",
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
    as_json: common.Json = False,
) -> None:
    """Compress captures to .kvp files, without loss unless you ask for it.

    To accept loss, name a codec (-c) or a goal (--quality, --max-kl, --max-attn-err or --ratio), not both.

    A lossy codec changes keys and values alone. Other tensors are stored without loss. What only measures quality is
    left out of lossy files: see --keep-probes.

    Several files may be given. A bad file does not stop the others: it is reported, and the exit code is the largest.
    --json prints one line for each file.
    """
    if list_codecs:
        from kvpack.cli.codecs import show_codecs

        show_codecs(quiet=quiet, as_json=as_json)
        return
    items = batch.gather(inputs, files_from, recursive, (".safetensors",))
    items = batch.with_targets(items, output, lambda path: path.with_name(path.name + ".kvp"))
    common.check_streams([(item.path, item.target) for item in items], remove=remove, keep=keep, as_json=as_json)
    from kvpack.cli import workers
    from kvpack.cli.compressing import Compressing, Options

    options = Options(
        codec=codec,
        quality=quality,
        max_kl=max_kl,
        max_attn_err=max_attn_err,
        ratio=ratio,
        profile=profile,
        model=model,
        token_coder=token_coder.value,
        chunk_tokens=chunk_tokens,
        drop=drop or [],
        keep_probes=None if drop_probes is None else not drop_probes,
        output=output,
        resume=resume,
        force=force,
        remove=remove,
        lossy_ok=lossy_ok,
        threads=common.share(threads, jobs),
        device=common.device_for(device, jobs),
        quiet=quiet,
    )
    outcomes = workers.run(partial(Compressing, options), items, jobs)
    batch.report(outcomes, partial(_show, quiet=quiet, verbose=verbose), as_json=as_json, total=len(items))


SURPRISE = 1.5
"""A warning is printed if a capture takes more than this many times the bits that the profile expects."""


RESIDUALS = ("residual", "residual/raw")
"""The streams of the codec ``replay`` that hold what a model misses."""


def _show(outcome: batch.Outcome, *, quiet: bool, verbose: bool) -> None:
    row = outcome.row
    assert row is not None
    if row["skipped"]:
        common.say(f"{row['input']}: {row['output']} is there already", quiet=quiet)
        return
    common.say(_line(row), quiet=quiet, to_stderr=row["output"] == str(common.STDIO))
    if row["carried_losslessly"]:
        common.say(_carried(row["carried_losslessly"], verbose), quiet=quiet, to_stderr=True)
    if missed := sum(size for name, size in row["streams"].items() if name in RESIDUALS):
        common.say(_otherwise(row, missed), quiet=quiet, to_stderr=True)
    if row["surprise"] is not None and row["surprise"] > SURPRISE:
        common.say(_surprised(row), quiet=quiet, to_stderr=True)


def _line(row: dict[str, Any]) -> str:
    line = "{input} -> {output}: {codec}, {original_size} -> {size} bytes, ratio {ratio:.3f}".format(**row)
    return f"{line}, without {_left_out(row)}" if row["dropped"] else line


def _left_out(row: dict[str, Any]) -> str:
    """Say which tensors of the input are not in the output. Neither size counts them."""
    from kvpack.jobs import PROBES

    names = row["dropped"]
    probes = all(any(fnmatchcase(name, pattern) for pattern in PROBES) for name in names)
    what = " that only measure quality" if probes else ""
    return f"{common.counted(len(names), 'tensor')}{what} ({row['dropped_bytes']} bytes)"


def _carried(names: list[str], verbose: bool) -> str:
    shown = ", ".join(names if verbose or len(names) <= 3 else [*names[:3], "..."])
    return f"kvpack: {len(names)} parts the codec cannot represent (NaN, Inf or out of range) are lossless: {shown}"


def _otherwise(row: dict[str, Any], missed: int) -> str:
    return (
        f"kvpack: {row['input']}: this machine does not compute the cache bit for bit, so the file holds {missed} "
        "bytes of differences, and comes back on machines that compute as this one does; lossless comes back on any"
    )


def _surprised(row: dict[str, Any]) -> str:
    return (
        f"kvpack: {row['input']}: takes {row['surprise']:.1f} times the bits that the profile expects. It is unlike "
        "the texts that the profile was made from, so it may lose more than they did: kvpack verify --model measures it"
    )

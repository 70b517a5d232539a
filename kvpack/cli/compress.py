"""``kvpack compress``."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import typer

from kvpack.cli import batch, common


def _codec_names() -> list[str]:
    from kvpack.codecs.recipes import codec_names

    return codec_names()


def _list_codecs(value: bool) -> None:
    if value:
        typer.echo("\n".join(_codec_names()))
        raise typer.Exit


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
            help="Codec to use (default: lossless); see --list-codecs.",
            show_default=False,
        ),
    ] = None,
    list_codecs: Annotated[
        bool, typer.Option("--list-codecs", callback=_list_codecs, is_eager=True, help="List all codecs.")
    ] = False,
    profile: common.ProfileFile = None,
    model: common.ReplayedBy = None,
    token_coder: Annotated[
        TokenCoder,
        typer.Option(help="How replay stores token ids: fast, or model: smaller, slow, for this machine only."),
    ] = TokenCoder.FAST,
    quality: Annotated[
        str | None,
        typer.Option(
            help="Lossy at a quality that calibration promises: high, balanced, small. Needs -D.", show_default=False
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Largest next-token KL (nats) on texts held back from calibration. Needs -D.", show_default=False
        ),
    ] = None,
    max_attn_err: Annotated[
        float | None,
        typer.Option(help="Largest relative error of attention outputs at the probe queries.", show_default=False),
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Smallest compression ratio to reach.", show_default=False)
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens in a chunk, the unit of range reads; a multiple of 128 "
            "(default: 2048; for replay, all tokens).",
            show_default=False,
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out tensors by name or pattern, e.g. 'queries.*'. Can be repeated.", show_default=False
        ),
    ] = None,
    drop_probes: Annotated[
        bool, typer.Option("--drop-probes", help="Leave out tensors that are only used to measure fidelity.")
    ] = False,
    files_from: batch.FilesFrom = None,
    recursive: batch.Recursive = False,
    jobs: batch.Jobs = 1,
    resume: batch.Resume = False,
    force: common.Force = False,
    keep: common.Keep = False,
    remove: common.Remove = False,
    lossy_ok: Annotated[
        bool,
        typer.Option("--lossy-ok", help="With --rm: delete inputs though the output is lossy or leaves tensors out."),
    ] = False,
    threads: common.Threads = None,
    device: common.Gpu = "auto",
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
    as_json: common.Json = False,
) -> None:
    """Compress captures (safetensors) to .kvp files, losslessly unless you choose another codec.

    Tensors other than keys and values are stored losslessly, and so are parts that a lossy codec cannot represent.

    A bad file does not stop the others: each is reported, and the exit code is the largest. --json prints one line for
    each file.

    A GPU codes all files of one command together, which makes many small files faster. --device auto decides by the
    total size of the files.
    """
    del list_codecs
    items = batch.gather(inputs, files_from, recursive, (".safetensors",))
    items = batch.with_targets(items, output, lambda path: path.with_name(path.name + ".kvp"))
    common.check_streams([(item.path, item.target) for item in items], remove=remove, keep=keep, as_json=as_json)
    from kvpack.cli import workers
    from kvpack.cli.compressing import Compressing, Options
    from kvpack.jobs import PROBES

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
        drop=[*(drop or []), *(PROBES if drop_probes else ())],
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
    return "{input} -> {output}: {codec}, {original_size} -> {size} bytes, ratio {ratio:.3f}".format(**row)


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
        f"kvpack: {row['input']} takes {row['surprise']:.1f} times the bits that the profile expects: it is unlike the "
        "texts of its calibration, and the guarantee may not hold; verify --model measures it"
    )

"""``kvpack compress``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli import common
from kvpack.errors import FormatError, KvpackError, UsageError

if TYPE_CHECKING:
    from kvpack.codecs import Codec
    from kvpack.profile import Profile


def _codec_names() -> list[str]:
    from kvpack.codecs import CODECS

    return list(CODECS)


def _list_codecs(value: bool) -> None:
    if value:
        typer.echo("\n".join(_codec_names()))
        raise typer.Exit


def compress(
    inputs: common.Inputs,
    output: common.Output = None,
    codec: Annotated[
        str,
        typer.Option("-c", "--codec", autocompletion=_codec_names, help="How to compress; see --list-codecs."),
    ] = "lossless",
    list_codecs: Annotated[
        bool, typer.Option("--list-codecs", callback=_list_codecs, is_eager=True, help="Name every codec.")
    ] = False,
    profile: common.ProfileFile = None,
    quality: Annotated[
        str | None,
        typer.Option(help="Lossy by guarantee, with -D: high, balanced or small.", show_default=False),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="With -D: next-token KL (nats) that no text held back from calibration was above.", show_default=False
        ),
    ] = None,
    max_attn_err: Annotated[
        float | None,
        typer.Option(help="Error of attention outputs at the probe queries, at most.", show_default=False),
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="So many times smaller, at least.", show_default=False)] = None,
    chunk_tokens: Annotated[
        int, typer.Option(help="Tokens a chunk: what one range read decodes; a multiple of 128.")
    ] = 2048,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Leave out tensors by name or pattern, e.g. 'queries.*'; repeatable.", show_default=False),
    ] = None,
    drop_probes: Annotated[
        bool, typer.Option("--drop-probes", help="Leave out what only measures fidelity: queries, attention mass.")
    ] = False,
    force: common.Force = False,
    keep: common.Keep = False,
    remove: common.Remove = False,
    threads: common.Threads = None,
    device: common.Gpu = "auto",
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
    as_json: common.Json = False,
) -> None:
    """Compress captures (safetensors) to .kvp files; lossless unless another codec is asked for.

    Tensors other than keys and values are carried losslessly, and so is what a lossy codec cannot represent.
    """
    del list_codecs
    common.check_inputs(inputs, output, keep=keep, remove=remove, as_json=as_json)
    from kvpack.api import PROBES

    opened = common.open_profile(profile)
    choice = _choice(codec, opened, quality, max_kl, max_attn_err, ratio)
    patterns = [*(drop or []), *(PROBES if drop_probes else ())]
    rows = []
    for path in inputs:
        target = output or (common.STDIO if path == common.STDIO else path.with_name(path.name + ".kvp"))
        common.check_distinct(path, target)
        row = _compress_one(path, target, choice, opened, chunk_tokens, patterns, force, threads, device, quiet)
        rows.append(row)
        if remove:
            _remove_verified(path, target, opened)
        to_stderr = target == common.STDIO
        if not as_json:
            common.say(_line(row), quiet=quiet, to_stderr=to_stderr)
            if row["carried_losslessly"] and not quiet:
                common.say(_carried(row["carried_losslessly"], verbose), to_stderr=True)
            if row["surprise"] is not None and row["surprise"] > SURPRISE and not quiet:
                common.say(_surprised(row), to_stderr=True)
    if as_json:
        common.print_json({"schema_version": 1, "files": rows})


SURPRISE = 1.5
"""Bits over those that the profile expected, beyond which a capture is called unlike its calibration."""

Choice = Callable[[Path, Sequence[str], int], "Codec"]
"""The codec for a file, the tensors left out of it, and tokens a chunk."""


def _choice(
    name: str,
    profile: Profile | None,
    quality: str | None,
    max_kl: float | None,
    max_attn_err: float | None,
    ratio: float | None,
) -> Choice:
    """The codec named, or the one that keeps a promise."""
    from kvpack.codecs import codec_named

    if (quality, max_kl, max_attn_err, ratio) == (None,) * 4:
        named = codec_named(name)
        return lambda *_: named
    from kvpack.rate import Goal, choose

    goal = Goal(quality, max_kl, max_attn_err, ratio)
    if name != "lossless":
        raise UsageError("give a codec's name (-c) or a guarantee, not both")
    return lambda path, drop, chunk_tokens: choose(path, profile, goal, chunk_tokens=chunk_tokens, drop=drop)


def _compress_one(
    path: Path,
    target: Path,
    choice: Choice,
    profile: Profile | None,
    chunk_tokens: int,
    drop: list[str],
    force: bool,
    threads: int | None,
    device: str,
    quiet: bool,
) -> dict[str, Any]:
    from kvpack import api

    with (
        common.readable(path) as source,
        common.progress_bar(f"compressing {path.name}", quiet) as progress,
        common.writable(target, force) as sink,
    ):
        try:
            codec = choice(source, drop, chunk_tokens)
            done = api.compress(
                source,
                sink,
                codec,
                profile=profile,
                chunk_tokens=chunk_tokens,
                drop=drop,
                threads=threads,
                progress=progress,
                gpu=common.gpu(device, source, quiet, exact=codec.lossless),
            )
        except FormatError as error:
            raise type(error)(str(error).replace(str(source), str(path))) from None
    return {
        "input": str(path),
        "output": str(target),
        "codec": codec.name,
        "original_size": done.original,
        "size": done.size,
        "ratio": done.original / done.size,
        "carried_losslessly": done.carried,
        "surprise": done.surprise,
    }


def _line(row: dict[str, Any]) -> str:
    return "{input} -> {output}: {codec}, {original_size} -> {size} bytes, ratio {ratio:.3f}".format(**row)


def _carried(names: list[str], verbose: bool) -> str:
    shown = ", ".join(names if verbose or len(names) <= 3 else [*names[:3], "..."])
    return f"kvpack: {len(names)} parts the codec cannot represent (NaN, Inf or out of range) are lossless: {shown}"


def _surprised(row: dict[str, Any]) -> str:
    return (
        f"kvpack: {row['input']} takes {row['surprise']:.1f} times the bits that the profile expects: it is unlike the "
        "texts of its calibration, and the guarantee may not hold; verify --model measures it"
    )


def _remove_verified(path: Path, target: Path, profile: Profile | None) -> None:
    from kvpack import api
    from kvpack.archive import Archive

    try:
        archive = Archive.open(target, profile)
        api.check(archive)
    except FormatError as error:
        raise KvpackError(f"{path}: kept, because what was written does not verify ({error})") from None
    path.unlink()

"""``kvpack compress``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli import common
from kvpack.errors import FormatError, KvpackError

if TYPE_CHECKING:
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
    from kvpack.codecs import codec_named

    codec_named(codec)
    opened = common.open_profile(profile)
    patterns = [*(drop or []), *(PROBES if drop_probes else ())]
    rows = []
    for path in inputs:
        target = output or (common.STDIO if path == common.STDIO else path.with_name(path.name + ".kvp"))
        common.check_distinct(path, target)
        row = _compress_one(path, target, codec, opened, chunk_tokens, patterns, force, threads, device, quiet)
        rows.append(row)
        if remove:
            _remove_verified(path, target, opened)
        to_stderr = target == common.STDIO
        if not as_json:
            common.say(_line(row), quiet=quiet, to_stderr=to_stderr)
            if row["carried_losslessly"] and not quiet:
                common.say(_carried(row["carried_losslessly"], verbose), to_stderr=True)
    if as_json:
        common.print_json({"schema_version": 1, "files": rows})


def _compress_one(
    path: Path,
    target: Path,
    codec: str,
    profile: Profile | None,
    chunk_tokens: int,
    drop: list[str],
    force: bool,
    threads: int | None,
    device: str,
    quiet: bool,
) -> dict[str, Any]:
    from kvpack import api
    from kvpack.codecs import codec_named

    with (
        common.readable(path) as source,
        common.progress_bar(f"compressing {path.name}", quiet) as progress,
        common.writable(target, force) as sink,
    ):
        try:
            done = api.compress(
                source,
                sink,
                codec_named(codec),
                profile=profile,
                chunk_tokens=chunk_tokens,
                drop=drop,
                threads=threads,
                progress=progress,
                gpu=common.gpu(device, source, quiet),
            )
        except FormatError as error:
            raise type(error)(str(error).replace(str(source), str(path))) from None
    return {
        "input": str(path),
        "output": str(target),
        "codec": codec,
        "original_size": done.original,
        "size": done.size,
        "ratio": done.original / done.size,
        "carried_losslessly": done.carried,
    }


def _line(row: dict[str, Any]) -> str:
    return "{input} -> {output}: {codec}, {original_size} -> {size} bytes, ratio {ratio:.3f}".format(**row)


def _carried(names: list[str], verbose: bool) -> str:
    shown = ", ".join(names if verbose or len(names) <= 3 else [*names[:3], "..."])
    return f"kvpack: {len(names)} parts the codec cannot represent (NaN, Inf or out of range) are lossless: {shown}"


def _remove_verified(path: Path, target: Path, profile: Profile | None) -> None:
    from kvpack import api
    from kvpack.archive import Archive

    try:
        archive = Archive.open(target, profile)
        api.check(archive)
    except FormatError as error:
        raise KvpackError(f"{path}: kept, because what was written does not verify ({error})") from None
    path.unlink()

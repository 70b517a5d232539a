"""``kvpack compress``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli import common
from kvpack.errors import KvpackError, UsageError, naming
from kvpack.formats.output import check_output, sync_folder

if TYPE_CHECKING:
    from kvpack.capture import ReplayModel
    from kvpack.codecs.protocol import Codec
    from kvpack.engine import Engine
    from kvpack.formats.source import Capture
    from kvpack.jobs import CompressJob, Write
    from kvpack.jobs.rate import Goal
    from kvpack.profiles import Profile


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
    inputs: common.Inputs,
    output: common.Output = None,
    codec: Annotated[
        str,
        typer.Option("-c", "--codec", autocompletion=_codec_names, help="Codec to use; see --list-codecs."),
    ] = "lossless",
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

    A GPU codes all files of one command together, which makes many small files faster. --device auto decides by the
    total size of the files.
    """
    del list_codecs
    common.check_inputs(inputs, output, keep=keep, remove=remove, as_json=as_json)
    from kvpack.codecs.recipes import codec_named
    from kvpack.codecs.replay import ReplayCodec
    from kvpack.jobs import PROBES, compress_many

    opened = common.open_profile(profile)
    goal, named = _goal(codec, quality, max_kl, max_attn_err, ratio), codec_named(codec)
    if isinstance(named, ReplayCodec):
        named = named.with_token_coder(token_coder)
        if remove:
            raise UsageError("--rm is refused with replay: its files need the model and a machine that computes alike")
    elif model is not None or token_coder is not TokenCoder.FAST:
        raise UsageError("--model and --token-coder are for the codec replay: -c replay")
    patterns = [*(drop or []), *(PROBES if drop_probes else ())]
    if remove and not lossy_ok and (patterns or goal is not None or not named.lossless):
        raise UsageError("--rm would delete what the output does not hold: give --lossy-ok too, or keep the input")
    if lossy_ok and not remove:
        raise UsageError("--lossy-ok goes with --rm")
    rows = []
    with ExitStack() as stack:
        files = [_File(path, stack.enter_context(common.readable(path)), _target(path, output)) for path in inputs]
        exact = goal is None and named.lossless
        engine = common.engine(device, [file.source for file in files], threads, quiet, exact=exact)
        models = _Models(model, device, quiet) if isinstance(named, ReplayCodec) else None
        settings = _Settings(goal or named, opened, models, chunk_tokens, patterns)
        jobs = (file.prepare(settings, engine, force) for file in files)
        for file, write in zip(files, compress_many(jobs, engine), strict=True):
            rows.append(_written(file, write, models, force, quiet))
            if remove:
                _remove_verified(file, opened, engine, lossy_ok)
            if not as_json:
                _report(rows[-1], quiet, verbose, to_stderr=file.target == common.STDIO)
    if as_json:
        common.print_json({"schema_version": 1, "files": rows})


SURPRISE = 1.5
"""A warning is printed if a capture takes more than this many times the bits that the profile expects."""


def _goal(
    name: str, quality: str | None, max_kl: float | None, max_attn_err: float | None, ratio: float | None
) -> Goal | None:
    """Return the goal that the user gave instead of a codec, or None."""
    if (quality, max_kl, max_attn_err, ratio) == (None,) * 4:
        return None
    from kvpack.jobs.rate import Goal

    goal = Goal(quality, max_kl, max_attn_err, ratio)
    if name != "lossless":
        raise UsageError("give a codec's name (-c) or a guarantee, not both")
    return goal


def _target(path: Path, output: Path | None) -> Path:
    return output or (common.STDIO if path == common.STDIO else path.with_name(path.name + ".kvp"))


class _Models:
    """The model for the codec ``replay``, which is loaded for the first file, in the dtype of its cache."""

    def __init__(self, source: str | None, device: str, quiet: bool) -> None:
        self._source, self._device, self._quiet = source, device, quiet
        self.loaded: ReplayModel | None = None

    def model_for(self, capture: Capture) -> ReplayModel:
        """Return the model for a capture, after checking that it is the right one."""
        from kvpack.cache.metadata import parse_metadata
        from kvpack.jobs.replay import require_identity

        known = parse_metadata(capture.metadata)
        with naming(capture.file.name):
            if self.loaded is None or known.dtype not in (None, self.loaded.dtype):
                self.loaded = common.replay_model(capture.metadata, self._source, self._device)
            else:
                require_identity(known, self.loaded.identity)
        if known.weights_sha256 is None:
            line = f"kvpack: {capture.file.name}: does not say which model made it, so this is not checked"
            common.say(line, quiet=self._quiet, to_stderr=True)
        return self.loaded


@dataclass(frozen=True)
class _Settings:
    """How to compress files: the codec or a goal for it, profile, model, chunk size, and which tensors to drop."""

    wanted: Codec | Goal
    profile: Profile | None
    models: _Models | None
    chunk_tokens: int | None
    drop: list[str]


@dataclass(frozen=True)
class _File:
    """An input file: the path that the user gave, the path of its bytes, and the path of the output."""

    path: Path
    source: Path
    target: Path

    def prepare(self, settings: _Settings, engine: Engine, force: bool) -> CompressJob:
        """Open and check the input, without writing anything."""
        from kvpack import jobs
        from kvpack.formats.source import Capture
        from kvpack.jobs.rate import Goal, choose

        common.check_distinct(self.path, self.target)
        if self.target != common.STDIO:
            check_output(self.target, force=force)
        capture = Capture.open(self.source, str(self.path))
        codec, profile = settings.wanted, settings.profile
        tokens, drop = settings.chunk_tokens, settings.drop
        if isinstance(codec, Goal):
            codec = choose(capture, profile, codec, chunk_tokens=tokens, drop=drop, engine=engine)
        model = settings.models.model_for(capture) if settings.models else None
        return jobs.prepare(capture, codec, profile=profile, model=model, chunk_tokens=tokens, drop=drop)


def _written(file: _File, write: Write, models: _Models | None, force: bool, quiet: bool) -> dict[str, Any]:
    with (
        common.progress_bar(f"compressing {file.path.name}", quiet) as progress,
        common.writable(file.target, force) as sink,
    ):
        if models is not None and models.loaded is not None:
            models.loaded.progress = progress
        done = write(sink, progress)
    return {
        "input": str(file.path),
        "output": str(file.target),
        "codec": done.codec,
        "original_size": done.original,
        "size": done.size,
        "ratio": done.original / done.size,
        "carried_losslessly": done.carried,
        "surprise": done.surprise,
        "streams": done.streams,
    }


RESIDUALS = ("residual", "residual/raw")
"""The streams of the codec ``replay`` that hold what a model misses."""


def _report(row: dict[str, Any], quiet: bool, verbose: bool, *, to_stderr: bool) -> None:
    common.say(_line(row), quiet=quiet, to_stderr=to_stderr)
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


def _remove_verified(file: _File, profile: Profile | None, engine: Engine, lossy_ok: bool) -> None:
    """Delete an input after its output was decompressed as ``kvpack decompress`` does it, and compared with it."""
    from kvpack import jobs

    try:
        written = jobs.KvpFile.open(file.target, profile)
        exact = written.lossless and not written.container.header.dropped
        if not (exact or lossy_ok):
            raise KvpackError("it is not the whole original")
        jobs.require_restorable(written, file.path if exact else None, engine)
    except KvpackError as error:
        raise KvpackError(f"{file.path}: kept, because what was written does not restore it ({error})") from None
    sync_folder(file.target)
    file.path.unlink()

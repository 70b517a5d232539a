"""The command ``kvpack calibrate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated
from zlib import crc32

import typer

from kvpack import __version__
from kvpack.cli import common
from kvpack.cli.capture import read_text
from kvpack.errors import KvpackError, UsageError

NEW = "new.kvprofile"
"""Name of a profile in the folder of installed ones until its digest is known."""


def calibrate(
    text: Annotated[
        list[Path], typer.Option("--text", help="UTF-8 text file to learn from; repeatable.", show_default=False)
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Profile to write.", show_default=False)] = None,
    install: Annotated[
        bool, typer.Option("--install", help="Keep the profile where all commands find it, so that -D is not needed.")
    ] = False,
    model: common.Model = None,
    tokens: Annotated[int, typer.Option(min=1, help="Total number of tokens, split evenly between texts.")] = 65536,
    context: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 2048,
    codecs: Annotated[
        str, typer.Option(help="Codec families, comma-separated: fisher, kvtc, aquakv; or 'all'.", metavar="FAMILIES")
    ] = "fisher",
    rank: Annotated[
        int,
        typer.Option(
            min=1, max=8192, help="Common directions of fisher; each of 6 layer groups adds nearly half as many."
        ),
    ] = 960,
    gradients: Annotated[int, typer.Option(min=1, help="Sequences that fisher back-propagates through.")] = 12,
    units: Annotated[int, typer.Option(min=1, max=16384, help="Units of fisher's prediction from token ids.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of those units; use thousands on a GPU.")] = 100,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    force: common.Force = False,
    quiet: common.Quiet = False,
) -> None:
    """Learn what calibrated codecs need about a model; compress and decompress take the profile with -D.

    Choose texts like those to compress, of several kinds, and none on which a codec will be judged. Intermediate
    results are kept in OUTPUT.partial until the command is done; the same command resumes from them.
    """
    if output is None and not install:
        raise UsageError("say where the profile goes: -o FILE, --install, or both")
    contents = [(str(path), read_text(path)) for path in text]
    from kvpack import calibration
    from kvpack.capture import load_model
    from kvpack.profiles import install_profile, installed_folder, write_profile

    if output is None:
        output, force = installed_folder() / NEW, True
        output.parent.mkdir(parents=True, exist_ok=True)
    common.check_target(output, [*text, common.model_files(model)], force=force)

    sections = calibration.SECTIONS if codecs == "all" else tuple(codecs.split(","))
    unknown = [name for name in sections if name not in calibration.SECTIONS]
    if unknown:
        raise UsageError(f"no calibrated codecs are named {unknown[0]!r}; there are: {', '.join(calibration.SECTIONS)}")
    loaded = load_model(model, dtype, device)
    options = calibration.CorpusOptions(tokens, context)
    settings = [tokens, context, rank, gradients, units, steps, dtype, __version__]
    work = calibration.Work(_partial(output), [loaded.weights_sha256, contents, settings])
    with common.progress_bar(f"running {loaded.name}", quiet) as progress:
        sample = calibration.collect(loaded, contents, options, progress, work)
    remark = lambda line: common.say(line, quiet=quiet, to_stderr=True)  # noqa: E731
    try:
        fisher = calibration.FisherOptions(rank, gradients, calibration.PredictorOptions(units, steps))
        arrays = calibration.calibrate(loaded, sample, sections, fisher, remark, work)
    except (MemoryError, RuntimeError) as error:
        raise KvpackError(f"not enough memory to calibrate: use fewer --tokens ({error})") from None
    with common.writable(output, force, text) as sink:
        size = write_profile(arrays, calibration.metadata(loaded, sample, options), sink)
    work.remove()
    count = sum(document["sequences"] for document in sample.documents)
    if install:
        output = install_profile(output, loaded.name, move=output.name == NEW)
    common.say(f"{output}: {count} sequences, {sample.tokens.size} tokens, {size} bytes", quiet=quiet)


def _partial(output: Path) -> Path:
    """Return the folder of intermediate results: OUTPUT.partial, or a shorter name if that is too long for one."""
    name = f"{output.name}.partial"
    if len(os.fsencode(name)) > 255:
        name = f"{os.fsencode(output.name)[:100].decode(errors='ignore')}.{crc32(os.fsencode(name)):08x}.partial"
    return output.with_name(name)

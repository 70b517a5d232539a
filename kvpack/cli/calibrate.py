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
TUNING = "Tuning"
"""The panel of options that few need."""


def calibrate(
    text: Annotated[
        list[Path],
        typer.Option(
            "--text",
            help="A text to learn from: a UTF-8 file. Repeat the option for several.",
            show_default=False,
            metavar="FILE",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Write the profile to this file (.kvprofile).",
            show_default=False,
            metavar="FILE",
        ),
    ] = None,
    install: Annotated[
        bool, typer.Option("--install", help="Keep the profile where all commands find it, so that none needs -D.")
    ] = False,
    model: common.Model = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Learn from this many tokens, the same number of each text.", metavar="N")
    ] = 65536,
    context: Annotated[
        int, typer.Option(min=1, help="Run the model over sequences of this many tokens.", metavar="N")
    ] = 2048,
    codecs: Annotated[
        str,
        typer.Option(
            help="Calibrate these codecs: fisher, kvtc, aquakv, with commas between them, or all.", metavar="LIST"
        ),
    ] = "fisher",
    rank: Annotated[
        int,
        typer.Option(
            min=1,
            max=8192,
            help="For fisher: keep this many directions that all layers share. Each of 6 groups of layers adds nearly "
            "half as many. More make a larger profile and a lower loss.",
            metavar="N",
            rich_help_panel=TUNING,
        ),
    ] = 960,
    gradients: Annotated[
        int,
        typer.Option(
            min=1,
            help="For fisher: measure on this many sequences how much each element matters, by back-propagation.",
            metavar="N",
            rich_help_panel=TUNING,
        ),
    ] = 12,
    units: Annotated[
        int,
        typer.Option(
            min=1,
            max=16384,
            help="For fisher: predict the cache from token ids with a network of this many units.",
            metavar="N",
            rich_help_panel=TUNING,
        ),
    ] = 512,
    steps: Annotated[
        int,
        typer.Option(
            min=1,
            help="For fisher: train that network for this many steps. Thousands are better, and take a GPU.",
            metavar="N",
            rich_help_panel=TUNING,
        ),
    ] = 100,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    force: common.Force = False,
    quiet: common.Quiet = False,
) -> None:
    """Learn from texts what a calibrated codec needs of a model.

    The result is a profile, which serves all caches of the model. Commands take it with -D, or find it by themselves
    after --install.

    Give texts of many kinds, like those that you will compress, and none on which a codec will be judged. Results so
    far are kept in OUTPUT.partial until the command is done. The same command continues from them.
    """
    if output is None and not install:
        raise UsageError("say where the profile goes: -o FILE, --install, or both")
    contents = [(str(path), read_text(path)) for path in text]
    from kvpack import calibration
    from kvpack.capture import load_model
    from kvpack.profiles import SECTIONS, install_profile, installed_folder, write_profile

    only_installed = output is None
    if output is None:
        output, force = installed_folder() / NEW, True
        output.parent.mkdir(parents=True, exist_ok=True)
    common.check_target(output, [*text, common.model_files(model)], force=force)

    sections = SECTIONS if codecs == "all" else tuple(codecs.split(","))
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise UsageError(f"no calibrated codecs are named {unknown[0]!r}; there are: {', '.join(SECTIONS)}")
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
        output = install_profile(output, loaded.name, move=only_installed)
    common.say(f"{output}: {count} sequences, {sample.tokens.size} tokens, {size} bytes", quiet=quiet)


def _partial(output: Path) -> Path:
    """Return the folder of intermediate results: OUTPUT.partial, or a shorter name if that is too long for one."""
    name = f"{output.name}.partial"
    if len(os.fsencode(name)) > 255:
        name = f"{os.fsencode(output.name)[:100].decode(errors='ignore')}.{crc32(os.fsencode(name)):08x}.partial"
    return output.with_name(name)

"""The command ``kvpack capture``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpack.cli import common
from kvpack.errors import KvpackError


def capture(
    text: Annotated[
        Path,
        typer.Option(
            "--text",
            help="The text that the model reads: a UTF-8 file. - is standard input.",
            show_default=False,
            metavar="FILE",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Write the capture to this file (.safetensors). - is standard output.",
            metavar="FILE",
        ),
    ],
    model: common.Model = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Read at most this many tokens of the text.", show_default=False, metavar="N"),
    ] = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    queries: Annotated[
        int,
        typer.Option(
            min=0, help="Save this many probe queries, with which verify measures the error of attention.", metavar="N"
        ),
    ] = 32,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Read the text in chunks of this many tokens (default: all at once).",
            show_default=False,
            metavar="N",
        ),
    ] = None,
    generate: Annotated[
        int, typer.Option(min=0, help="After the text, let the model write this many tokens greedily.", metavar="N")
    ] = 0,
    continuation: Annotated[
        int,
        typer.Option(
            min=0,
            help="Save this many tokens of the text after --max-tokens, on which verify --model tests predictions.",
            metavar="N",
        ),
    ] = 256,
    needles: Annotated[
        int,
        typer.Option(min=0, help="Plant this many facts in the text, which verify --model then asks for.", metavar="N"),
    ] = 0,
    force: common.Force = False,
    quiet: common.Quiet = False,
) -> None:
    """Run a model over a text and save its KV cache.

    The file is in the safetensors format, and is called a capture. It also holds what verify needs to measure what a
    codec loses: the token ids, some of the model's queries, and the text that follows.
    """
    content = read_text(text)
    common.check_target(output, [text, common.model_files(model)], force=force)
    from kvpack.capture import CaptureOptions, load_model, run, write_capture

    loaded = load_model(model, dtype, device)
    options = CaptureOptions(max_tokens, queries, chunk, generate, continuation, needles)
    with common.progress_bar(f"running {loaded.name}", quiet) as progress:
        cache = run(loaded, content, options, progress)
    with common.writable(output, force, [text]) as sink:
        size = write_capture(cache, sink)
    noted = f", {len(cache.continuation)} to follow" if len(cache.continuation) else ""
    line = f"{output}: {len(cache.keys)} layers, {len(cache.tokens)} tokens{noted}, {size} bytes"
    common.say(line, quiet=quiet, to_stderr=output == common.STDIO)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, or of standard input for ``-``.

    Raises:
        KvpackError: The data are not UTF-8, or there is nothing but white space.

    """
    try:
        text = common.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise KvpackError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise KvpackError(f"{path}: there is no text in it")
    return text

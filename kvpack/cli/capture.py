"""The command ``kvpack capture``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpack.cli import common
from kvpack.errors import KvpackError


def capture(
    text: Annotated[Path, typer.Option("--text", help="UTF-8 text file; - is standard input.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Capture to write; - is standard output.")],
    model: common.Model = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many tokens of the text.", show_default=False)
    ] = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    queries: Annotated[int, typer.Option(min=0, help="Probe queries to save for verify's attention errors.")] = 32,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Tokens per prefill chunk (default: one chunk).", show_default=False)
    ] = None,
    generate: Annotated[int, typer.Option(min=0, help="Tokens to decode greedily after the prefill.")] = 0,
    continuation: Annotated[
        int, typer.Option(min=0, help="Tokens of the text beyond --max-tokens to save for verify --model.")
    ] = 256,
    needles: Annotated[int, typer.Option(min=0, help="Facts to plant in the text, which verify --model asks for.")] = 0,
    force: common.Force = False,
    quiet: common.Quiet = False,
) -> None:
    """Run a model over a text and save its KV cache as safetensors."""
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
        KvpackError: The data are not UTF-8.

    """
    try:
        return common.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise KvpackError(f"{path}: not UTF-8 text (byte {error.start})") from None

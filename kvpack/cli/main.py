"""The entry point of the command line; it registers the commands and turns errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from kvpack import __version__
from kvpack.cli.bench import bench
from kvpack.cli.calibrate import calibrate
from kvpack.cli.capture import capture
from kvpack.cli.claims import claims
from kvpack.cli.compress import compress
from kvpack.cli.decompress import decompress
from kvpack.cli.demo import demo
from kvpack.cli.failures import complain, describe
from kvpack.cli.inspect import inspect
from kvpack.cli.store import store
from kvpack.cli.verify import verify

app = typer.Typer(
    name="kvpack",
    help="Compress saved KV caches of language models and measure what was lost.",
    epilog="Exit codes: 0 success, 1 error, 2 wrong usage, 3 quality below a threshold, 4 corrupt or truncated input, "
    "5 wrong model, profile or original, 6 needs a newer kvpack or an unsupported model, 7 not in the store.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (capture, compress, decompress, verify, inspect, calibrate, bench, demo, claims):
    app.command()(command)
app.add_typer(store)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"kvpack {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Run the command line; an expected failure prints one line to stderr and exits with its own code."""
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        message, code = describe(error)
        complain(message)
        sys.exit(code)


if __name__ == "__main__":
    main()

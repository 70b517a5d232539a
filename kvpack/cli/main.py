"""The entry point of the command line; it registers the commands and turns errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

from kvpack import __version__
from kvpack.cli import common
from kvpack.cli.bench import bench
from kvpack.cli.calibrate import calibrate
from kvpack.cli.capture import capture
from kvpack.cli.claims import claims
from kvpack.cli.clean import clean
from kvpack.cli.compress import compress
from kvpack.cli.decompress import decompress
from kvpack.cli.demo import demo
from kvpack.cli.failures import complain, describe, let_go_of_output
from kvpack.cli.inspect import inspect
from kvpack.cli.stopping import Stopped, stoppable
from kvpack.cli.store import store
from kvpack.cli.verify import verify
from kvpack.errors import EXIT_CODES
from kvpack.formats.temporary import discard_all

ENVIRONMENT = {
    "KVPACK_CACHE_DIR": "the folder for compiled code (default: ~/.cache/kvpack)",
    "KVPACK_PROFILES": "the folder of installed profiles",
    "KVPACK_DEBUG": "set to 1, errors are shown with their traceback",
    "TMPDIR": "the folder for temporary files without a name (default: /tmp)",
    "NO_COLOR": "set to 1, nothing is printed in colour",
}
"""The variables of the environment that kvpack reads. docs/usage.md has the same table, with more words."""


def _epilog() -> str:
    """Return what stands below the help: a paragraph for each line."""
    codes = [f"{code} {meaning}" for code, meaning in EXIT_CODES.items()]
    variables = [f"{name}: {meaning}" for name, meaning in ENVIRONMENT.items()]
    return "\n\n".join(["\n".join(["Exit codes:", *codes]), "\n".join(["Environment:", *variables])])


def _flowing(text: str | None) -> str:
    """Return a docstring with each paragraph in one line, so that the help fills the width of the terminal."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


app = typer.Typer(
    name="kvpack",
    help="Compress saved KV caches of language models, and measure what was lost.",
    epilog=_epilog(),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (capture, compress, decompress, verify, inspect, calibrate, bench, demo, claims, clean):
    app.command()(command)
app.add_typer(store)
for registered in (*app.registered_commands, *store.registered_commands):
    registered.help = _flowing(registered.callback.__doc__)


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
    _open_closed_streams()
    try:
        with stoppable():
            _run()
    except Stopped as stopped:
        discard_all()  # in case the signal came while one was made or removed
        complain(str(stopped))
        os._exit(stopped.code)  # Python takes the handlers away before it ends, and another signal may come then.
    except BrokenPipeError:
        let_go_of_output()
        sys.exit(1)
    except Exception as error:
        message, code = describe(error)
        complain(message)
        sys.exit(code)


def _open_closed_streams() -> None:
    """Open what the command was started without, so that using it is an error, and no file takes its number."""
    for number, name, flags in ((0, "stdin", os.O_WRONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(number)
                continue
            os.open(os.devnull, flags)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _run() -> None:
    """Run the command, and find out whether what it printed has arrived."""
    try:
        app()
    except (SystemExit, OSError) as done:
        try:
            with common.naming_system("standard output"):
                sys.stdout.flush()
        except OSError:
            let_go_of_output()
            if not (isinstance(done, SystemExit) and done.code):  # It may have failed for this very reason.
                raise
        raise


if __name__ == "__main__":
    main()

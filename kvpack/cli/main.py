"""The entry point of the command line; it registers the commands and turns errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from typing import Annotated

import typer

from kvpack import __version__
from kvpack.cache.untrusted import printable
from kvpack.cli import common
from kvpack.cli.bench import bench
from kvpack.cli.calibrate import calibrate
from kvpack.cli.capture import capture
from kvpack.cli.claims import claims
from kvpack.cli.clean import clean
from kvpack.cli.compress import compress
from kvpack.cli.decompress import decompress
from kvpack.cli.demo import demo
from kvpack.cli.inspect import inspect
from kvpack.cli.stopping import Stopped, stoppable
from kvpack.cli.store import store
from kvpack.cli.verify import verify
from kvpack.errors import EXIT_CODES, KvpackError
from kvpack.formats.temporary import discard_all

app = typer.Typer(
    name="kvpack",
    help="Compress saved KV caches of language models and measure what was lost.",
    epilog=f"Exit codes: {', '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (capture, compress, decompress, verify, inspect, calibrate, bench, demo, claims, clean):
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
    _open_closed_streams()
    try:
        with stoppable():
            _run()
    except Stopped as stopped:
        discard_all()  # in case the signal came while one was made or removed
        _fail(str(stopped), stopped.code)
    except KvpackError as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail("out of memory", 1)
    except BrokenPipeError:
        _let_go_of_output()
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or _unnamed(error)}: {error.strerror or error}", 1)
    except Exception as error:  # This is a bug: print one line, or a traceback on request.
        if os.environ.get("KVPACK_DEBUG"):
            raise
        _fail(f"internal error: {error!r}; set KVPACK_DEBUG=1 to see where, and please report it", 1)


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
    except (SystemExit, OSError):
        try:
            with common.naming_system("standard output"):
                sys.stdout.flush()
        except OSError:
            _let_go_of_output()
            raise
        raise


def _unnamed(error: OSError) -> str:
    """Return what an error is about that names no file: standard output, if what prints there has raised it."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    printing = bool(frames) and frames[-1].split(".")[0] in ("click", "rich", "typer")
    if printing:
        _let_go_of_output()
    return "standard output" if printing else "the system"


def _let_go_of_output() -> None:
    """Let nothing that could not be written to standard output be tried again when Python ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"kvpack: {printable(' '.join(message.split()))}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()

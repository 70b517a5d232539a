"""Runs codecs over captures: a real file each, decompressed, measured, judged by the model."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpack
from kvpack import api
from kvpack.archive import Archive, Capture
from kvpack.bench.results import Results, Row
from kvpack.capture import Model
from kvpack.codecs import Codec
from kvpack.errors import CorruptError
from kvpack.fidelity import compare
from kvpack.fidelity.model import Judge
from kvpack.inspection import inspect
from kvpack.tensorfile import TensorFile

QUICK = ("lossless", "kivi-4", "kivi-2", "turboquant-4", "turboquant-3", "turboquant-2")
"""Codecs of ``--quick``."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """One row to measure."""

    path: Path
    sha256: str
    codec: Codec
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """As of :class:`Row`."""
        return self.sha256, self.codec.name, self.seed


def plan(captures: Sequence[Path], codecs: Sequence[Codec], seeds: int) -> list[Task]:
    """Every row: document by document, codec by codec, several seeds where a codec is random."""
    tasks = []
    for path in captures:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        for codec in codecs:
            tasks += [Task(path, digest, codec, seed) for seed in range(seeds if codec.seeded else 1)]
    return tasks


def setting(model: Model | None) -> dict[str, Any]:
    """What rows of one file share: the model that judges, and the versions that decide figures."""
    return {
        "model": model.name if model else None,
        "weights_sha256": model.weights_sha256 if model else None,
        "dtype": str(model.network.dtype).removeprefix("torch.") if model else None,
        "versions": {name: version(name) for name in ("kvpack", "torch", "transformers", "numpy")},
    }


def machine(model: Model | None) -> dict[str, Any]:
    """Where it ran: processor, its cores, GPU if the model is on one, Python, kvpack's commit where known."""
    import torch  # after kvpack.capture, which silences progress bars that torch would already set up

    on_gpu = model is not None and model.network.device.type == "cuda"
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(model.network.device) if on_gpu and model else None,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    folder = Path(kvpack.__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def measure(tasks: Sequence[Task], model: Model | None, results: Results, progress: Progress | None) -> Iterator[Row]:
    """Measure tasks that ``results`` has no row for; rows are appended to it and given one by one.

    Raises:
        CorruptError: a lossless codec did not give its capture back.

    """
    done = {row.key for row in results.rows}
    judge: tuple[Path, Capture, Judge | None] | None = None
    with tempfile.TemporaryDirectory(prefix="kvpack-bench-") as folder:
        for i, task in enumerate(tasks):
            if task.key not in done:
                if judge is None or judge[0] != task.path:
                    capture = Capture(TensorFile.open(task.path))
                    judge = task.path, capture, Judge(model, capture) if model else None
                results.rows.append(_measure(task, judge[1], judge[2], Path(folder)))
                yield results.rows[-1]
            if progress:
                progress(i + 1, len(tasks))


def _measure(task: Task, capture: Capture, judge: Judge | None, folder: Path) -> Row:
    packed, back = folder / "x.kvp", folder / "x.safetensors"
    codec = task.codec.with_seed(task.seed)
    seconds: list[tuple[float, float]] = []
    for _ in range(2):
        start = time.perf_counter()
        with packed.open("wb") as sink:
            api.compress(task.path, sink, codec)
        middle = time.perf_counter()
        with back.open("wb") as sink:
            api.decompress(Archive.open(packed), sink)
        seconds.append((middle - start, time.perf_counter() - middle))
    decompressed = Capture(TensorFile.open(back))
    report = compare(capture, decompressed)
    if codec.lossless and not report.bit_exact:
        raise CorruptError(f"{codec.name}: did not give {task.path} back bit for bit")
    look = inspect(packed)
    return Row(
        document=task.path.name,
        document_sha256=task.sha256,
        codec=codec.name,
        seed=task.seed,
        size=look.size,
        ratio=look.ratio,
        bits_per_element=look.bits_per_element or 0.0,
        keys_nmse=report.keys.nmse,
        values_nmse=report.values.nmse,
        attention_error=report.attention.output_error if report.attention else None,
        compress_seconds=seconds[-1][0],
        decompress_seconds=seconds[-1][1],
        model=judge.measure(decompressed).to_json() if judge else None,
    )

"""Runs codecs over captures: writes a real file for each codec, decompresses it, measures it and judges it by a model.

The judged file holds what a reader of a cache needs: keys, values and tokens. Tensors that only serve to measure
fidelity (``jobs.PROBES``) are dropped, so that they do not affect the ratio.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import kvpack
from kvpack.bench.bounds import Bound, simulate
from kvpack.bench.coding import needs_model, through_file
from kvpack.bench.detail import BINS, Detail
from kvpack.bench.noise import Noise
from kvpack.bench.recompute import Recompute, network_of, recompute, token_bytes, tokens_of
from kvpack.bench.results import TOKEN_ENTROPY, Key, Results, Row
from kvpack.capture import Model
from kvpack.capture.entropy import token_bits
from kvpack.codecs.protocol import Codec
from kvpack.errors import CorruptError
from kvpack.fidelity import CacheReader, compare
from kvpack.fidelity.model import Judge
from kvpack.formats.input import InputFile
from kvpack.formats.records import layer_tensors
from kvpack.formats.source import Capture
from kvpack.kvp.breakdown import Breakdown
from kvpack.numerics.processor import processor_name
from kvpack.profiles import Profile

QUICK = (
    *("lossless", "kivi-4", "kivi-2", "turboquant-4", "turboquant-2", "local-4", "fisher-5"),
    *("cachegen-4", "aquakv-2", "kvtc-1"),
)
"""Codecs of ``--quick``; calibrated ones are run only with a profile that has their section."""

Progress = Callable[[int, int], None]

Extra = Bound | Recompute | Noise | None
"""What is measured in addition to codecs; None is the token entropy."""


@dataclass(frozen=True)
class Task:
    """One row to measure: ``subject`` is a codec or one of the extras.

    ``detailed`` asks for what a page shows beside the row: where the loss is, and where the bytes went.
    """

    path: Path
    sha256: str
    subject: Codec | Extra
    seed: int = 0
    detailed: bool = False

    @property
    def name(self) -> str:
        """Name of the subject in result rows."""
        return self.subject.name if self.subject else TOKEN_ENTROPY

    @property
    def key(self) -> Key:
        """Key of the task's row, as in :class:`Row`."""
        return self.sha256, self.name, self.seed


def plan(
    captures: Sequence[Path], codecs: Sequence[Codec], seeds: int, extras: Sequence[Extra], *, detailed: bool = False
) -> list[Task]:
    """Return the tasks document by document: all codecs, those with randomness with several seeds, then the extras.

    If ``detailed``, the codecs' tasks on the first document with their first seeds ask for details.
    """
    tasks = []
    for path in captures:
        digest = InputFile(path).sha256()
        for codec in codecs:
            wanted = detailed and path == captures[0]
            number = seeds if codec.seeded else 1
            tasks += [Task(path, digest, codec, seed, wanted and not seed) for seed in range(number)]
        tasks += [Task(path, digest, extra) for extra in extras]
    return tasks


def setting(model: Model | None, profile: Profile | None) -> dict[str, Any]:
    """Return what rows of one file have in common: the judging model, the profile, and versions that affect figures."""
    return {
        "profile": {**profile.identity(), "size": profile.size} if profile else None,
        "model": model.name if model else None,
        "weights_sha256": model.weights_sha256 if model else None,
        "dtype": model.dtype if model else None,
        "versions": {"kvpack": kvpack.__version__, **{n: version(n) for n in ("torch", "transformers", "numpy")}},
    }


def machine(model: Model | None) -> dict[str, Any]:
    """Return what the bench ran on: processor, cores, the model's GPU if any, Python, and kvpack's commit if known."""
    import torch  # This follows the import of kvpack.capture, which must turn off progress bars first.

    on_gpu = model is not None and model.network.device.type == "cuda"
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(model.network.device) if on_gpu and model else None,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    folder = Path(kvpack.__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def measure(
    tasks: Sequence[Task],
    model: Model | None,
    profile: Profile | None,
    results: Results,
    progress: Progress | None,
) -> Iterator[Row]:
    """Measure the tasks that have no row in ``results`` yet; append each new row to ``results`` and yield it.

    A row without the details that its task asks for is measured anew.

    Raises:
        CorruptError: A lossless codec did not restore its capture.

    """
    lacking = {task.key for task in tasks if task.detailed} - results.details.keys()
    results.rows[:] = [row for row in results.rows if row.key not in lacking]
    done = {row.key for row in results.rows}
    bench: _Bench | None = None
    for i, task in enumerate(tasks):
        if task.key not in done:
            if bench is None or bench.path != task.path:
                capture = Capture.open(task.path)
                bench = _Bench(
                    task.path, capture, model, Judge(model, capture) if model else None, profile, results.details
                )
            results.rows.append(bench.row(task))
            yield results.rows[-1]
        if progress:
            progress(i + 1, len(tasks))


@dataclass(frozen=True)
class _Bench:
    """One capture with its judge."""

    path: Path
    capture: Capture
    model: Model | None
    judge: Judge | None
    profile: Profile | None
    details: dict[Key, Detail]

    def row(self, task: Task) -> Row:
        subject = task.subject
        if subject is None:
            return self._token_entropy(task)
        if isinstance(subject, Bound):
            simulated = simulate(self.capture, subject)
            return self._row(task, simulated, bits=simulated.bits_per_element)
        if isinstance(subject, Recompute):
            return self._recompute(task)
        if isinstance(subject, Noise):
            assert self.model is not None
            computed = subject.compute(self.model, self.capture)
            return self._row(task, computed, bits=computed.bits_per_element)
        return self._codec(task, subject)

    def _codec(self, task: Task, codec: Codec) -> Row:
        coded = through_file(task.path, codec.with_seed(task.seed), self.profile, self.model)
        if codec.lossless:
            self._require_same(codec, coded.cache)
        flops = 0
        if self.model is not None and needs_model(codec):
            flops = network_of(self.model, self.capture).prefill(len(tokens_of(self.capture)))
        return self._row(
            task,
            coded.cache,
            bits=coded.bits_per_element,
            size=coded.size,
            ratio=coded.ratio,
            compress_seconds=coded.compress_seconds,
            decompress_seconds=coded.decompress_seconds,
            decode_flops=flops,
            pieces=coded.bytes,
        )

    def _recompute(self, task: Task) -> Row:
        assert self.model is not None
        computed, seconds = recompute(self.model, self.capture)
        size, elements = token_bytes(self.capture), sum(bits.size for bits in computed.replaced.values())
        held = sum(bits.nbytes for bits in computed.replaced.values()) + size
        return self._row(
            task,
            computed,
            bits=8 * size / elements,
            size=size,
            ratio=held / size,
            decompress_seconds=seconds,
            decode_flops=network_of(self.model, self.capture).prefill(len(tokens_of(self.capture))),
        )

    def _require_same(self, codec: Codec, decompressed: Capture) -> None:
        for name in decompressed.tensors:
            if not np.array_equal(decompressed.read(name), self.capture.read(name)):
                raise CorruptError(f"{codec.name}: did not give {name} of {self.path} back bit for bit")

    def _row(
        self,
        task: Task,
        cache: CacheReader | None,
        *,
        bits: float,
        size: int | None = None,
        ratio: float | None = None,
        compress_seconds: float | None = None,
        decompress_seconds: float | None = None,
        decode_flops: int | None = None,
        pieces: Breakdown | None = None,
    ) -> Row:
        report = compare(self.capture, cache, bins=BINS if task.detailed else 0) if cache else None
        if task.detailed and report and pieces:
            self.details[task.key] = Detail.of(report.loss, pieces)
        judged = self.judge.measure(cache) if self.judge and cache else None
        return Row(
            document=task.path.name,
            document_sha256=task.sha256,
            codec=task.name,
            seed=task.seed,
            size=size,
            ratio=ratio,
            bits_per_element=bits,
            keys_nmse=report.keys.nmse if report else None,
            values_nmse=report.values.nmse if report else None,
            attention_error=report.attention.output_error if report and report.attention else None,
            compress_seconds=compress_seconds,
            decompress_seconds=decompress_seconds,
            model=judged.to_json() if judged else None,
            decode_flops=decode_flops,
        )

    def _token_entropy(self, task: Task) -> Row:
        """Return the row of the sequence bound of arXiv 2604.15356: the tokens' bits per element of the cache.

        Its operations are those of finding the tokens by the model's predictions, and then of computing the cache.
        """
        assert self.model is not None
        tokens = tokens_of(self.capture)
        bits, _ = token_bits(self.model, tokens)
        layers = layer_tensors(self.capture).values()
        elements = sum(self.capture.read(name).size for names in layers for name in names.values())
        network = network_of(self.model, self.capture)
        flops = network.prediction(len(tokens)) + network.prefill(len(tokens))
        return self._row(task, None, bits=bits * len(tokens) / elements, decode_flops=flops)

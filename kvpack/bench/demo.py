"""The work of ``kvpack demo``: captures the embedded model's cache, runs codecs over it and measures each."""

from __future__ import annotations

import filecmp
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvpack import jobs
from kvpack.codecs.protocol import Need
from kvpack.codecs.recipes import CODECS
from kvpack.errors import CorruptError
from kvpack.fidelity import compare
from kvpack.formats.output import atomic_output
from kvpack.formats.source import Capture
from kvpack.jobs.reader import KvpFile
from kvpack.kvp.inspection import inspect

TOKENS = 2048
TOPICS = ("typesmapping", "objects", "class", "exceptions", "naming", "types")
"""Chapters of Python's language reference: English prose that every CPython contains (``pydoc_data``)."""

FINE_AND_COARSE = {f"local-{level}" for level in (8, 7, 6, 2, 1)}
SHOWN = [
    codec for codec in CODECS.values() if Need.PROFILE not in codec.traits.needs and codec.name not in FINE_AND_COARSE
]
"""Codecs that need no calibration, with only some levels of ``local``."""

Progress = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Row:
    """Results of one codec on the demo's capture; sizes are of the whole file, errors those of ``kvpack verify``."""

    codec: str
    bits_per_element: float
    ratio: float
    bit_exact: bool
    keys_nmse: float
    values_nmse: float
    attention_error: float
    compress_seconds: float
    decompress_seconds: float


def demo_text() -> str:
    """Return the text whose cache is captured."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in TOPICS)


def capture_demo(path: Path, progress: Progress = None) -> None:
    """Capture the embedded model's cache of the first ``TOKENS`` tokens of :func:`demo_text` to ``path``."""
    from kvpack.capture import CaptureOptions, load_model, run, write_capture

    cache = run(load_model(None), demo_text(), CaptureOptions(max_tokens=TOKENS), progress)
    with atomic_output(path, force=True) as sink:
        write_capture(cache, sink)


def run_codecs(capture: Path, folder: Path) -> Iterator[Row]:
    """Compress, decompress, verify and inspect with each codec of :data:`SHOWN`; ``.kvp`` files stay in ``folder``.

    Seconds are those of the second of two runs, so that compilation, which happens once per machine, is not counted.

    Raises:
        CorruptError: A lossless codec did not restore the capture.

    """
    reference = Capture.open(capture)
    for codec in SHOWN:
        name = codec.name
        packed, back = folder / f"{name}.kvp", folder / f"{name}.safetensors"
        times: list[tuple[float, float]] = []
        for _ in range(2):
            start = time.perf_counter()
            with atomic_output(packed, force=True) as sink:
                jobs.compress(capture, sink, codec)
            middle = time.perf_counter()
            with atomic_output(back, force=True) as sink:
                jobs.decompress(KvpFile.open(packed), sink)
            times.append((middle - start, time.perf_counter() - middle))
        report = compare(reference, Capture.open(back))
        if codec.lossless and not filecmp.cmp(capture, back, shallow=False):
            raise CorruptError(f"{name}: {back} is not {capture} byte for byte")
        look = inspect(packed, check=True)
        yield Row(
            codec=name,
            bits_per_element=look.bits_per_element or 0.0,
            ratio=look.ratio,
            bit_exact=report.bit_exact,
            keys_nmse=report.keys.nmse,
            values_nmse=report.values.nmse,
            attention_error=report.attention.output_error if report.attention else float("nan"),
            compress_seconds=times[-1][0],
            decompress_seconds=times[-1][1],
        )
        if not codec.lossless:
            back.unlink()

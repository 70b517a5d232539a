"""The work of ``kvpack demo``: captures the embedded model's cache of a speech and judges codecs on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvpack import jobs
from kvpack.bench import run
from kvpack.bench.results import Results
from kvpack.bench.results import Row as Measured
from kvpack.capture import CaptureOptions, Model, write_capture
from kvpack.capture import run as run_model
from kvpack.codecs.recipes import codec_named
from kvpack.formats.output import atomic_output
from kvpack.formats.source import Capture
from kvpack.profiles import profile_for

SPEECH = Path(__file__).parent / "speech.txt"
"""The start of a State of the Union address, of 6 January 1941: a kind of text that no shipped profile has seen."""

TOKENS = 1792
NEEDLES = 8

SHOWN = {
    "zstd": "every bit",
    "lossless": "every bit",
    "kivi-4": "4 bits an element",
    "turboquant-3": "3 bits an element",
    "local-4": "what tokens share",
    "fisher-6": "what matters most",
    "fisher-5": "the same, coarser",
    "fisher-4": "coarser still",
    "replay": "the text alone",
}
"""The codecs of the demo, and what each keeps of a cache."""

KEPT = ("lossless", "fisher-5")
"""Codecs whose files stay in the folder."""


@dataclass(frozen=True)
class Row:
    """Results of one codec on the demo's capture.

    Attributes:
        codec: its name.
        keeps: what it keeps of the cache, in words.
        size: bytes of its whole file.
        ratio: bytes of keys, values and tokens over ``size``.
        kl_plain: KL divergence in nats of the model's next-token predictions while the text goes on.
        kl_repeat: the same while a passage of the text is repeated.
        needles: how many of the ``needles_planted`` facts in the text the model recites.
        needles_original: how many of them it recites from the original cache.
        compress_seconds, decompress_seconds: seconds of the second of two runs.

    """

    codec: str
    keeps: str
    size: int
    ratio: float
    kl_plain: float
    kl_repeat: float
    needles: int
    needles_original: int
    needles_planted: int
    compress_seconds: float
    decompress_seconds: float

    @classmethod
    def of(cls, measured: Measured) -> Row:
        """Take the figures from a row of the bench."""
        model = measured.model
        assert model is not None
        assert measured.size is not None
        assert measured.ratio is not None
        return cls(
            measured.codec,
            SHOWN[measured.codec],
            measured.size,
            measured.ratio,
            model["plain"]["kl_mean"],
            model["repeat"]["kl_mean"],
            model["needles_found"],
            model["needles_found_original"],
            len(model["needles"]),
            measured.compress_seconds or 0.0,
            measured.decompress_seconds or 0.0,
        )


def demo_text() -> str:
    """Return the text whose cache is captured."""
    return SPEECH.read_text(encoding="utf-8")


def capture_demo(model: Model, path: Path, progress: run.Progress | None = None) -> None:
    """Write the cache of the first ``TOKENS`` tokens of :func:`demo_text`, with facts planted in them, to ``path``."""
    cache = run_model(model, demo_text(), CaptureOptions(max_tokens=TOKENS, needles=NEEDLES), progress)
    with atomic_output(path, force=True) as sink:
        write_capture(cache, sink)


def judge(model: Model, path: Path, progress: run.Progress | None = None) -> Iterator[Row]:
    """Measure each codec of :data:`SHOWN` on the capture ``path``; files of :data:`KEPT` are put beside it.

    Raises:
        CorruptError: A lossless codec did not restore the capture.
        UsageError: No profile is installed for the embedded model.

    """
    capture = Capture.open(path)
    profile = profile_for(capture.metadata, "fisher", capture.tensors.values())
    for name in KEPT:
        with atomic_output(path.with_name(f"{name}.kvp"), force=True) as sink:
            jobs.compress(path, sink, codec_named(name), profile=profile)
    tasks = run.plan([path], [codec_named(name) for name in SHOWN], 1, [])
    results = Results(run.setting(model, profile), run.machine(model))
    for row in run.measure(tasks, model, profile, results, progress):
        yield Row.of(row)

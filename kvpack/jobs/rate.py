"""Rate control: the coarsest step of ``fisher`` or ``local`` that keeps a promise, by trial or read off the profile."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from kvpack.codecs.protocol import Codec
from kvpack.codecs.recipes import fisher, local
from kvpack.engine import Engine
from kvpack.errors import MismatchError, UsageError
from kvpack.fidelity import compare
from kvpack.formats.source import Capture
from kvpack.jobs.compression import Compressed, compress
from kvpack.jobs.reader import KvpFile
from kvpack.profiles import Profile

QUALITIES = {"high": 0.03, "balanced": 0.06, "small": 0.12}
"""Next-token KL, nats a token; no sequence held back from calibration had more than that over :data:`MARGIN`."""

MARGIN = 1.5
"""Sequences held back are of the texts that calibration knows; others lose more."""

FINEST, COARSEST = -480, -96
"""Range of steps of ``fisher`` that are searched, in 32nds of an octave."""

LOCAL_FINEST, LOCAL_COARSEST = -128, 128
"""Range of steps of ``local`` that are searched, likewise."""

RESOLUTION = 4
"""A search stops within an eighth of an octave of the step: 6 or 7 trials."""


@dataclass(frozen=True)
class Goal:
    """One of: ``quality`` (a name), ``max_kl`` (nats a token), ``max_attn_err``, ``ratio``; the others None."""

    quality: str | None = None
    max_kl: float | None = None
    max_attn_err: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        """Check that one is given, and sound.

        Raises:
            UsageError: none or several, or a value out of range.

        """
        given = [value for value in (self.quality, self.max_kl, self.max_attn_err, self.ratio) if value is not None]
        if len(given) != 1:
            raise UsageError("give one of --quality, --max-kl, --max-attn-err, --ratio")
        if self.quality is not None and self.quality not in QUALITIES:
            raise UsageError(f"--quality is {', '.join(QUALITIES)}, not {self.quality!r}")
        for value in given:
            if isinstance(value, float) and not (0 < value < float("inf")):
                raise UsageError("--max-kl, --max-attn-err and --ratio are positive numbers")


def choose(
    capture: Capture,
    profile: Profile | None,
    goal: Goal,
    *,
    chunk_tokens: int,
    drop: Sequence[str],
    engine: Engine | None = None,
) -> Codec:
    """The codec for ``capture`` that keeps ``goal``: ``fisher`` with a profile, ``local`` without one.

    Raises:
        UsageError: no step reaches the goal, it takes a profile, or there are no probes to measure attention with.
        MismatchError: the profile has no section ``fisher``, or is for another model.

    """
    if profile is None and (goal.quality is not None or goal.max_kl is not None):
        raise UsageError(
            "--quality and --max-kl are promises from calibration: give a profile (-D FILE, made by kvpack calibrate), "
            "or --ratio, --max-attn-err or -c local-4"
        )
    if profile is not None and "fisher.curve" not in profile:
        raise MismatchError(f"the profile {profile.name} has no section fisher: calibrate again")
    if profile is not None and (goal.quality is not None or goal.max_kl is not None):
        limit = QUALITIES[goal.quality] if goal.quality is not None else float(goal.max_kl or 0)
        curve = np.asarray(profile["fisher.curve"])
        return fisher(step_for_kl(np.concatenate([curve[:, :1], MARGIN * curve[:, 1:]], axis=1), limit))
    make, finest, last = (local, LOCAL_FINEST, LOCAL_COARSEST) if profile is None else (fisher, FINEST, COARSEST)

    def pack(log_step: int, sink: BinaryIO) -> Compressed:
        options = {"chunk_tokens": chunk_tokens, "drop": drop, "engine": engine}
        return compress(capture, sink, make(log_step), profile=profile, **options)  # type: ignore[arg-type]

    if goal.ratio is not None:
        return make(_step_for_ratio(lambda step: pack(step, cast(BinaryIO, _Discarded())), goal.ratio, finest, last))

    def holds(log_step: int) -> bool:
        with tempfile.NamedTemporaryFile(prefix="kvpack-trial-", suffix=".kvp") as file:
            pack(log_step, cast(BinaryIO, file))
            file.flush()
            attention = compare(capture, KvpFile.open(Path(file.name), profile)).attention
        if attention is None:
            raise UsageError("--max-attn-err needs the probe queries of `kvpack capture`, and this capture has none")
        return attention.output_error <= float(goal.max_attn_err or 0)

    found = coarsest(holds, finest, last)
    if found is None:
        raise UsageError(f"no step keeps attention's error below {goal.max_attn_err:g} on this capture")
    return make(found)


def _step_for_ratio(pack: Callable[[int], Compressed], ratio: float, finest: int, last: int) -> int:
    """The finest step at which a capture becomes ``ratio`` times smaller."""

    def below(log_step: int) -> bool:
        done = pack(log_step)
        return done.original / done.size < ratio

    found = coarsest(below, finest, last)
    if found is not None and found + RESOLUTION > last:
        raise UsageError(f"no step reaches a ratio of {ratio:g} on this capture")
    return finest if found is None else found + RESOLUTION


class _Discarded(io.RawIOBase):
    """Takes what is written and keeps nothing: only the size of a trial's file matters."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


def coarsest(holds: Callable[[int], bool], finest: int = FINEST, last: int = COARSEST) -> int | None:
    """The coarsest step for which ``holds`` is true, if it is true up to some step and false beyond."""
    good, bad = finest - RESOLUTION, last + RESOLUTION
    while bad - good > RESOLUTION:
        middle = (good + bad) // (2 * RESOLUTION) * RESOLUTION
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good if good >= finest else None


def step_for_kl(curve: np.ndarray, limit: float) -> int:
    """The coarsest step at which neither continuation's largest KL was above ``limit``, by the profile's ``curve``.

    Rows are log_step, then mean and largest KL of the plain, and of the repeated continuation; interpolated in
    log KL over log_step. A limit above everything measured gets the coarsest step measured.

    Raises:
        UsageError: a limit below what the finest step measured keeps: a profile's cut at R directions is a floor.

    """
    order = np.argsort(curve[:, 0])
    steps, worst = curve[order, 0], np.log2(np.maximum(np.maximum.accumulate(curve[order][:, [2, 4]].max(1)), 1e-12))
    wanted = float(np.log2(limit))
    if wanted >= worst[-1]:
        return int(steps[-1])
    if wanted < worst[0]:
        raise UsageError(
            f"no step of this profile is known to keep KL within {limit:g}: its finest may have {2 ** worst[0]:.2g}; "
            "calibrate with a higher --rank and more --tokens, or compress losslessly"
        )
    return int(np.floor(np.interp(wanted, worst, steps)))

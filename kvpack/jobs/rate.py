"""Rate control: find the coarsest step of ``fisher`` or ``local`` that meets a goal, by trial or from the profile."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np

from kvpack.codecs.protocol import Codec
from kvpack.codecs.recipes import CODECS, fisher, local
from kvpack.engine import Engine
from kvpack.errors import MismatchError, UsageError
from kvpack.fidelity import compare
from kvpack.formats.source import Capture
from kvpack.formats.temporary import scratch
from kvpack.jobs.compression import PROBES, Compressed, compress, left_out, without
from kvpack.jobs.reader import KvpFile
from kvpack.profiles import Profile, profile_for

QUALITIES = {"high": 0.03, "balanced": 0.06, "small": 0.12}
"""Next-token KL in nats per token that nine of ten sequences held back from calibration did not exceed."""

PROMISES = {5: (2, 4), 7: (2, 5)}
"""By the number of columns of a profile's curve: the two that a promise is made from.

Profiles with five columns have the largest KL of six sequences where later ones have that of nine in ten.
"""

LOCAL_UP_TO = 1 / 3
"""Up to this share of the ratio of ``fisher`` at its finest calibrated step, ``local`` is taken for a ratio.

On the documents of docs/benchmarks.md ``fisher-8`` has ratio 47. ``local`` reaches its KL at ratio 13 on repeated
passages and at 19 on plain text, by interpolation.
"""

FINEST, COARSEST = -480, -96
"""The range of steps that is searched for ``fisher``, in 32nds of an octave."""

LOCAL_FINEST, LOCAL_COARSEST = -128, 128
"""The range of steps that is searched for ``local``, in 32nds of an octave."""

RESOLUTION = 4
"""A search ends within an eighth of an octave of the best step, which takes 6 or 7 trials."""


@dataclass(frozen=True)
class Goal:
    """A goal: ``quality`` (a name), ``max_kl`` (nats per token), ``max_attn_err`` or ``ratio``. The others are None."""

    quality: str | None = None
    max_kl: float | None = None
    max_attn_err: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        """Check that exactly one goal is given, and that its value is valid.

        Raises:
            UsageError: No goal or several goals are given, or the value is out of range.

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
    chunk_tokens: int | None,
    drop: Sequence[str],
    keep_probes: bool | None = None,
    engine: Engine | None = None,
) -> Codec:
    """Return the codec for ``capture`` that meets ``goal``.

    With a profile it is ``fisher``, without one ``local``. Without ``profile``, promises of KL and ratios look for an
    installed one. For small ratios such a profile is not used, because ``local`` loses less there
    (:data:`LOCAL_UP_TO`). A ratio that ``lossless`` reaches is reached by ``lossless``. What files leave out is decided
    by :func:`kvpack.jobs.left_out`.

    Raises:
        UsageError: No step reaches the goal, the goal needs a profile, or there are no probes to measure attention
            with.
        MismatchError: The profile has no section ``fisher``, or is for another model.

    """
    given = profile
    if profile is None and goal.max_attn_err is None:
        profile = profile_for(capture.metadata, "fisher", capture.tensors.values())
    if profile is not None and "fisher.curve" not in profile:
        raise MismatchError(f"the profile {profile.name} has no section fisher: calibrate again")
    if goal.quality is not None or goal.max_kl is not None:
        limit = QUALITIES[goal.quality] if goal.quality is not None else float(goal.max_kl or 0)
        return _promised(profile, limit)

    def pack(codec: Codec, sink: BinaryIO) -> Compressed:
        less = left_out(codec, drop, keep_probes)
        return compress(capture, sink, codec, profile=profile, chunk_tokens=chunk_tokens, drop=less, engine=engine)

    def reached(codec: Codec) -> float:
        done = pack(codec, cast(BinaryIO, _Discarded()))
        return done.original / done.size

    if goal.ratio is not None:
        if reached(CODECS["lossless"]) >= goal.ratio:
            return CODECS["lossless"]
        if given is None and profile is not None and goal.ratio < LOCAL_UP_TO * reached(fisher(_finest(profile))):
            profile = None
    make, finest, last = (local, LOCAL_FINEST, LOCAL_COARSEST) if profile is None else (fisher, FINEST, COARSEST)
    if goal.ratio is not None:
        step = _step_for_ratio(lambda step: reached(make(step)), goal.ratio, finest, last)
        if step is None:
            raise UsageError(
                _unreachable(capture, left_out(make(last), drop, keep_probes), goal.ratio, reached(make(last)))
            )
        return make(step)

    def holds(log_step: int) -> bool:
        with scratch() as (file, path):
            pack(make(log_step), file)
            file.flush()
            attention = compare(capture, KvpFile.open(path, profile)).attention
        if attention is None:
            raise UsageError("--max-attn-err needs the probe queries of `kvpack capture`, and this capture has none")
        return attention.output_error <= float(goal.max_attn_err or 0)

    found = coarsest(holds, finest, last)
    if found is None:
        raise UsageError(f"no step keeps attention's error below {goal.max_attn_err:g} on this capture")
    return make(found)


def _promised(profile: Profile | None, limit: float) -> Codec:
    """Return ``fisher`` at the coarsest step whose promise is a KL of at most ``limit`` nats."""
    if profile is None:
        raise UsageError(
            "--quality and --max-kl go by what calibration measured, and no profile is installed for this model: give "
            "one (-D FILE, made by kvpack calibrate), or use --ratio, --max-attn-err or -c local-4"
        )
    return fisher(step_for_kl(np.asarray(profile["fisher.curve"]), limit))


def _finest(profile: Profile) -> int:
    """Return the finest step that calibration measured."""
    return int(_curve(profile["fisher.curve"])[0, 0])


def _curve(found: np.ndarray) -> np.ndarray:
    """Return the array ``fisher.curve`` of a profile, finest step first, after checking it.

    Raises:
        MismatchError: It is not a table of finite numbers with a number of columns that :data:`PROMISES` knows.

    """
    if found.ndim != 2 or not len(found) or found.shape[1] not in PROMISES or not np.isfinite(found).all():
        raise MismatchError("the profile's fisher.curve is not a table of finite numbers with 5 or 7 columns")
    return found[np.argsort(found[:, 0])]


def _step_for_ratio(reached: Callable[[int], float], ratio: float, finest: int, last: int) -> int | None:
    """Return the finest step at which a capture reaches the compression ratio, or None if no step does."""
    found = coarsest(lambda step: reached(step) < ratio, finest, last)
    if found is not None and found + RESOLUTION > last:
        return None
    return finest if found is None else found + RESOLUTION


def _unreachable(capture: Capture, drop: Sequence[str], ratio: float, best: float) -> str:
    """Say that no step reaches a ratio, and what fills the file."""
    kept, _ = without(capture.file.header, drop)
    probes, _ = without(kept, PROBES)
    size = sum(entry.nbytes for entry in kept.tensors) - sum(entry.nbytes for entry in probes.tensors)
    advice = f"; {size} bytes of it only measure quality, and without --keep-probes they are left out" if size else ""
    return f"{capture.file.name}: no step reaches a ratio of {ratio:g}: the coarsest has {best:.3g}{advice}"


class _Discarded(io.RawIOBase):
    """An output that discards everything. Only the size of a trial's file matters."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


def coarsest(holds: Callable[[int], bool], finest: int = FINEST, last: int = COARSEST) -> int | None:
    """Return the coarsest step for which ``holds`` is true, provided it is true up to some step and false beyond."""
    good, bad = finest - RESOLUTION, last + RESOLUTION
    while bad - good > RESOLUTION:
        middle = (good + bad) // (2 * RESOLUTION) * RESOLUTION
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good if good >= finest else None


def step_for_kl(curve: np.ndarray, limit: float) -> int:
    """Return the coarsest step at which the KL of nine in ten continuations of both kinds was at most ``limit``.

    ``curve`` is the array ``fisher.curve`` of a profile (``docs/profile-format.md``). Between its rows, log KL is
    interpolated over log_step. A limit above all measured values gives the coarsest measured step.

    Raises:
        MismatchError: The array has another shape, or numbers that are not finite.
        UsageError: The limit is below the KL at the finest measured step. A profile keeps only R directions, so its KL
            cannot fall below some value.

    """
    curve = _curve(curve)
    steps, promised = curve[:, 0], curve[:, PROMISES[curve.shape[1]]].max(1)
    worst = np.log2(np.maximum(np.maximum.accumulate(promised), 1e-12))
    wanted = float(np.log2(limit))
    if wanted >= worst[-1]:
        return int(steps[-1])
    if wanted < worst[0]:
        raise UsageError(
            f"no step of this profile is known to keep KL within {limit:g}: its finest may have {2 ** worst[0]:.2g}; "
            "calibrate with a higher --rank and more --tokens, or compress losslessly"
        )
    return int(np.floor(np.interp(wanted, worst, steps)))

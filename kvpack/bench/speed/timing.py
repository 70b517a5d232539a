"""How lines are timed: by device events around calls that follow each other, or by the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from kvpack.gpu.runtime.launch import Gpu

ROUNDS = 20


@dataclass(frozen=True)
class Speed:
    """One line: what, of which data, GB/s at the median and at the 10th and 90th percentile of times, and a remark."""

    what: str
    data: str
    gb_per_s: float
    slow: float
    fast: float
    remark: str = ""


def event() -> Any:
    """A device event that takes time."""
    cuda: Any = torch.cuda
    return cuda.Event(enable_timing=True)


class Timed(Gpu):
    """A GPU that notes how long each kernel takes, while asked to."""

    log: list[tuple[str, Any, Any]] | None = None

    def launch(self, name: str, *rest: Any) -> None:
        """Launch, between two events."""
        if self.log is None:
            super().launch(name, *rest)
            return
        start, stop = event(), event()
        start.record()
        super().launch(name, *rest)
        stop.record()
        self.log.append((name.rsplit(":", 1)[1], start, stop))


def seconds(function: Callable[[], object], streams: int = 1) -> list[float]:
    """Times of calls that follow each other, on so many streams by turns, by device events, ascending.

    On several, calls end in uneven steps: a time is that of as many calls as there are streams, shared.
    """
    cuda: Any = torch.cuda
    turns = [cuda.current_stream()] if streams == 1 else [cuda.Stream() for _ in range(streams)]
    events = [event() for _ in range(3 * streams + ROUNDS)]
    torch.cuda.synchronize()
    for number, after in enumerate(events):
        with cuda.stream(turns[number % streams]):
            function()
            after.record()
    torch.cuda.synchronize()
    events = events[streams:]
    pairs = zip(events[streams:], events[2 * streams :], strict=False)
    return sorted(before.elapsed_time(after) / 1e3 / streams for before, after in pairs)


def speed(what: str, data: str, size: int, times: list[float], remark: str = "") -> Speed:
    """The line for ``size`` bytes in ascending ``times``."""
    tenth = len(times) // 10
    middle, slow, fast = median(times), times[-1 - tenth], times[tenth]
    return Speed(what, data, size / middle / 1e9, size / slow / 1e9, size / fast / 1e9, remark)


def by_kernel(gpu: Timed, function: Callable[[], object]) -> dict[str, list[float]]:
    """Times of each kernel within a call, ascending."""
    gpu.log = []
    for _ in range(ROUNDS // 2):
        function()
    torch.cuda.synchronize()
    log, gpu.log = gpu.log, None
    names = list(dict.fromkeys(name for name, _, _ in log))
    calls = ROUNDS // 2
    times = {}
    for name in names:
        each = [a.elapsed_time(b) / 1e3 for n, a, b in log if n == name]
        launches = len(each) // calls
        times[name] = sorted(sum(each[i * launches : (i + 1) * launches]) for i in range(calls))
    return times


def waited(function: Callable[[Any], Any], argument: Any) -> list[float]:
    """Times of calls that are waited for, ascending: for code that works on a stream of its own."""
    times = []
    for _ in range(2 + ROUNDS // 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = function(argument)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        del result
    return sorted(times[2:])

"""Times functions on a GPU, by device events between successive calls or by the wall clock."""

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
    """One line of results.

    Attributes:
        what: name of the operation.
        data: name of the data.
        gb_per_s: speed at the median time.
        slow: speed at the 90th percentile of times.
        fast: speed at the 10th percentile of times.
        remark: further figures as text.

    """

    what: str
    data: str
    gb_per_s: float
    slow: float
    fast: float
    remark: str = ""


def event() -> Any:
    """Return a device event that records its time."""
    cuda: Any = torch.cuda
    return cuda.Event(enable_timing=True)


class Timed(Gpu):
    """A GPU that logs two events around each kernel while ``log`` is a list."""

    log: list[tuple[str, Any, Any]] | None = None

    def launch(self, name: str, *rest: Any) -> None:
        """Launch a kernel; if ``log`` is a list, record events before and after it."""
        if self.log is None:
            super().launch(name, *rest)
            return
        start, stop = event(), event()
        start.record()
        super().launch(name, *rest)
        stop.record()
        self.log.append((name.rsplit(":", 1)[1], start, stop))


def seconds(function: Callable[[], object], streams: int = 1) -> list[float]:
    """Return the times of successive calls in seconds by device events, ascending.

    The calls alternate between ``streams`` streams. With several streams, calls end at uneven intervals; therefore each
    time is that of as many calls as there are streams, divided by their number.
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
    """Return the line for an operation on ``size`` bytes that took ``times`` in seconds, ascending."""
    tenth = len(times) // 10
    middle, slow, fast = median(times), times[-1 - tenth], times[tenth]
    return Speed(what, data, size / middle / 1e9, size / slow / 1e9, size / fast / 1e9, remark)


def by_kernel(gpu: Timed, function: Callable[[], object]) -> dict[str, list[float]]:
    """Return the times of each kernel within a call of ``function`` in seconds, ascending."""
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
    """Return the wall-clock times of calls, each waited for, in seconds, ascending.

    This is for code that uses its own stream.
    """
    times = []
    for _ in range(2 + ROUNDS // 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = function(argument)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        del result
    return sorted(times[2:])

"""Engines: results by ticket, a budget of bytes, errors in their turn, threads that are asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, engine_on
from hypothesis import given
from hypothesis import strategies as st

from kvpack import jobs
from kvpack.cache import Window, windows
from kvpack.codecs.context import DecodeContext, Hints
from kvpack.codecs.recipes import CODECS
from kvpack.engine import CpuEngine, Done, EncodeTask, InTurn, Ticket, awaited
from kvpack.formats.captures import cache_spec
from kvpack.formats.safetensors import build_header
from kvpack.formats.source import Capture

Cli = Callable[..., Any]


def tasks(count: int, tokens: int = 128) -> Iterator[EncodeTask]:
    """Lossless tasks of one part each, 2 KiB at 128 tokens."""
    cache = cache_spec(build_header([("layers.0.keys", "BF16", [1, count * tokens, 8])], {}))
    bits = np.arange(count * tokens * 8, dtype=np.uint16).reshape(1, -1, 8)
    for number, window in enumerate(windows(cache, tokens)):
        part = window.parts[0]
        array = bits[:, part.first : part.first + part.tokens]
        ticket = Ticket(number, 0, 0)
        yield EncodeTask(ticket, Window(window, (array,)), ((0, CODECS["lossless"]),), DecodeContext(), Hints())


@given(st.integers(0, 40), st.integers(1, 4), st.sampled_from([0, 2048, 10_000, 1 << 20]))
def test_every_task_has_its_result(count: int, threads: int, budget: int) -> None:
    done = list(CpuEngine(threads, budget).run(tasks(count)))
    assert [one.ticket.job for one in done] == list(range(count))
    alone = list(CpuEngine(1).run(tasks(count)))
    assert [one.parts for one in done] == [one.parts for one in alone]


@pytest.mark.parametrize(("budget", "threads", "most"), [(0, 1, 1), (0, 3, 3), (5 * 2048, 1, 4), (1 << 30, 2, 8)])
def test_tasks_are_asked_for_within_the_budget(budget: int, threads: int, most: int) -> None:
    """One task a thread, and beyond that the budget's bytes, or four tasks a thread."""
    asked = 0

    def counted() -> Iterator[EncodeTask]:
        nonlocal asked
        for task in tasks(30):
            asked += 1
            yield task

    for number, _ in enumerate(CpuEngine(threads, budget).run(counted()), 1):
        assert asked - number <= most
    assert asked == 30


def test_an_error_is_raised_in_its_turn() -> None:
    """Results before and after it are given."""

    def spoilt() -> Iterator[EncodeTask]:
        for task in tasks(6):
            if task.ticket.job == 3:
                task.codecs = ((0, None),)  # type: ignore[assignment]
            yield task

    results = InTurn(CpuEngine(2).run(spoilt()))
    for job in (0, 1, 2, 4, 5):
        assert results.take(Ticket(job, 0, 0)).parts
    with pytest.raises(AttributeError):
        results.take(Ticket(3, 0, 0))


@given(st.permutations(range(8)), st.integers(0, 8))
def test_results_come_in_any_order_and_are_taken_in_turn(order: list[int], dropped: int) -> None:
    results = InTurn(iter([Done(Ticket(job, 0, 0)) for job in order]))
    results.drop(dropped - 1)
    for job in range(dropped, 8):
        assert results.take(Ticket(job, 0, 0)).ticket.job == job
    while results.pump():
        pass
    assert not results._early


def test_a_result_that_never_comes_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no result"):
        InTurn(iter(())).take(Ticket(0, 0, 0))


def test_work_that_is_given_up_ends() -> None:
    before = threading.active_count()
    for _ in CpuEngine(3).run(tasks(30)):
        break
    end = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    "options", [("--ratio", 4), ("-c", "turboquant-3", "--rm", "--lossy-ok")], ids=["trials", "rm"]
)
def test_the_threads_asked_for_are_those_that_work(
    cli: Cli, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...]
) -> None:
    """Also in trials for a promise, and where what was written is verified."""
    used: list[int] = []
    run = CpuEngine.run

    def noted(engine: CpuEngine, given: Any) -> Iterator[Done]:
        used.append(engine.threads)
        return run(engine, given)

    monkeypatch.setattr(CpuEngine, "run", noted)
    done = cli("compress", small, "-o", tmp_path / "x.kvp", "--threads", 3, "--device", "cpu", *options)
    assert done.code == 0, done.err
    assert len(used) > 1
    assert set(used) == {3}


def test_preparing_reads_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """What probes tell is found when a job's first task is asked for, not while jobs are planned ahead."""
    capture = Capture.open(SMALL)
    asked: list[str] = []
    read = Capture.read
    monkeypatch.setattr(Capture, "read", lambda self, name, rows=None: asked.append(name) or read(self, name, rows))
    job = jobs.prepare(capture, CODECS["local-4"])
    assert not any(name.startswith("layers.") for name in asked)
    next(job.tasks(0))
    assert "layers.29.keys" in asked


@pytest.mark.parametrize("chosen", [jobs.Selection(frozenset({29})), jobs.Selection(None, (100, 150))], ids=str)
def test_selections_are_decoded_by_a_gpu_too(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: jobs.Selection
) -> None:
    packed = tmp_path / "x.kvp"
    with packed.open("wb") as sink:
        jobs.compress(SMALL, sink, CODECS["lossless"], chunk_tokens=128)
    outputs, on_cpu = [tmp_path / "cpu", tmp_path / "gpu"], []
    for output, launcher in zip(outputs, (None, gpu), strict=True):
        if launcher is not None:
            from kvpack.gpu.engine import engine

            run = engine.run_task

            def noted(task: Any, run: Callable[[Any], Done] = run) -> Done:
                on_cpu.append(task.block.parts[0].label)
                return run(task)

            monkeypatch.setattr(engine, "run_task", noted)
        with output.open("wb") as sink:
            jobs.decompress(jobs.KvpFile.open(packed), sink, chosen, engine=engine_on(launcher))
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert on_cpu == ["tokens"]


def test_what_is_appended_to_stays(tmp_path: Path) -> None:
    """A file that is opened to append has no positions to write at."""
    packed, back = tmp_path / "x.kvp", tmp_path / "back"
    with packed.open("wb") as sink:
        jobs.compress(SMALL, sink, CODECS["cachegen-4"])
    back.write_bytes(b"before")
    with back.open("ab") as sink:
        jobs.decompress(jobs.KvpFile.open(packed), sink)
    whole = tmp_path / "whole"
    with whole.open("wb") as sink:
        jobs.decompress(jobs.KvpFile.open(packed), sink)
    assert back.read_bytes() == b"before" + whole.read_bytes()


def test_an_error_goes_on_when_nothing_is_under_way_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who handles it may change the file that was being read."""
    running: list[int] = []
    slow = threading.Event()

    def work(task: Any) -> Done:
        if task.ticket.job == 0:
            slow.wait(30)
            return Done(task.ticket, error=ValueError("damaged"))
        running.append(task.ticket.job)
        slow.set()
        time.sleep(0.3)
        running.remove(task.ticket.job)
        return Done(task.ticket)

    monkeypatch.setattr("kvpack.engine.cpu.run_task", work)

    def take_all() -> None:
        with awaited(CpuEngine(2).run(tasks(30))) as results:
            for result in results:
                if result.error is not None:
                    raise result.error

    with pytest.raises(ValueError, match="damaged"):
        take_all()
    assert not running

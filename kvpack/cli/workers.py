"""Work on several files at a time, each in a process of its own, so that a process that dies takes one file with it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Protocol

from kvpack.cli import common
from kvpack.cli.batch import Item, Outcome
from kvpack.cli.stopping import Stopped, stoppable
from kvpack.formats.temporary import discard_all


class Work(Protocol):
    """What a command does with its files."""

    def outcomes(self, items: Iterable[Item]) -> Iterator[Outcome]:
        """Yield the outcome of each item, in order. Errors of an item are part of its outcome."""


def run(make: Callable[[], Work], items: Sequence[Item], jobs: int) -> Iterator[Outcome]:
    """Yield the outcome of each item, in order, with ``jobs`` processes. ``make`` makes the work in each of them.

    Processes are forked from a server that has no threads and has imported what they need. Where there is no such
    server, they are started afresh. ``make`` is pickled. With one job, everything happens in this process.
    """
    streamed = any(common.STDIO in (item.path, item.target) for item in items)  # which are this process's own
    if min(jobs, len(items)) < 2 or streamed:
        yield from make().outcomes(items)
        return
    for folder in dict.fromkeys(item.target.parent for item in items if item.target is not None):
        common.remark_leftovers(folder)
    pool = _Pool(make, min(jobs, len(items)))
    try:
        yield from pool.outcomes(items)
    finally:
        pool.close()


class _Worker:
    """A process, and the item that it works on."""

    def __init__(self, make: Callable[[], Work]) -> None:
        context = _context(make)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None

    def take(self, todo: Iterator[tuple[int, Item]]) -> bool:
        """Begin to work on the next item. Return False if there are no more."""
        following = next(todo, None)
        if following is not None:
            self.number, item = following
            with suppress(ConnectionError):  # It has died; the next `result` says so.
                self.connection.send(item)
        return following is not None

    def result(self) -> Outcome | None:
        """Return the outcome of the item. Return None if the process has died.

        Raises:
            Exception: The process could not make its work.

        """
        try:
            found: Outcome | Exception = self.connection.recv()
        except (EOFError, ConnectionError):
            return None
        self.number = None
        if isinstance(found, Exception):  # It is of the options, not of this file.
            raise found
        return found

    def died(self, item: Item) -> Outcome:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return Outcome(str(item.path), None, f"{item.path}: the process that worked on it {how}", 1)


class _Pool:
    """A number of workers. One that dies is replaced."""

    def __init__(self, make: Callable[[], Work], jobs: int) -> None:
        self._make = make
        self._workers = [_Worker(make) for _ in range(jobs)]

    def outcomes(self, items: Sequence[Item]) -> Iterator[Outcome]:
        todo = iter(enumerate(items))
        early: dict[int, Outcome] = {}
        busy = [worker for worker in self._workers if worker.take(todo)]
        for number in range(len(items)):
            while number not in early:
                ready = wait([worker.connection for worker in busy])
                for worker in [worker for worker in busy if worker.connection in ready]:
                    at = worker.number
                    assert at is not None
                    outcome = worker.result()
                    early[at] = outcome or worker.died(items[at])
                    busy.remove(worker)
                    following = worker if outcome else self._replaced(worker)
                    if following.take(todo):
                        busy.append(following)
            yield early.pop(number)

    def _replaced(self, worker: _Worker) -> _Worker:
        self._workers.remove(worker)
        worker.connection.close()
        self._workers.append(_Worker(self._make))
        return self._workers[-1]

    def close(self) -> None:
        """End the processes. One that is at work is asked to clean up first."""
        for worker in self._workers:
            worker.connection.close()
            if worker.number is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join()


def _context(make: Callable[[], Work]) -> SpawnContext | ForkServerContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    made = make.func if isinstance(make, partial) else make
    context.set_forkserver_preload(["__main__", made.__module__])
    return context


def _serve(connection: Connection, make: Callable[[], Work]) -> None:
    """Work on the items that come through ``connection``, until it is closed."""
    try:
        with stoppable():
            _work(connection, make)
    except Stopped:
        discard_all()
    except (EOFError, ConnectionError):  # The command has what it wanted, or has ended.
        pass


def _work(connection: Connection, make: Callable[[], Work]) -> None:
    try:
        work = make()
    except Exception as error:
        connection.send(error)
        return
    while True:
        item: Item = connection.recv()
        try:
            (outcome,) = work.outcomes([item])
        except Exception as error:
            outcome = Outcome.failed(item, error)
        connection.send(outcome)

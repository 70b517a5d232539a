"""Give results in the order in which they are wanted."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress

from kvpack.engine.tasks import Done, Ticket


class _GivenUpError(Exception):
    """Ends an engine's generator from outside, where it is safe to wait for its threads."""


@contextmanager
def awaited(results: Iterator[Done]) -> Iterator[Iterator[Done]]:
    """Give an engine's results to a block. If an error leaves it, what is under way ends before the error goes on.

    Threads decode into memory that belongs to the code that handles the error.
    """
    try:
        yield results
    except GeneratorExit:  # perhaps the garbage collector's, which must not wait
        raise
    except BaseException:
        if isinstance(results, Generator):
            with suppress(_GivenUpError):
                results.throw(_GivenUpError())
        raise


class InTurn:
    """Gives an engine's results by ticket. Results that come early wait.

    The number of waiting results is limited by how far an engine runs ahead, provided that tickets are taken roughly in
    the order of tasks.
    """

    def __init__(self, done: Iterator[Done]) -> None:
        """Wrap an engine's results."""
        self._done = done
        self._early: dict[Ticket, Done] = {}
        self._dropped = -1
        self._failed: dict[int, Exception] = {}

    def take(self, ticket: Ticket) -> Done:
        """Return the result of a ticket, or raise its error.

        Raises:
            Exception: This task failed, or making the tasks of its job failed, or requesting a later task failed.

        """
        while ticket not in self._early:
            if ticket.job in self._failed:
                raise self._failed[ticket.job]
            if not self.pump():
                raise RuntimeError(f"the engine gave no result for {ticket}")
        result = self._early.pop(ticket)
        if result.error is None:
            return result
        try:
            raise result.error
        finally:
            del result  # or the error would hold itself, and with it the engine's threads

    def pump(self) -> bool:
        """Wait for one more result. Return False if there are no more."""
        result = next(self._done, None)
        if result is None:
            return False
        if result.ticket.job > self._dropped:
            self._early[result.ticket] = result
        return True

    def fail(self, job: int, error: Exception) -> None:
        """Note that a job's tasks could not all be made. The error is raised when a missing result is taken."""
        self._failed[job] = error

    def drop(self, job: int) -> None:
        """Discard the results of a job and of all earlier jobs, including results that are still to come."""
        self._dropped = job
        for ticket in [ticket for ticket in self._early if ticket.job <= job]:
            del self._early[ticket]

"""Results in the order in which they are wanted."""

from __future__ import annotations

from collections.abc import Iterator

from kvpack.engine.tasks import Done, Ticket


class InTurn:
    """Gives an engine's results by ticket; those that came early wait.

    What waits is bounded by how far an engine runs ahead, as long as tickets are taken about in the order of tasks.
    """

    def __init__(self, done: Iterator[Done]) -> None:
        """Over an engine's results."""
        self._done = done
        self._early: dict[Ticket, Done] = {}
        self._dropped = -1

    def take(self, ticket: Ticket) -> Done:
        """The result of a ticket; its error is raised here.

        Raises:
            Exception: what went wrong with this task, or with asking for a later one.

        """
        while ticket not in self._early:
            if not self.pump():
                raise RuntimeError(f"the engine gave no result for {ticket}")
        result = self._early.pop(ticket)
        if result.error is not None:
            raise result.error
        return result

    def pump(self) -> bool:
        """Wait for one more result; False where there is none."""
        result = next(self._done, None)
        if result is None:
            return False
        if result.ticket.job > self._dropped:
            self._early[result.ticket] = result
        return True

    def drop(self, job: int) -> None:
        """Forget the results of a job and of those before it, also those that are still to come."""
        self._dropped = job
        for ticket in [ticket for ticket in self._early if ticket.job <= job]:
            del self._early[ticket]

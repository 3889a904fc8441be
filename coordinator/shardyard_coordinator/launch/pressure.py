"""DISK_PRESSURE of a gang, for all its ranks: it begins once, ends once, and has the current text in between."""

from __future__ import annotations

from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2

SUPERVISOR_RANK = -1
"""Who speaks for the spool of all ranks."""


class Pressure:
    """Who lacks room at the moment, and what for: rank 0 for a checkpoint, the supervisor for its spool."""

    def __init__(self) -> None:
        self._said: dict[int, str] = {}

    def is_news(self, event: worker_pb2.WorkerEvent) -> bool:
        """Whether an event is to be sent; notes which rank began and which ended. Other events always are.

        One may end while the other's continues. While the supervisor lacks room the ranks wait, and what rank 0 said of
        its last checkpoint says nothing of now.
        """
        condition = event.condition
        if condition.type != job_pb2.Condition.TYPE_DISK_PRESSURE:
            return True
        before = dict(self._said)
        if condition.active:
            self._said[event.rank] = condition.message
        else:
            self._said.pop(event.rank, None)
        if self._said:
            condition.active = True
            waiting = self._said.get(SUPERVISOR_RANK)
            condition.message = waiting or "; ".join(message for message in self._said.values() if message)
        return self._said != before

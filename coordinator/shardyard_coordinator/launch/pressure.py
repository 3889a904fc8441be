"""DISK_PRESSURE of a gang, whoever lacks the room: it begins once, ends once, and says what it is for meanwhile."""

from __future__ import annotations

from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2


class Pressure:
    """Who lacks room at the moment, and what for: rank 0 for a checkpoint, the supervisor for its spool."""

    def __init__(self) -> None:
        self._said: dict[int, str] = {}

    def is_news(self, event: worker_pb2.WorkerEvent) -> bool:
        """Whether an event is to be told; notes who began and who ended. Other events always are.

        The condition that is told says what everybody lacks room for: one may end while the other's goes on.
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
            condition.message = "; ".join(message for message in self._said.values() if message)
        return self._said != before

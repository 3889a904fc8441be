"""DISK_PRESSURE of a gang, for all its ranks: it begins once, ends once, and has the current text in between."""

from __future__ import annotations

from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2

SUPERVISOR_RANK = -1
"""The rank number of reports about the spool, which all ranks share."""


class Pressure:
    """Who lacks room now: rank 0 for a checkpoint, the supervisor for its spool."""

    def __init__(self) -> None:
        self._said: dict[int, str] = {}

    def is_news(self, event: worker_pb2.WorkerEvent) -> bool:
        """Whether to send an event; notes who began and who ended. Other events are always sent.

        One may end while the other continues. While the supervisor lacks room the ranks wait, so rank 0's last report
        is outdated.
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

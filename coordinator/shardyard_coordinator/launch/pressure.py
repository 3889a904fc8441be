"""DISK_PRESSURE of a gang, whoever lacks the room: it begins once and ends once."""

from __future__ import annotations

from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2


class Pressure:
    """Who lacks room at the moment: rank 0 for a checkpoint, the supervisor for its spool."""

    def __init__(self) -> None:
        self._sources: set[int] = set()

    def is_news(self, event: worker_pb2.WorkerEvent) -> bool:
        """Whether an event is to be told; notes who began and who ended. Other events always are."""
        if event.condition.type != job_pb2.Condition.TYPE_DISK_PRESSURE:
            return True
        before = bool(self._sources)
        if event.condition.active:
            self._sources.add(event.rank)
        else:
            self._sources.discard(event.rank)
        return bool(self._sources) != before

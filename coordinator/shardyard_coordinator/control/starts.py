"""How the ranks of gangs have started, for operators: a cold start takes seconds longer, and nothing else shows it."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from shardyard.worker.v1 import worker_pb2

_log = logging.getLogger(__name__)
# Reasons that are remembered, so that a service whose ranks always start cold warns once. A spool is a file that a rank
# could write, so their number and length are limited.
_MOST_TOLD = 100
_MOST_LETTERS = 500


class Starts:
    """Counts since this process began."""

    def __init__(self) -> None:
        self.warm = 0
        self.cold = 0
        self._told: set[str] = set()

    def hear(self, events: Iterable[worker_pb2.WorkerEvent]) -> None:
        """Takes events of a gang, whose ranks count once they have met."""
        for event in events:
            if event.HasField("ready"):
                self.warm += max(event.ready.warm, 0)
                self.cold += len(event.ready.cold)
                for why in sorted({each[:_MOST_LETTERS] for each in event.ready.cold}):
                    self._tell(why)

    def _tell(self, why: str) -> None:
        is_news = why not in self._told and len(self._told) < _MOST_TOLD
        if is_news:
            self._told.add(why)
        _log.log(logging.WARNING if is_news else logging.INFO, "ranks start cold: %s", why)

"""How much may be in flight at once. What is over a limit is refused at once, with a delay after which to try again."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason

HEAVY_METHODS = frozenset(
    {
        "/shardyard.v1.JobService/PlanJob",
        "/shardyard.v1.ModelService/Predict",
        "/shardyard.v1.ModelService/Embed",
    }
)
# They hold nothing but a place: as many may wait as may watch, and those that wait hold up no other call.
WAITING_METHODS = frozenset({"/shardyard.v1.JobService/WaitJob"})
UPLOAD_METHODS = frozenset({"/shardyard.v1.ModelService/CreateModel", "/shardyard.v1.DatasetService/CreateDataset"})


@dataclass(frozen=True)
class Limits:
    """Every bound of the door; GetServerInfo shows them."""

    max_message_bytes: int = 4 * 1024 * 1024
    max_message_nodes: int = 20_000
    max_metadata_bytes: int = 8 * 1024
    max_chunk_bytes: int = 1024 * 1024
    max_unary: int = 512
    max_heavy_each: int = 16
    max_streams: int = 10_000
    max_streams_per_principal: int = 1_000
    max_uploads: int = 8
    max_upload_bytes: int = 10 * 1024**3
    max_project_upload_bytes: int = 100 * 1024**3
    upload_idle_s: float = 60.0
    unary_timeout_s: float = 60.0
    slow_consumer_s: float = 60.0
    max_response_bytes: int = 3 * 1024 * 1024


class InFlight:
    """Counts what is in flight and refuses what is too much. Used from one loop only."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._unary = 0
        self._methods: Counter[str] = Counter()
        self._streams: Counter[str] = Counter()
        self._rng = random.Random()

    @contextmanager
    def unary(self, path: str, principal: str) -> Iterator[None]:
        """Holds one place of a unary call; raises Refused OVERLOADED where there is none."""
        if path in WAITING_METHODS:
            with self.stream(path, principal):
                yield
            return
        heavy = path in HEAVY_METHODS
        if self._unary >= self._limits.max_unary:
            raise self._too_much(Reason.OVERLOADED, f"{self._unary} calls are in flight, the most allowed")
        if heavy and self._methods[path] >= self._limits.max_heavy_each:
            raise self._too_much(Reason.OVERLOADED, f"{self._methods[path]} calls of {path} are in flight")
        self._unary += 1
        self._methods[path] += heavy
        try:
            yield
        finally:
            self._unary -= 1
            self._methods[path] -= heavy

    @contextmanager
    def stream(self, path: str, principal: str) -> Iterator[None]:
        """Holds one place of a stream; raises Refused TOO_MANY_WATCHERS where there is none."""
        limits = self._limits
        if path in UPLOAD_METHODS and sum(self._methods[each] for each in UPLOAD_METHODS) >= limits.max_uploads:
            raise self._too_much(Reason.OVERLOADED, f"{limits.max_uploads} uploads are under way, the most allowed")
        own = self._streams[principal]
        if own >= limits.max_streams_per_principal or self._streams.total() >= limits.max_streams:
            raise self._too_much(Reason.TOO_MANY_WATCHERS, f"{own} streams of {principal} are open, too many")
        self._streams[principal] += 1
        self._methods[path] += 1
        try:
            yield
        finally:
            self._streams[principal] -= 1
            self._methods[path] -= 1

    def _too_much(self, reason: Reason, message: str) -> Refused:
        """Full jitter, so that those refused together do not come back together."""
        return Refused(reason, f"{message}; try again after the delay", retry_after_s=0.1 + self._rng.random() * 2)

"""How much may be in flight at once. Calls over a limit are refused at once, with a delay for the retry.

Each kind of stream has its own pot, so that any number of watchers leaves places for uploads, logs and `WaitJob`.
Calls that a person needs under load are never refused: Health, every Get and every Cancel.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from shardyard_coordinator.domain.access import LOCAL_PRINCIPAL
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason

HEAVY_METHODS = frozenset(
    {
        "/shardyard.v1.JobService/PlanJob",
        "/shardyard.v1.JobService/BatchCreateJobs",
        "/shardyard.v1.WebhookService/TestWebhook",
        "/shardyard.v1.ModelService/Predict",
        "/shardyard.v1.ModelService/Embed",
        "/shardyard.v1.ModelService/ExplainPrediction",
        "/shardyard.v1.ModelService/RecommendModels",
    }
)
# The limit of each method's pot. WaitJob is not a stream, but holds a place just as long.
_POTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "/shardyard.v1.JobService/WatchJob": "max_watches",
        "/shardyard.v1.JobService/WaitJob": "max_waits",
        "/shardyard.v1.EventService/WatchEvents": "max_event_streams",
        "/shardyard.v1.LogService/TailLogs": "max_log_streams",
        "/shardyard.v1.MetricService/WatchMetrics": "max_metric_streams",
        "/shardyard.v1.ModelService/DownloadModel": "max_downloads",
        "/shardyard.v1.DatasetService/DownloadDataset": "max_downloads",
        "/grpc.health.v1.Health/Watch": "max_health_watches",
    }
)
_OTHER_POT: Final = "max_other_streams"
_WAITING_METHODS: Final = frozenset({"/shardyard.v1.JobService/WaitJob"})
_UPLOADS: Final = frozenset({"/shardyard.v1.ModelService/CreateModel", "/shardyard.v1.DatasetService/CreateDataset"})
"""They have places of their own, which those that are idle give up (`serve/places.py`)."""


@dataclass(frozen=True)
class Limits:
    """All limits of the service's calls; GetServerInfo shows them."""

    max_message_bytes: int = 4 * 1024 * 1024
    max_message_nodes: int = 20_000
    max_metadata_bytes: int = 8 * 1024
    max_chunk_bytes: int = 1024 * 1024
    max_pending_calls: int = 20_000
    max_unary: int = 512
    # Of one principal; the only principal on loopback has no bounds of its own.
    max_unary_each: int = 256
    submits_per_s: int = 50
    max_submit_burst: int = 200
    max_project_jobs: int = 10_000
    max_heavy_each: int = 128
    max_watches: int = 10_000
    max_waits: int = 10_000
    max_event_streams: int = 1_000
    max_log_streams: int = 2_000
    max_metric_streams: int = 2_000
    max_downloads: int = 256
    max_health_watches: int = 1_000
    max_other_streams: int = 256
    # A principal may hold this fraction of each pot; the only principal on loopback may hold all of it.
    principals_per_pot: int = 10
    max_uploads: int = 8
    max_uploads_each: int = 4
    max_upload_bytes: int = 10 * 1024**3
    max_project_upload_bytes: int = 100 * 1024**3
    max_project_files: int = 250_000
    upload_idle_s: float = 60.0
    # An upload that is idle for this long gives up its place to another one.
    upload_yield_s: float = 2.0
    unary_timeout_s: float = 60.0
    slow_consumer_s: float = 60.0
    max_response_bytes: int = 3 * 1024 * 1024
    inspection_s: float = 30.0
    turn_s: float = 30.0


def is_never_shed(path: str) -> bool:
    """Whether a unary method is served under any load."""
    service, _, method = path[1:].partition("/")
    return service == "grpc.health.v1.Health" or method.startswith(("Get", "Cancel", "BatchCancel"))


def is_waiting(path: str) -> bool:
    """Whether a unary method waits for something, as long as a stream."""
    return path in _WAITING_METHODS


class InFlight:
    """Counts calls in flight and refuses those over a limit. Used from one loop only."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._unary = 0
        self._unary_of: Counter[str] = Counter()
        self._heavy: Counter[str] = Counter()
        self._pots: Counter[str] = Counter()
        self._own: Counter[tuple[str, str]] = Counter()
        self._rng = random.Random()

    @contextmanager
    def unary(self, path: str, principal: str) -> Iterator[None]:
        """Holds one place of a unary call; raises Refused OVERLOADED if there is none."""
        if is_never_shed(path):
            yield
            return
        if path in _WAITING_METHODS:
            with self.stream(path, principal):
                yield
            return
        heavy = path in HEAVY_METHODS
        if self._unary >= self._limits.max_unary:
            raise self._too_much(Reason.OVERLOADED, f"{self._unary} calls are in flight, the most allowed")
        if principal != LOCAL_PRINCIPAL and self._unary_of[principal] >= self._limits.max_unary_each:
            raise self._too_much(Reason.OVERLOADED, f"{self._unary_of[principal]} calls of one caller are in flight")
        if heavy and self._heavy[path] >= self._limits.max_heavy_each:
            raise self._too_much(Reason.OVERLOADED, f"{self._heavy[path]} calls of {path} are in flight")
        self._unary += 1
        self._unary_of[principal] += 1
        self._heavy[path] += heavy
        try:
            yield
        finally:
            self._unary -= 1
            self._unary_of[principal] -= 1
            if not self._unary_of[principal]:
                del self._unary_of[principal]
            self._heavy[path] -= heavy

    @contextmanager
    def stream(self, path: str, principal: str) -> Iterator[None]:
        """Holds one place of a stream in the pot of its kind; raises Refused TOO_MANY_WATCHERS if there is none."""
        if path in _UPLOADS:
            yield
            return
        pot = _POTS.get(path, _OTHER_POT)
        most: int = getattr(self._limits, pot)
        own = most if principal == LOCAL_PRINCIPAL else max(most // self._limits.principals_per_pot, 1)
        if self._pots[pot] >= most or self._own[pot, principal] >= own:
            method = path.rpartition("/")[2]
            text = f"{self._own[pot, principal]:,} calls of {method} are open; {own:,} are allowed ({pot})"
            raise self._too_much(Reason.TOO_MANY_WATCHERS, text)
        self._pots[pot] += 1
        self._own[pot, principal] += 1
        try:
            yield
        finally:
            self._pots[pot] -= 1
            self._own[pot, principal] -= 1
            if not self._own[pot, principal]:
                del self._own[pot, principal]

    def _too_much(self, reason: Reason, message: str) -> Refused:
        """With full jitter, so that callers refused together do not return together."""
        return Refused(reason, f"{message}; try again after the delay", retry_after_s=0.1 + self._rng.random() * 2)

"""Counts, logs and traces every call: the guard's observer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.log_context import logged_about
from shardyard_coordinator.monitoring import families
from shardyard_coordinator.monitoring.registry import Metrics
from shardyard_coordinator.serve.app import descriptors
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.observed import UNKNOWN_METHOD, Outcome

_log = logging.getLogger(__name__)
# Their duration is their caller's business.
_UNTIMED = frozenset(
    {"shardyard.v1.JobService/WaitJob", UNKNOWN_METHOD}
    | {
        f"{service.full_name}/{method.name}"
        for service in descriptors()
        for method in service.methods
        if method.client_streaming or method.server_streaming
    }
)


class CallSpan(Protocol):
    """The span of one call; `traceparent` is empty if it is not sampled."""

    traceparent: str

    def end(self, code: str, *, request_id: str) -> None:
        """Ends it with the call's gRPC code."""


class Tracing(Protocol):
    """Makes the spans of calls (`monitoring/tracing.py`)."""

    def begin_call(self, method: str, metadata: Mapping[str, str]) -> CallSpan | None:
        """The span of a call, as part of its caller's trace if `metadata` names one; None: it is not traced."""


class CallObserver:
    """Observes calls; without `metrics` and `tracing` it only logs."""

    def __init__(self, metrics: Metrics | None, tracing: Tracing | None = None) -> None:
        self._metrics = metrics
        self._tracing = tracing

    @contextmanager
    def call(self, call: Call, metadata: Mapping[str, str]) -> Iterator[Outcome]:
        """Surrounds a call. Its lines in the log have its request id and its method."""
        method, begun_s = call.method.removeprefix("/"), time.monotonic()
        span = self._tracing.begin_call(method, metadata) if self._tracing is not None else None
        outcome = Outcome(span.traceparent if span is not None else "")
        code = "OK"
        about = {"request_id": call.request_id, "method": method, "trace_id": outcome.traceparent[3:35]}
        with logged_about(**{name: value for name, value in about.items() if value}):
            if self._metrics:
                self._metrics.add(families.CALLS_OPEN, 1, method)
            try:
                yield outcome
            except asyncio.CancelledError:
                code = Reason.CANCELLED.value
                raise
            finally:
                if outcome.refused is not None:
                    code = outcome.refused.code.value
                self._ended(method, code, outcome, time.monotonic() - begun_s)
                if span is not None:
                    span.end(code, request_id=call.request_id)

    def _ended(self, method: str, code: str, outcome: Outcome, duration_s: float) -> None:
        reason = outcome.refused.reason.value if outcome.refused is not None else ""
        if metrics := self._metrics:
            metrics.add(families.CALLS_OPEN, -1, method)
            metrics.add(families.CALLS, 1, method, code)
            if method not in _UNTIMED:
                metrics.observe(families.CALL_SECONDS, duration_s, method)
            if reason:
                metrics.add(families.REFUSALS, 1, reason)
        if _log.isEnabledFor(logging.INFO):
            fields: dict[str, str | float] = {
                "principal": outcome.principal,
                "code": code,
                "reason": reason,
                "duration_ms": round(duration_s * 1000, 1),
            }
            with logged_about(**{name: value for name, value in fields.items() if value}):
                _log.info("call ended")

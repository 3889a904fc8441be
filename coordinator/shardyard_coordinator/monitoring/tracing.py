"""Traces of calls and of jobs, sent to a collector over OTLP; only imported if a collector is named.

A call is a span, which ends however the call ends: by an answer, an error, or its caller's leaving. The trace of the
call that created a job continues with the job: `plan` and `commit` in the call, then `queue`, `attempt`, and in it
`launch`, its phases and `first steps`. The job keeps the call's context, so spans of a job are made from its events,
by whichever process hears them; one that was open when the service ended is lost.

A caller's `traceparent` only says which trace its call belongs to. It is checked by its form, and nothing else is read.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from shardyard_coordinator.redaction import one_line, redacted
from shardyard_coordinator.serve.observed import UNKNOWN_METHOD

_log = logging.getLogger(__name__)
_TRACEPARENT: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
# Codes that OpenTelemetry's conventions count as errors of a server.
_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
FLUSH_S = 3.0
MAX_ATTRIBUTE = 200


class Tracing:
    """Makes spans and sends them in batches, from a thread; spans beyond 2,048 that wait are dropped."""

    def __init__(self, endpoint: str, version: str) -> None:
        """`endpoint` is the collector's, `http://host:4317`, or `https://…` with TLS."""
        resource = Resource.create({"service.name": "shardyard", "service.version": version})
        # The exporter's own lines come with every batch of an outage.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        exporter = _Exporter(OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=5))
        self._provider = TracerProvider(resource=resource, sampler=ParentBased(ALWAYS_ON), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("shardyard", version)

    def begin(
        self, name: str, parent: str = "", *, start_us: int | None = None, kind: SpanKind = SpanKind.INTERNAL
    ) -> Span:
        """A span that is ended by `end`; `parent` is a traceparent, or empty: the first of a new trace."""
        start_ns = time.time_ns() if start_us is None else start_us * 1000
        return self._tracer.start_span(name, _context(parent), kind=kind, start_time=start_ns)

    def begin_call(self, method: str, metadata: Mapping[str, str]) -> CallSpan | None:
        """The span of a call, which continues its caller's trace; None for health checks and reflection."""
        if method.startswith("grpc.") or method == UNKNOWN_METHOD:
            return None
        return CallSpan(self.begin(method, checked(metadata.get("traceparent", "")), kind=SpanKind.SERVER), method)

    @contextmanager
    def span(self, name: str, parent: str) -> Iterator[None]:
        """A span around the body, if its parent is traced; one that raises is an error."""
        if not parent:
            yield
            return
        made = self.begin(name, parent)
        error = "interrupted"
        try:
            yield
            error = ""
        except Exception as raised:
            error = type(raised).__qualname__
            raise
        finally:
            end(made, error=error)

    def close(self) -> None:
        """Sends what waits; a collector that does not answer delays the end by a few seconds at most."""
        # A thread that nobody waits for: the exporter retries for as long as it likes.
        closing = threading.Thread(target=self._provider.shutdown, name="trace-shutdown", daemon=True)
        closing.start()
        closing.join(FLUSH_S)


class CallSpan:
    """The span of one call."""

    def __init__(self, span: Span, method: str) -> None:
        self._span = span
        self.traceparent = traceparent_of(span)
        service, _, name = method.partition("/")
        span.set_attributes({"rpc.system": "grpc", "rpc.service": service, "rpc.method": name})

    def end(self, code: str, *, request_id: str) -> None:
        """Ends it with the call's gRPC code; a code that is the service's fault is an error."""
        self._span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[code].value[0])
        end(self._span, error=code if code in _FAULTS else "", request_id=request_id)


def end(span: Span, *, error: str = "", end_us: int | None = None, **attributes: str | int) -> None:
    """Ends a span, as an error if one is named."""
    for name, value in attributes.items():
        span.set_attribute(
            f"shardyard.{name}", one_line(redacted(value))[:MAX_ATTRIBUTE] if isinstance(value, str) else value
        )
    if error:
        span.set_status(Status(StatusCode.ERROR, error))
    span.end(time.time_ns() if end_us is None else end_us * 1000)


def traceparent_of(span: Span) -> str:
    """The span in W3C's form, for its children; empty if it is not sampled."""
    context = span.get_span_context()
    if not context.is_valid or not context.trace_flags.sampled:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


def checked(traceparent: str) -> str:
    """A caller's traceparent; empty if it is not one."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return traceparent if found and int(found[1], 16) and int(found[2], 16) else ""


class _Exporter(SpanExporter):
    """Logs once when the collector stops taking spans, and once when it takes them again."""

    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner
        self._fails = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends a batch; one that is not taken is lost."""
        result = self._inner.export(spans)
        fails = result is not SpanExportResult.SUCCESS
        if fails and not self._fails:
            _log.warning("the collector of --otlp-endpoint takes no spans: they are lost until it does")
        elif self._fails and not fails:
            _log.warning("the collector of --otlp-endpoint takes spans again")
        self._fails = fails
        return result

    def shutdown(self) -> None:
        """Closes the connection."""
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Has nothing of its own to send."""
        return self._inner.force_flush(timeout_millis)


def _context(traceparent: str) -> Context:
    """The context whose current span is the parent; an empty one without a parent."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if not found:
        return Context()
    flags = TraceFlags(int(found[3], 16) & 1)
    parent = SpanContext(int(found[1], 16), int(found[2], 16), is_remote=True, trace_flags=flags)
    return trace.set_span_in_context(NonRecordingSpan(parent), Context())

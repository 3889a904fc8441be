"""MetricService: the numbers of every step, as history and as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from functools import partial

from sqlalchemy import Connection

from shardyard.v1 import metric_service_pb2 as pb
from shardyard_coordinator.domain.records import JobRecord, MetricSeries
from shardyard_coordinator.serve.call import Behaviour, Call
from shardyard_coordinator.serve.fanout import Fanout, metrics_of
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.tokens import cursor_invalid
from shardyard_coordinator.serve.watch import Intervals
from shardyard_coordinator.store import encode, jobs, metrics

MAX_POINTS = 100_000
# A point takes about 26 bytes on the wire, so every answer stays under the clients' 4 MiB.
MAX_ANSWER_POINTS = 120_000
_BATCH_POINTS = 5_000


class MetricService:
    """The numbers of every step."""

    full_name = "shardyard.v1.MetricService"

    def __init__(self, parts: Parts, fanout: Fanout, intervals: Intervals) -> None:
        self._parts = parts
        self._fanout = fanout
        self._intervals = intervals

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return {"QueryMetrics": self.query, "WatchMetrics": self.watch}

    async def query(self, request: pb.QueryMetricsRequest, _call: Call) -> pb.QueryMetricsResponse:
        """Returns the history, with the limit that was applied."""
        name = self._parts.name("job", request.name)
        asked = min(request.max_points, MAX_POINTS) if request.HasField("max_points") else 1000

        def query(conn: Connection) -> tuple[list[MetricSeries], int]:
            job = jobs.get_job(conn, name.project, name.id)
            wanted = list(request.metrics) or metrics.metric_names(conn, job.uid)
            limit = max(3, min(asked, MAX_ANSWER_POINTS // max(len(wanted), 1)))
            found = metrics.query_metrics(
                conn,
                job.uid,
                list(request.metrics),
                max_points=limit,
                all_attempts=request.all_attempts,
                min_step=request.min_step,
                max_step=request.max_step,
            )
            return found, limit

        found, limit = await self._parts.store.read_many(query)
        return pb.QueryMetricsResponse(series=_series(found), max_points=limit)

    async def watch(self, request: pb.WatchMetricsRequest, _call: Call) -> AsyncIterator[pb.WatchMetricsResponse]:
        """Sends points as they come; the cursor counts the delivered points of each metric."""
        name = self._parts.name("job", request.name)
        job = await self._parts.store.read(lambda conn: jobs.get_job(conn, name.project, name.id))
        counts = self._counts(request, job.uid)
        loop = asyncio.get_running_loop()
        due_s = loop.time() + self._intervals.heartbeat_s
        while True:
            with self._fanout.interest(job.uid, metrics_of(job.uid)) as waiter:
                found, counts, ended = await self._parts.store.read(
                    partial(_next, job=job, request=request, counts=counts)
                )
                if found or loop.time() >= due_s:
                    cursor = self._parts.tokens.make("metrics", job.uid, counts)
                    yield pb.WatchMetricsResponse(series=_series(found), cursor=cursor)
                    due_s = loop.time() + self._intervals.heartbeat_s
                elif ended:
                    return
                else:
                    await self._fanout.changed(waiter, due_s - loop.time())

    def _counts(self, request: pb.WatchMetricsRequest, job_uid: str) -> dict[str, int]:
        if not request.cursor:
            return {}
        try:
            return dict(self._parts.tokens.read("metrics", job_uid, request.cursor))
        except ValueError:
            raise cursor_invalid("cursor", request.cursor) from None


def _next(
    conn: Connection, job: JobRecord, request: pb.WatchMetricsRequest, counts: dict[str, int]
) -> tuple[list[MetricSeries], dict[str, int], bool]:
    """Reads points and job together, so that no points follow once the job has ended."""
    current = jobs.get_job_by_uid(conn, job.uid)
    found, after = metrics.metrics_after(conn, job.uid, list(request.metrics), counts, _BATCH_POINTS)
    return found, after, current is None or current.state.is_terminal


def _series(found: Iterable[MetricSeries]) -> list[pb.MetricSeries]:
    return [
        pb.MetricSeries(
            metric=each.metric,
            total_points=each.total_points,
            points=[
                pb.MetricPoint(
                    attempt=point.attempt, step=point.step, time=encode.timestamp(point.time_us), value=point.value
                )
                for point in each.points
            ],
        )
        for each in found
    ]

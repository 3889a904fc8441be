"""The numbers of every step, in blocks of up to 1,000 points a series; downsampled when they are read.

A block is packed little-endian (step int64, time int64, value float64) triples of one attempt. `first_index` counts the
points of the metric before the block, over all attempts, so a follower's cursor is one number per metric.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import groupby

from sqlalchemy import Connection, Row, Select, bindparam, select, update

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import MetricPoint, MetricSeries
from shardyard_coordinator.store import curves, tables
from shardyard_coordinator.store.sql import Prepared, PreparedInsert, note_metrics

BLOCK_POINTS = 1000
_POINT = struct.Struct("<qqd")
_block = tables.metric_block.c
_MINE = (_block.job_uid == bindparam("job"), _block.metric == bindparam("of_metric"))
_TAIL = Prepared(
    select(_block.first_index, _block.attempt, _block.num_points, _block.min_step, _block.max_step, _block.data)
    .where(*_MINE)
    .order_by(_block.first_index.desc())
    .limit(1)
)
_EXTEND = Prepared(
    update(tables.metric_block)
    .where(*_MINE, _block.first_index == bindparam("first"))
    .values(
        num_points=bindparam("count"), min_step=bindparam("low"), max_step=bindparam("high"), data=bindparam("content")
    )
)
_INSERT = PreparedInsert(tables.metric_block, (column.name for column in tables.metric_block.columns))
_COLUMNS = (_block.metric, _block.first_index, _block.attempt, _block.num_points, _block.data)


def add_points(conn: Connection, job_uid: str, metric: str, points: Sequence[MetricPoint]) -> None:
    """Appends points, which come in the order of the attempts, to a metric of a job."""
    note_metrics(conn, job_uid)
    for attempt, group in groupby(points, key=lambda point: point.attempt):
        _add(conn, job_uid, metric, attempt, list(group))


def _add(conn: Connection, job_uid: str, metric: str, attempt: int, points: list[MetricPoint]) -> None:
    tail = _TAIL.run(conn, job=job_uid, of_metric=metric).first()
    index = 0
    if tail is not None:
        first, owner, count, low, high, data = tail
        index = first + count
        if owner == attempt and count < BLOCK_POINTS:
            fitting, points = points[: BLOCK_POINTS - count], points[BLOCK_POINTS - count :]
            steps = [point.step for point in fitting]
            _EXTEND.run(
                conn,
                job=job_uid,
                of_metric=metric,
                first=first,
                count=count + len(fitting),
                low=min(low, *steps),
                high=max(high, *steps),
                content=data + _pack(fitting),
            )
            index += len(fitting)
    rows = [
        {
            "job_uid": job_uid,
            "metric": metric,
            "first_index": index + start,
            "attempt": attempt,
            "num_points": len(part),
            "min_step": min(point.step for point in part),
            "max_step": max(point.step for point in part),
            "data": _pack(part),
        }
        for start in range(0, len(points), BLOCK_POINTS)
        for part in [points[start : start + BLOCK_POINTS]]
    ]
    _INSERT.run(conn, rows)


def metric_names(conn: Connection, job_uid: str) -> list[str]:
    """The metrics that a job has, sorted."""
    found = conn.execute(select(_block.metric).where(_block.job_uid == job_uid).distinct())
    return sorted(found.scalars())


def query_metrics(
    conn: Connection,
    job_uid: str,
    names: Sequence[str],
    *,
    max_points: int = 1000,
    all_attempts: bool = False,
    min_step: int = 0,
    max_step: int = 0,
) -> list[MetricSeries]:
    """The history of the metrics named, or of all; one curve each, unless `all_attempts`; `max_step` 0: to the last.

    Raises: Refused METRIC_NOT_FOUND.
    """
    known = metric_names(conn, job_uid)
    for name in names:
        if name not in known:
            raise Refused(
                Reason.METRIC_NOT_FOUND,
                f"there is no metric {name[:80]!r} yet; there are {', '.join(known) or 'none'}",
                metadata={"metric": name[:80]},
            )
    answer = []
    for name in names or known:
        rows = conn.execute(_of(job_uid, name, min_step, max_step))
        found = curves.in_steps(curves.unpack((row.attempt, row.data) for row in rows), min_step, max_step)
        curve = curves.by_step(found) if all_attempts else curves.one_curve(found)
        answer.append(MetricSeries(name, curves.downsample(curve, max_points).points(), len(curve)))
    return answer


def metrics_after(
    conn: Connection, job_uid: str, names: Sequence[str], counts: Mapping[str, int], limit: int
) -> tuple[list[MetricSeries], dict[str, int]]:
    """The points after the first `counts[metric]`, at most `limit` per metric; and the counts to continue from."""
    seen = dict(counts)
    answer = []
    for name in names or metric_names(conn, job_uid):
        had = seen.get(name, 0)
        statement = _blocks(job_uid, name).where(_block.first_index + _block.num_points > had)
        rows = conn.execute(statement.limit(2 + limit // BLOCK_POINTS)).all()
        points = [point for row in rows for point in _unpack(row)]
        first = rows[0].first_index if rows else had
        fresh = points[had - first :][:limit]
        if fresh:
            seen[name] = had + len(fresh)
            answer.append(MetricSeries(name, tuple(fresh), len(fresh)))
    return answer, seen


def _blocks(job_uid: str, metric: str) -> Select[tuple[str, int, int, int, bytes]]:
    mine = (_block.job_uid == job_uid, _block.metric == metric)
    return select(*_COLUMNS).where(*mine).order_by(_block.first_index)


def _of(job_uid: str, metric: str, min_step: int, max_step: int) -> Select[tuple[str, int, int, int, bytes]]:
    statement = _blocks(job_uid, metric).where(_block.max_step >= min_step)
    return statement.where(_block.min_step <= max_step) if max_step else statement


def _pack(points: Sequence[MetricPoint]) -> bytes:
    return b"".join(_POINT.pack(point.step, point.time_us, point.value) for point in points)


def _unpack(row: Row[tuple[str, int, int, int, bytes]]) -> list[MetricPoint]:
    return [MetricPoint(row.attempt, step, time_us, value) for step, time_us, value in _POINT.iter_unpack(row.data)]

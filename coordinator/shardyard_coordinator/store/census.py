"""Counts over the whole store, for monitoring: each from an index alone, in one of the threads for long reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, and_, case, func, literal_column, select

from shardyard_coordinator.domain.records import ResourceKind
from shardyard_coordinator.domain.states import AttemptState, JobState
from shardyard_coordinator.store import tables

_job, _attempt, _resource = tables.job.c, tables.attempt.c, tables.resource.c
# Literals, not parameters: only then does the database use the partial indices.
_QUEUED = and_(_job.state == literal_column(f"'{JobState.QUEUED.value}'"), _job.deleted_us == literal_column("0"))
_SLOTS = _job.workers * case((_job.gpus_per_worker > 0, _job.gpus_per_worker), else_=_job.cpus_per_worker)
_BY_STATE = select(_job.state, func.count()).where(_job.deleted_us == 0).group_by(_job.state)
_WAITING = select(func.coalesce(func.sum(_SLOTS), 0)).where(_QUEUED)
_OLDEST = select(func.min(_job.create_us)).where(_job.deleted_us == 0, _job.state == JobState.QUEUED.value)
_LIVE = select(func.count()).where(_attempt.state != literal_column(f"'{AttemptState.ENDED.value}'"))
_STORED = (
    select(_resource.kind, func.count(), func.coalesce(func.sum(_resource.size_bytes), 0))
    .where(_resource.tombstone == "")
    .group_by(_resource.kind)
)


@dataclass(frozen=True)
class Census:
    """`oldest_us`: when the oldest waiting job was created, 0 if none waits; `resources`: kind → (number, bytes)."""

    jobs: Mapping[JobState, int]
    queued_slots: int
    oldest_us: int
    live_attempts: int
    resources: Mapping[ResourceKind, tuple[int, int]]


def take_census(conn: Connection) -> Census:
    """Counts everything, on one snapshot; states without jobs are 0."""
    by_state = {state: number for state, number in conn.execute(_BY_STATE)}  # noqa: C416 - rows are not pairs
    stored = {kind: (number, size) for kind, number, size in conn.execute(_STORED)}
    return Census(
        jobs={state: int(by_state.get(state.value, 0)) for state in JobState},
        queued_slots=int(conn.execute(_WAITING).scalar_one()),
        oldest_us=int(conn.execute(_OLDEST).scalar_one() or 0),
        live_attempts=int(conn.execute(_LIVE).scalar_one()),
        resources={kind: stored.get(kind.value, (0, 0)) for kind in ResourceKind},
    )

"""Operations on checkpoints: a row for each complete one on the storage."""

from __future__ import annotations

import dataclasses
from typing import Any

from sqlalchemy import Connection, Row, and_, insert, or_, select, update

from shardyard_coordinator.domain.records import CheckpointRecord, CheckpointState
from shardyard_coordinator.store import tables

_checkpoint = tables.checkpoint.c
_FIELDS = tuple(field.name for field in dataclasses.fields(CheckpointRecord))
_COLUMNS = tuple(_checkpoint[name] for name in _FIELDS)
_NEWEST_FIRST = (_checkpoint.step.desc(), _checkpoint.epoch.desc())


def record_checkpoint(conn: Connection, record: CheckpointRecord) -> bool:
    """Adds a committed checkpoint; False if its row is there already."""
    if get_checkpoint(conn, record.job_uid, record.epoch, record.step) is not None:
        return False
    values = {**dataclasses.asdict(record), "state": record.state.value}
    conn.execute(insert(tables.checkpoint).values(**values))
    return True


def set_checkpoint_state(conn: Connection, record: CheckpointRecord, state: CheckpointState) -> bool:
    """Moves a checkpoint from the state that was read; False if another change came first."""
    guard = (
        _checkpoint.job_uid == record.job_uid,
        _checkpoint.epoch == record.epoch,
        _checkpoint.step == record.step,
        _checkpoint.state == record.state.value,
    )
    return conn.execute(update(tables.checkpoint).where(*guard).values(state=state.value)).rowcount == 1


def get_checkpoint(conn: Connection, job_uid: str, epoch: int, step: int) -> CheckpointRecord | None:
    """The checkpoint of a job, epoch and step, or None."""
    mine = (_checkpoint.job_uid == job_uid, _checkpoint.epoch == epoch, _checkpoint.step == step)
    row = conn.execute(select(*_COLUMNS).where(*mine)).first()
    return None if row is None else _from_row(row)


def list_checkpoints(
    conn: Connection, job_uid: str, *, after: tuple[int, int] | None = None, limit: int = 50
) -> list[CheckpointRecord]:
    """A page of a job's checkpoints, the newest first; `after` is the (step, epoch) of the last one seen."""
    statement = select(*_COLUMNS).where(_checkpoint.job_uid == job_uid)
    if after is not None:
        step, epoch = after
        earlier = and_(_checkpoint.step == step, _checkpoint.epoch < epoch)
        statement = statement.where(or_(_checkpoint.step < step, earlier))
    return [_from_row(row) for row in conn.execute(statement.order_by(*_NEWEST_FIRST).limit(limit))]


def committed_checkpoints(conn: Connection, job_uid: str) -> list[CheckpointRecord]:
    """The checkpoints that a job could resume from, the newest first."""
    return _in_state(conn, job_uid, CheckpointState.COMMITTED)


def corrupt_checkpoints(conn: Connection, job_uid: str) -> list[CheckpointRecord]:
    """The checkpoints that were found damaged, the newest first."""
    return _in_state(conn, job_uid, CheckpointState.CORRUPT)


def _in_state(conn: Connection, job_uid: str, state: CheckpointState) -> list[CheckpointRecord]:
    mine = (_checkpoint.job_uid == job_uid, _checkpoint.state == state.value)
    return [_from_row(row) for row in conn.execute(select(*_COLUMNS).where(*mine).order_by(*_NEWEST_FIRST))]


def deleting_checkpoints(conn: Connection) -> list[CheckpointRecord]:
    """Checkpoints whose removal was started and not finished."""
    begun = _checkpoint.state == CheckpointState.DELETING.value
    return [_from_row(row) for row in conn.execute(select(*_COLUMNS).where(begun).order_by(_checkpoint.job_uid))]


def _from_row(row: Row[Any]) -> CheckpointRecord:
    values = dict(zip(_FIELDS, row, strict=True))
    values["state"] = CheckpointState(values["state"])
    values["metrics"] = values["metrics"] or b""
    return CheckpointRecord(**values)

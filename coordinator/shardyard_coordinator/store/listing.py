"""Lists of jobs: conditions become SQL, pages go on after a key, so new rows never shift them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Select, and_, exists, literal, not_, or_, select

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import Condition, JobRecord
from shardyard_coordinator.store import tables
from shardyard_coordinator.store.jobs import COLUMNS, from_row

_job, _label = tables.job.c, tables.label.c
_HEAVY = ("spec", "resolved_spec", "plan")
_BASIC = tuple(literal(b"").label(column.name) if column.name in _HEAVY else column for column in COLUMNS)
# Nobody is shown the plan in a list, and it repeats the spec.
_FULL = tuple(literal(b"").label(column.name) if column.name == "plan" else column for column in COLUMNS)
_ROWS_AT_ONCE = 32
_ORDERS: Mapping[str, Column[Any]] = {
    "create_time": _job.create_us,
    "end_time": _job.end_us,
    "display_name": _job.display_name,
    "priority": _job.priority,
}
_FIELDS: Mapping[str, Column[Any]] = {
    **_ORDERS,
    "state": _job.state,
    "task": _job.task,
    "queue": _job.queue,
    "creator": _job.creator,
}
_COMPARE: Mapping[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def list_jobs(
    conn: Connection,
    project: str,
    *,
    conditions: Sequence[Condition] = (),
    order_by: str = "create_time",
    desc: bool = True,
    after: tuple[int | str, int] | None = None,
    limit: int = 50,
    full: bool = False,
    max_bytes: int = 1 << 62,
) -> list[JobRecord]:
    """A page of a project's jobs, up to `limit`, or to the first one with which their specs are over `max_bytes`.

    `after` is the `order_key` of the last one seen; without `full` the specs are empty.

    Raises: Refused FILTER_INVALID for a field or operator that there is not.
    """
    statement = jobs_statement(project, conditions, order_by, desc=desc, after=after, limit=limit, full=full)
    found: list[JobRecord] = []
    size = 0
    with conn.execution_options(yield_per=_ROWS_AT_ONCE).execute(statement) as rows:
        for row in rows:
            found.append(from_row(row))
            size += len(found[-1].spec) + len(found[-1].resolved_spec)
            if size > max_bytes:
                break
    return found


def order_key(job: JobRecord, order_by: str) -> tuple[int | str, int]:
    """Where a job stands in a list of that order."""
    return getattr(job, _ORDERS[order_by].name), job.id


def jobs_statement(
    project: str,
    conditions: Sequence[Condition],
    order_by: str,
    *,
    desc: bool,
    after: tuple[int | str, int] | None,
    limit: int,
    full: bool,
) -> Select[Any]:
    """The SELECT of a page."""
    column = _ORDERS[order_by]
    statement = select(*(_FULL if full else _BASIC)).where(_job.project == project, _job.deleted_us == 0)
    statement = statement.where(*(_test(condition) for condition in conditions))
    if after is not None:
        beyond = operator.lt if desc else operator.gt
        value, last_id = after
        statement = statement.where(or_(beyond(column, value), and_(column == value, beyond(_job.id, last_id))))
    order = (column.desc(), _job.id.desc()) if desc else (column.asc(), _job.id.asc())
    return statement.order_by(*order).limit(limit)


def _test(condition: Condition) -> ColumnElement[bool]:
    if condition.field.startswith("labels."):
        return _label_test(condition)
    column = _FIELDS.get(condition.field)
    if column is None:
        raise Refused(Reason.FILTER_INVALID, f"there is no field {condition.field!r}; one of {', '.join(_FIELDS)}")
    if condition.op == ":":
        return column.icontains(str(condition.value), autoescape=True)
    return _compare(condition.op)(column, condition.value)  # type: ignore[no-any-return]


def _label_test(condition: Condition) -> ColumnElement[bool]:
    """A job without the label meets `!=` and nothing else."""
    same = and_(_label.job_uid == _job.uid, _label.key == condition.field.removeprefix("labels."))
    if condition.op == ":" and condition.value == "*":
        return exists().where(same)
    if condition.op == ":":
        return exists().where(same, _label.value.icontains(str(condition.value), autoescape=True))
    if condition.op == "!=":
        return not_(exists().where(same, _label.value == condition.value))
    return exists().where(same, _compare(condition.op)(_label.value, condition.value))


def _compare(op: str) -> Callable[[Any, Any], Any]:
    if op not in _COMPARE:
        raise Refused(Reason.FILTER_INVALID, f"there is no operator {op!r}; one of {' '.join(_COMPARE)} :")
    return _COMPARE[op]

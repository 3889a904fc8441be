"""Lists of jobs: conditions become SQL; pages continue after a key, so that new rows never shift them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Select, literal, select, tuple_
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.visitors import InternalTraversal

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import Condition, JobRecord
from shardyard_coordinator.store import tables
from shardyard_coordinator.store.findable import digest_of
from shardyard_coordinator.store.jobs import COLUMNS, from_row

_job, _label, _attribute = tables.job.c, tables.label.c, tables.attribute.c
_HEAVY = ("spec", "resolved_spec", "plan")
_BASIC = tuple(literal(b"").label(column.name) if column.name in _HEAVY else column for column in COLUMNS)
# Lists do not show the plan, which repeats the spec.
_FULL = tuple(literal(b"").label(column.name) if column.name == "plan" else column for column in COLUMNS)
_ROWS_AT_ONCE = 32
_ANY_TIME = -(1 << 62)
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

    Raises: Refused FILTER_INVALID for an unknown field or operator.
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
    """A job's position in a list of that order."""
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
    """The SELECT of a page: first row ids from an index alone, then the rows, which are long.

    Either an index has the requested rows in the requested order, so that the first rows found are the page; or the
    index that covers all fields of filters is scanned.
    """
    column = _ORDERS[order_by]
    found = _labelled(project, conditions, order_by) or _found(project, conditions, order_by)
    place = found.key
    if after is not None:
        given = tuple_(*(literal(value, each.type) for value, each in zip(after, place, strict=True)))
        found.statement = found.statement.where(tuple_(*place) < given if desc else tuple_(*place) > given)
    order = [each.desc() if desc else each.asc() for each in place]
    page = found.statement.order_by(*order).limit(limit).subquery()
    rows = select(*(_FULL if full else _BASIC)).join(page, _job.id == page.c.id)
    return rows.order_by(*((column.desc(), _job.id.desc()) if desc else (column.asc(), _job.id.asc())))


@dataclass
class _Found:
    """A SELECT of the ids of the rows that meet the conditions, and their order."""

    statement: Select[Any]
    key: tuple[ColumnElement[Any], ColumnElement[Any]]


def _labelled(project: str, conditions: Sequence[Condition], order_by: str) -> _Found | None:
    """Jobs with one value of a label, by an index in the order of their creation."""
    if len(conditions) != 1 or order_by != "create_time" or conditions[0].op != "=":
        return None
    [condition] = conditions
    if not condition.field.startswith("labels."):
        return None
    statement = select(_label.job_row.label("id")).where(*_has_label(project, condition))
    return _Found(statement.where(_label.value == condition.value), (_label.create_us, _label.job_row))


def _found(project: str, conditions: Sequence[Condition], order_by: str) -> _Found:
    """Hides every field that must not choose the index."""
    column = _ORDERS[order_by]
    by_state = order_by == "create_time" and any((each.field, each.op) == ("state", "=") for each in conditions)
    # The columns whose indices give the order and the narrowest range; all others are checked row by row.
    seen = {order_by} | ({"state"} if by_state else set())
    through = order_by != "create_time" and any(each.field != order_by for each in conditions)
    if through:
        seen = set()
    statement = select(_job.id.label("id")).where(_job.project == project, _job.deleted_us == 0)
    statement = statement.where(*(_test(project, each, hidden=each.field not in seen) for each in conditions))
    if through:
        # Only the index of all fields has what the filter needs without reading rows.
        statement = statement.where(_job.create_us >= _ANY_TIME)
        return _Found(statement, (_Hidden(column), _Hidden(_job.id)))
    return _Found(statement, (column, _job.id))


def _test(project: str, condition: Condition, *, hidden: bool) -> ColumnElement[bool]:
    if condition.field.startswith("labels."):
        return _row_test(select(_label.job_row).where(*_has_label(project, condition)), _label.value, condition)
    if is_attribute(condition.field):
        rows = select(_attribute.job_row).where(_attribute.project == project, _attribute.field == condition.field)
        if condition.op == "=":
            rows = rows.where(_attribute.digest == digest_of(str(condition.value)))
        return _row_test(rows, _attribute.value, condition)
    column = _FIELDS.get(condition.field)
    if column is None:
        raise Refused(Reason.FILTER_INVALID, f"there is no field {condition.field!r}; one of {', '.join(_FIELDS)}")
    if condition.op == ":":
        return column.icontains(str(condition.value), autoescape=True)
    return _compare(condition.op)(_Hidden(column) if hidden else column, condition.value)  # type: ignore[no-any-return]


def _row_test(rows: Select[Any], column: ColumnElement[Any], condition: Condition) -> ColumnElement[bool]:
    """`rows` are those of jobs that have the label or attribute at all; one without it meets `!=` and nothing else."""
    job_row = _Hidden(_job.id)
    if condition.op == ":" and condition.value == "*":
        return job_row.in_(rows)
    if condition.op == ":":
        return job_row.in_(rows.where(column.icontains(str(condition.value), autoescape=True)))
    if condition.op == "!=":
        return job_row.not_in(rows.where(column == condition.value))
    return job_row.in_(rows.where(_compare(condition.op)(column, condition.value)))


def is_attribute(field: str) -> bool:
    """Whether a field of filters is in a job's description, not in a column of its own."""
    return field == "external_uri" or field.startswith("annotations.")


def _has_label(project: str, condition: Condition) -> tuple[ColumnElement[bool], ...]:
    return _label.project == project, _label.key == condition.field.removeprefix("labels.")


class _Hidden(ColumnElement[Any]):
    """A column as a plain value, so that SQLite does not choose an index by it."""

    inherit_cache = True

    def __init__(self, column: ColumnElement[Any]) -> None:
        self.column = column
        self.type = column.type

    _traverse_internals = [("column", InternalTraversal.dp_clauseelement)]  # noqa: RUF012 - as its base declares it.


@compiles(_Hidden)
def _as_it_is(element: _Hidden, compiler: SQLCompiler, **keywords: Any) -> str:
    return compiler.process(element.column, **keywords)


@compiles(_Hidden, "sqlite")
def _with_a_sign(element: _Hidden, compiler: SQLCompiler, **keywords: Any) -> str:
    return "+" + compiler.process(element.column, **keywords)


def _compare(op: str) -> Callable[[Any, Any], Any]:
    if op not in _COMPARE:
        raise Refused(Reason.FILTER_INVALID, f"there is no operator {op!r}; one of {' '.join(_COMPARE)} :")
    return _COMPARE[op]

"""The audit log, and whose things a caller may change: what is recorded and checked in the transaction of a change.

Every operation that changes something for a caller ends with `record`; an operation of the service itself leaves no
entry. Entries are only ever added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, select

from shardyard_coordinator.domain.access import AuditRecord
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.seams import SYSTEM, Actor
from shardyard_coordinator.store import tables
from shardyard_coordinator.store.sql import PreparedInsert

OK = "OK"
_audit = tables.audit.c
_FIELDS = tuple(field.name for field in dataclasses.fields(AuditRecord))
_COLUMNS = tuple(_audit[name] for name in _FIELDS)
_INSERT = PreparedInsert(tables.audit, _FIELDS[1:])


def record(conn: Connection, actor: Actor, resource: str, now_us: int) -> None:
    """Records that the actor changed the resource, such as `projects/p/jobs/j`."""
    record_all(conn, [(actor, resource)], now_us)


def record_all(conn: Connection, changes: Iterable[tuple[Actor, str]], now_us: int) -> None:
    """Records many changes with few statements."""
    rows = [_row(actor, resource, OK, now_us) for actor, resource in changes if actor.principal != SYSTEM.principal]
    _INSERT.run(conn, rows)


def record_denial(conn: Connection, actor: Actor, resource: str, reason: Reason, *, count: int, now_us: int) -> None:
    """Records that the actor was denied what it asked for, `count` times since the last entry of that kind."""
    _INSERT.run(conn, [_row(actor, resource, reason.value, now_us, count)])


def check_owner(name: str, creator: str, actor: Actor) -> None:
    """Raises: Refused ACCESS_DENIED if the actor may only change what it made, and this was made by another one."""
    if actor.only_own and creator != actor.principal:
        maker = creator or "the service"
        text = f"{name} was made by {maker}: only its maker, or an admin of the project, may change it; ask one of them"
        raise Refused(Reason.ACCESS_DENIED, text)


def list_entries(
    conn: Connection,
    projects: Sequence[str] | None,
    *,
    principal: str = "",
    resource: str = "",
    denied_only: bool = False,
    since_us: int = 0,
    after: int | None = None,
    limit: int = 50,
) -> list[AuditRecord]:
    """A page of the entries of these projects, None: of all and of what concerns no project; the newest first.

    `after` is the position of the last one seen.
    """
    statement = select(*_COLUMNS)
    if projects is not None:
        statement = statement.where(_audit.project.in_(projects))
    if principal:
        statement = statement.where(_audit.principal == principal)
    if resource:
        statement = statement.where(_audit.resource == resource)
    if denied_only:
        statement = statement.where(_audit.outcome != OK)
    if since_us:
        statement = statement.where(_audit.time_us >= since_us)
    if after is not None:
        statement = statement.where(_audit.position < after)
    return [AuditRecord(*row) for row in conn.execute(statement.order_by(_audit.position.desc()).limit(limit))]


def project_of(resource: str) -> str:
    """The project of a resource's name; empty if it is in none, or in all."""
    parts = resource.split("/")
    return parts[1] if len(parts) > 1 and parts[0] == "projects" and parts[1] != "-" else ""


def _row(actor: Actor, resource: str, outcome: str, now_us: int, count: int = 1) -> dict[str, Any]:
    return {
        "time_us": now_us,
        "principal": actor.principal,
        "credential": actor.credential,
        "method": actor.method,
        "project": project_of(resource),
        "resource": resource,
        "request_id": actor.request_id,
        "outcome": outcome,
        "peer": actor.peer,
        "count": count,
    }

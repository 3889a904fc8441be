"""Steps of every start of a store, on any database: who the store is, and whether its newest logs are whole."""

from __future__ import annotations

import secrets

from sqlalchemy import Connection, func, insert, select

from shardyard_coordinator.seams import Clock
from shardyard_coordinator.store import tables
from shardyard_coordinator.store.failures import StoreBroken

_CHECKED_JOBS = 1000


def check_logs(conn: Connection, name: str) -> None:
    """The newest jobs' events are dense. Raises: StoreBroken."""
    job, event = tables.job.c, tables.event.c
    newest = select(job.uid, job.last_sequence).order_by(job.id.desc()).limit(_CHECKED_JOBS).subquery()
    statement = (
        select(newest.c.uid, newest.c.last_sequence, func.count(), func.min(event.sequence), func.max(event.sequence))
        .join(tables.event, event.job_uid == newest.c.uid)
        .group_by(newest.c.uid, newest.c.last_sequence)
    )
    for uid, last, count, first, newest_sequence in conn.execute(statement):
        if newest_sequence != last or count != last - first + 1:
            raise StoreBroken(
                f"{name}: the events of job {uid} have a hole: {count} from {first} to {newest_sequence}, "
                f"but the last is {last}; restore it from a backup"
            )


def identity(conn: Connection, clock: Clock) -> tuple[str, bytes]:
    """The store's id and its secret, which a new store gets here."""
    if (found := stored_identity(conn)) is not None:
        return found
    store_id, secret = secrets.token_hex(16), secrets.token_bytes(32)
    conn.execute(insert(tables.meta).values(id=1, create_us=clock.now_us(), store_id=store_id, secret=secret))
    return store_id, secret


def stored_identity(conn: Connection) -> tuple[str, bytes] | None:
    """The same, None for a new store."""
    row = conn.execute(select(tables.meta.c.store_id, tables.meta.c.secret)).first()
    return None if row is None else (row.store_id, row.secret)

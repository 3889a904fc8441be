"""What filters find jobs by beside their columns: rows for labels, and for annotations and the external_uri."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, delete

from shardyard_coordinator.store import tables
from shardyard_coordinator.store.sql import PreparedInsert

_INSERT_LABEL = PreparedInsert(tables.label, ("job_uid", "key", "value", "project", "create_us", "job_row"))
_INSERT_ATTRIBUTE = PreparedInsert(tables.attribute, ("job_uid", "field", "value", "project", "digest", "job_row"))


class Findable(NamedTuple):
    """A job's labels, and its attributes by the filters' names; `row` is its row id."""

    job_uid: str
    row: int
    project: str
    create_us: int
    labels: Mapping[str, str]
    attributes: Mapping[str, str]


def insert_findable(conn: Connection, jobs: Sequence[Findable]) -> None:
    """Adds the rows of new jobs, with one statement per table for most."""
    labels = [
        {
            "job_uid": job.job_uid,
            "key": key,
            "value": value,
            "project": job.project,
            "create_us": job.create_us,
            "job_row": job.row,
        }
        for job in jobs
        for key, value in job.labels.items()
    ]
    _INSERT_LABEL.run(conn, labels)
    attributes = [
        {
            "job_uid": job.job_uid,
            "field": field,
            "value": value,
            "project": job.project,
            "digest": digest_of(value),
            "job_row": job.row,
        }
        for job in jobs
        for field, value in job.attributes.items()
    ]
    _INSERT_ATTRIBUTE.run(conn, attributes)


def digest_of(value: str) -> int:
    """A number that finds a value by an index: values may be too long for one."""
    return int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], signed=True)


def replace_findable(conn: Connection, job: Findable) -> None:
    """Replaces the rows of a job."""
    remove_findable(conn, job.job_uid)
    insert_findable(conn, [job])


def remove_findable(conn: Connection, job_uid: str) -> None:
    """Removes the rows of a job: no filter finds it any more."""
    for table in (tables.label, tables.attribute):
        conn.execute(delete(table).where(table.c.job_uid == job_uid))

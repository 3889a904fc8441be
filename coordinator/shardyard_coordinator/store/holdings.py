"""What a store knows about its storage: whether it must have files, and which folders are its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Table, exists, literal, select, true

from shardyard_coordinator.store import tables


@dataclass(frozen=True)
class Holdings:
    """`knows`: the store has jobs, models or data sets. `has_files`: some of them left files. `recognises`: some of
    the folders that were asked about are theirs."""

    knows: bool
    has_files: bool
    recognises: bool


def look_up(conn: Connection, uids: Sequence[str]) -> Holdings:
    """What the store knows about its storage, and about folders with these names."""
    job, resource = tables.job.c, tables.resource.c
    any_job = _is_there(conn, true(), tables.job)
    any_resource = _is_there(conn, true(), tables.resource)
    return Holdings(
        knows=any_job or any_resource,
        has_files=any_resource or _is_there(conn, job.epoch > 0, tables.job),
        recognises=_is_there(conn, job.uid.in_(uids), tables.job)
        or _is_there(conn, resource.uid.in_(uids), tables.resource),
    )


def _is_there(conn: Connection, condition: ColumnElement[bool], table: Table) -> bool:
    return bool(conn.execute(select(exists(select(literal(1)).select_from(table).where(condition)))).scalar_one())

"""Operations on models and data sets: announced, filled, complete; never removed while a live job uses them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import FileRecord, NewUpload, ResourceKind, ResourceRecord, ResourceState
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.seams import Actor
from shardyard_coordinator.store import audit, tables
from shardyard_coordinator.store.sql import Prepared

_resource, _file, _plan = tables.resource.c, tables.resource_file.c, tables.plan.c
_FIELDS = tuple(field.name for field in dataclasses.fields(ResourceRecord))
_FILE_COLUMNS = (_file.path, _file.size_bytes, _file.sha256, _file.committed_bytes)
_COLUMNS = tuple(_resource[name] for name in _FIELDS)
_LISTS = {
    ResourceKind.MODEL: "`shardyard models` (ListModels)",
    ResourceKind.DATASET: "`shardyard datasets` (ListDatasets)",
}
_NOT_FOUND = {ResourceKind.MODEL: Reason.MODEL_NOT_FOUND, ResourceKind.DATASET: Reason.DATASET_NOT_FOUND}
_NOT_READY = {ResourceKind.MODEL: Reason.MODEL_NOT_READY, ResourceKind.DATASET: Reason.DATASET_NOT_READY}
_EXISTS = {ResourceKind.MODEL: Reason.MODEL_EXISTS, ResourceKind.DATASET: Reason.DATASET_EXISTS}
_IN_USE = {ResourceKind.MODEL: Reason.MODEL_IN_USE, ResourceKind.DATASET: Reason.DATASET_IN_USE}
_WORDS = {ResourceKind.MODEL: "model", ResourceKind.DATASET: "data set"}
_KEYS = {ResourceKind.MODEL: "model", ResourceKind.DATASET: "dataset"}
_BY_NAME = Prepared(
    select(*_COLUMNS).where(
        _resource.kind == bindparam("kind"),
        _resource.project == bindparam("project"),
        _resource.resource_id == bindparam("resource_id"),
        _resource.tombstone == "",
    )
)
_TERMINAL = tuple(state.value for state in JobState if state.is_terminal)


def begin_upload(conn: Connection, new: NewUpload, actor: Actor, now_us: int) -> ResourceRecord:
    """Announces an upload; the same request id with the same files returns the upload in progress, or the finished one.

    Raises: Refused MODEL_EXISTS, DATASET_EXISTS, REQUEST_ID_REUSED (the id with other files).
    """
    if (held := find_upload(conn, new, actor)) is not None:
        return held
    values = {
        "uid": new.uid,
        "kind": new.kind.value,
        "project": new.project,
        "resource_id": new.resource_id,
        "state": ResourceState.UPLOADING.value,
        "display_name": new.display_name,
        "creator": actor.principal,
        "path": new.path,
        "size_bytes": sum(file.size_bytes for file in new.files),
        "request_id": new.request_id,
        "create_us": now_us,
    }
    conn.execute(insert(tables.resource).values(**values))
    _insert_files(conn, new.uid, new.files)
    made = require_resource(conn, new.uid)
    audit.record(conn, actor, made.name, now_us)
    return made


def find_upload(conn: Connection, new: NewUpload, actor: Actor) -> ResourceRecord | None:
    """The same upload of the same principal, in progress or finished; None if the name is free.

    Raises: Refused MODEL_EXISTS, DATASET_EXISTS, REQUEST_ID_REUSED (the id with other files).
    """
    held = _find(conn, new.kind, new.project, new.resource_id)
    if held is None:
        return None
    if not new.request_id or (held.request_id, held.creator) != (new.request_id, actor.principal):
        raise _exists(new.kind, held.name)
    announced = {(file.path, file.size_bytes, file.sha256) for file in new.files}
    if announced != {(file.path, file.size_bytes, file.sha256) for file in list_files(conn, held.uid)}:
        raise Refused(
            Reason.REQUEST_ID_REUSED,
            f"request_id {new.request_id} began an upload of other files to {held.name}; make a new one",
            metadata={"request_id": new.request_id},
        )
    return held


def register_output(
    conn: Connection,
    new: NewUpload,
    *,
    source_job: str,
    creator: str,
    description: bytes,
    now_us: int,
) -> ResourceRecord:
    """Adds a job's complete result under `new.resource_id`. Raises: Refused MODEL_EXISTS, DATASET_EXISTS."""
    values = {
        "uid": new.uid,
        "kind": new.kind.value,
        "project": new.project,
        "resource_id": new.resource_id,
        "state": ResourceState.READY.value,
        "display_name": new.display_name,
        "creator": creator,
        "source_job": source_job,
        "path": new.path,
        "size_bytes": sum(file.size_bytes for file in new.files),
        "description": description,
        "create_us": now_us,
    }
    try:
        conn.execute(insert(tables.resource).values(**values))
    except IntegrityError as error:
        raise _exists(new.kind, f"projects/{new.project}/{new.kind.value}/{new.resource_id}") from error
    _insert_files(conn, new.uid, [dataclasses.replace(file, committed_bytes=file.size_bytes) for file in new.files])
    return require_resource(conn, new.uid)


def replace_part(
    conn: Connection, record: ResourceRecord, prefix: str, files: Sequence[FileRecord], *, description: bytes
) -> ResourceRecord:
    """Replaces the files of a READY resource whose paths begin with `prefix`, and its description."""
    # LIKE ignores case in SQLite.
    mine = (_file.resource_uid == record.uid, func.substr(_file.path, 1, len(prefix)) == prefix)
    conn.execute(delete(tables.resource_file).where(*mine))
    _insert_files(conn, record.uid, [dataclasses.replace(file, committed_bytes=file.size_bytes) for file in files])
    total = select(func.coalesce(func.sum(_file.size_bytes), 0)).where(_file.resource_uid == record.uid)
    values = {"description": description, "size_bytes": total.scalar_subquery()}
    conn.execute(update(tables.resource).where(_resource.uid == record.uid).values(**values))
    return require_resource(conn, record.uid)


def _insert_files(conn: Connection, uid: str, files: Sequence[FileRecord]) -> None:
    if files:
        rows = [{"resource_uid": uid, **dataclasses.asdict(file)} for file in files]
        conn.execute(insert(tables.resource_file), rows)


def commit_parts(conn: Connection, uid: str, sizes: Mapping[str, int]) -> None:
    """Records how many bytes of each path are on the disk; never fewer than before."""
    mine = (_file.resource_uid == uid, _file.path == bindparam("at"), _file.committed_bytes < bindparam("size"))
    statement = update(tables.resource_file).where(*mine).values(committed_bytes=bindparam("size"))
    conn.execute(statement, [{"at": path, "size": size} for path, size in sizes.items()])


def reset_parts(conn: Connection, uid: str, paths: Sequence[str]) -> None:
    """Records that files must be sent again, because their content differs from the announced one."""
    mine = (_file.resource_uid == uid, _file.path == bindparam("at"))
    conn.execute(update(tables.resource_file).where(*mine).values(committed_bytes=0), [{"at": path} for path in paths])


def finish_upload(conn: Connection, uid: str, description: bytes, *, actor: Actor, now_us: int) -> ResourceRecord:
    """UPLOADING → READY, once all files are complete and checked. Idempotent."""
    waiting = (_resource.uid == uid, _resource.state == ResourceState.UPLOADING.value)
    values = {"state": ResourceState.READY.value, "description": description}
    is_new = conn.execute(update(tables.resource).where(*waiting).values(**values)).rowcount == 1
    whole = {"committed_bytes": _file.size_bytes}
    conn.execute(update(tables.resource_file).where(_file.resource_uid == uid).values(**whole))
    ready = require_resource(conn, uid)
    if is_new:
        audit.record(conn, actor, ready.name, now_us)
    return ready


def get_resource(conn: Connection, kind: ResourceKind, project: str, resource_id: str) -> ResourceRecord:
    """The model or data set of that name, READY or UPLOADING. Raises: Refused MODEL_NOT_FOUND, DATASET_NOT_FOUND."""
    record = _find(conn, kind, project, resource_id)
    if record is None:
        name = f"projects/{project}/{kind.value}/{resource_id}"
        raise Refused(
            _NOT_FOUND[kind],
            f"there is no {_WORDS[kind]} `{name}`; list them with {_LISTS[kind]}",
            metadata={_KEYS[kind]: name},
        )
    return record


def ready_resource(conn: Connection, name: str) -> ResourceRecord:
    """The READY model or data set of a validated name.

    Raises: Refused MODEL_NOT_FOUND, DATASET_NOT_FOUND, MODEL_NOT_READY, DATASET_NOT_READY.
    """
    _, project, kind_text, resource_id = name.split("/")
    kind = ResourceKind(kind_text)
    record = get_resource(conn, kind, project, resource_id)
    if record.state is not ResourceState.READY:
        raise Refused(_NOT_READY[kind], f"{name} is still being uploaded; finish the upload first")
    return record


def require_resource(conn: Connection, uid: str) -> ResourceRecord:
    """The row of that uid."""
    return _from_row(conn.execute(select(*_COLUMNS).where(_resource.uid == uid)).one())


def _find(conn: Connection, kind: ResourceKind, project: str, resource_id: str) -> ResourceRecord | None:
    row = _BY_NAME.run(conn, kind=kind.value, project=project, resource_id=resource_id).first()
    return None if row is None else _from_row(row)


def list_resources(
    conn: Connection,
    kind: ResourceKind,
    project: str,
    *,
    after: int | None = None,
    limit: int = 50,
    show_uploading: bool = False,
) -> list[ResourceRecord]:
    """A page of READY resources, or UPLOADING ones too, the newest first; `after` is the `id` of the last one seen."""
    states = [ResourceState.READY.value, *([ResourceState.UPLOADING.value] if show_uploading else [])]
    wanted = (_resource.kind == kind.value, _resource.project == project, _resource.state.in_(states))
    statement = select(*_COLUMNS).where(*wanted)
    if after is not None:
        statement = statement.where(_resource.id < after)
    return [_from_row(row) for row in conn.execute(statement.order_by(_resource.id.desc()).limit(limit))]


def held_bytes(conn: Connection, project: str, but: str = "") -> int:
    """The bytes of the project's models and data sets except that uid; of uploads, those that have arrived."""
    mine = (_resource.project == project, _resource.uid != but)
    whole = select(func.sum(_resource.size_bytes)).where(*mine, _resource.state == ResourceState.READY.value)
    arriving = (
        select(func.sum(_file.committed_bytes))
        .join(tables.resource, _resource.uid == _file.resource_uid)
        .where(*mine, _resource.state == ResourceState.UPLOADING.value)
    )
    return sum(int(conn.execute(statement).scalar_one() or 0) for statement in (whole, arriving))


def num_files(conn: Connection, project: str, but: str = "") -> int:
    """The number of files of the project's models and data sets, including uploads in progress, except that uid."""
    mine = (_resource.project == project, _resource.state != ResourceState.DELETING.value, _resource.uid != but)
    owners = select(_resource.uid).where(*mine)
    statement = select(func.count()).select_from(tables.resource_file).where(_file.resource_uid.in_(owners))
    return int(conn.execute(statement).scalar_one())


def get_file(conn: Connection, uid: str, path: str) -> FileRecord | None:
    """One file of a model or data set, or None."""
    statement = select(*_FILE_COLUMNS).where(_file.resource_uid == uid, _file.path == path)
    row = conn.execute(statement).first()
    return None if row is None else FileRecord(*row)


def list_files(conn: Connection, uid: str, *, limit: int | None = None) -> list[FileRecord]:
    """The files of a model or data set, sorted by path, all or the first ones."""
    statement = select(*_FILE_COLUMNS).where(_file.resource_uid == uid).order_by(_file.path).limit(limit)
    return [FileRecord(*row) for row in conn.execute(statement)]


def begin_delete(
    conn: Connection, kind: ResourceKind, project: str, resource_id: str, *, actor: Actor, now_us: int
) -> ResourceRecord:
    """Records the removal: the name is free from now on; the caller removes the folder.

    Raises: Refused MODEL_NOT_FOUND, DATASET_NOT_FOUND, ACCESS_DENIED, MODEL_IN_USE, DATASET_IN_USE.
    """
    record = get_resource(conn, kind, project, resource_id)
    audit.check_owner(record.name, record.creator, actor)
    users = live_users(conn, record.name)
    if users:
        raise Refused(
            _IN_USE[kind],
            f"{record.name} is read by {', '.join(users[:3])}; cancel the job, or wait for its end",
            metadata={"job": users[0]},
        )
    values = {"state": ResourceState.DELETING.value, "tombstone": record.uid}
    conn.execute(update(tables.resource).where(_resource.uid == record.uid).values(**values))
    audit.record(conn, actor, record.name, now_us)
    return dataclasses.replace(record, state=ResourceState.DELETING)


def finish_delete(conn: Connection, uid: str) -> None:
    """Removes the rows of a resource whose files are removed."""
    conn.execute(delete(tables.resource_file).where(_file.resource_uid == uid))
    gone = (_resource.uid == uid, _resource.state == ResourceState.DELETING.value)
    conn.execute(delete(tables.resource).where(*gone))


def live_users(conn: Connection, name: str) -> list[str]:
    """The names of the live jobs that use it; those of other projects are not named."""
    job, use = tables.job.c, tables.job_use.c
    statement = (
        select(job.project, job.job_id)
        .join(tables.job_use, use.job_uid == job.uid)
        .where(use.resource == name, job.state.not_in(_TERMINAL))
        .order_by(job.id)
        .limit(10)
    )
    own = audit.project_of(name)
    return [
        f"projects/{row.project}/jobs/{row.job_id}" if row.project == own else "a job of another project"
        for row in conn.execute(statement)
    ]


def stale_uploads(conn: Connection, before_us: int) -> list[ResourceRecord]:
    """Uploads announced before `before_us` and never finished."""
    old = (_resource.state == ResourceState.UPLOADING.value, _resource.create_us < before_us)
    return [_from_row(row) for row in conn.execute(select(*_COLUMNS).where(*old).order_by(_resource.id))]


def deleting_resources(conn: Connection) -> list[ResourceRecord]:
    """Models and data sets whose removal was started and not finished."""
    begun = _resource.state == ResourceState.DELETING.value
    return [_from_row(row) for row in conn.execute(select(*_COLUMNS).where(begun).order_by(_resource.id))]


def known_uids(conn: Connection, kind: ResourceKind) -> set[str]:
    """The uids of all rows of a kind; folders of other uids are leftovers."""
    return set(conn.execute(select(_resource.uid).where(_resource.kind == kind.value)).scalars())


def get_plan(conn: Connection, fingerprint: bytes) -> bytes | None:
    """The stored PlanResult of that fingerprint, or None."""
    row = conn.execute(select(_plan.result).where(_plan.fingerprint == fingerprint)).first()
    return None if row is None else bytes(row.result)


def put_plan(conn: Connection, fingerprint: bytes, result: bytes, now_us: int) -> None:
    """Stores a PlanResult, and keeps the newest 10,000."""
    conn.execute(delete(tables.plan).where(_plan.fingerprint == fingerprint))
    conn.execute(insert(tables.plan).values(fingerprint=fingerprint, result=result, create_us=now_us))
    count = conn.execute(select(func.count()).select_from(tables.plan)).scalar_one()
    if count > _MAX_PLANS:
        oldest = select(_plan.fingerprint).order_by(_plan.create_us).limit(count - _MAX_PLANS)
        conn.execute(delete(tables.plan).where(_plan.fingerprint.in_(oldest.scalar_subquery())))


_MAX_PLANS = 10_000


def _exists(kind: ResourceKind, name: str) -> Refused:
    return Refused(_EXISTS[kind], f"{name} exists; choose another id, or delete it first", metadata={_KEYS[kind]: name})


def _from_row(row: Row[Any] | tuple[Any, ...]) -> ResourceRecord:
    values = dict(zip(_FIELDS, row, strict=True))
    values["kind"] = ResourceKind(values["kind"])
    values["state"] = ResourceState(values["state"])
    values["description"] = values["description"] or b""
    return ResourceRecord(**values)

"""Downloads: one file from an offset on, in checked chunks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import google_crc32c
from sqlalchemy import Connection

from shardyard.v1 import transfer_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.errors import FieldViolation, Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import FileRecord, ResourceKind, ResourceRecord, ResourceState
from shardyard_coordinator.launch.claim import check_claim
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.storage_errors import storage_errors
from shardyard_coordinator.serve.validation.text import show
from shardyard_coordinator.store import resources

_CHUNK_BYTES = 1024 * 1024
_NAMES = {ResourceKind.MODEL: "model", ResourceKind.DATASET: "dataset"}
_T = TypeVar("_T")


async def download(
    parts: Parts, kind: ResourceKind, name: str, path: str, offset: int
) -> AsyncIterator[transfer_pb2.DownloadChunk]:
    """The file's chunks from the offset on, none at its end; a stream that ends with OK has sent the whole file."""
    parsed = parts.name(_NAMES[kind], name)

    def look(conn: Connection) -> tuple[ResourceRecord, FileRecord]:
        record = resources.get_resource(conn, kind, parsed.project, parsed.id)
        ready(record)
        return record, _file(conn, record, path)

    record, file = await parts.store.read(look)
    if offset > file.size_bytes:
        text = f"`{offset}` is past the end of {path}, which has {file.size_bytes} bytes; begin at most there"
        raise Refused(
            Reason.OFFSET_OUT_OF_RANGE,
            text,
            metadata={"size_bytes": str(file.size_bytes)},
            violations=[FieldViolation("offset", text, Reason.OFFSET_OUT_OF_RANGE)],
        )
    with storage_errors():
        stream = await asyncio.to_thread(_open, parts.claim, record, file, offset)
    try:
        while data := await _read(stream):
            yield transfer_pb2.DownloadChunk(offset=offset, data=data, crc32c=google_crc32c.value(data))
            offset += len(data)
    finally:
        stream.close()
    if offset != file.size_bytes:
        raise _damaged(record, file, f"it had {offset:,} bytes when it was read, {file.size_bytes:,} are recorded")


async def _read(stream: BinaryIO) -> bytes:
    with storage_errors():
        return await asyncio.to_thread(stream.read, _CHUNK_BYTES)


def _file(conn: Connection, record: ResourceRecord, path: str) -> FileRecord:
    file = resources.get_file(conn, record.uid, path)
    if file is None:
        there = ", ".join(each.path for each in resources.list_files(conn, record.uid, limit=10))
        text = f"{show(path)} is not a file of `{record.name}`; it has: {there}"
        raise Refused(Reason.FILE_NOT_FOUND, text, violations=[FieldViolation("path", text, Reason.FILE_NOT_FOUND)])
    return file


async def find(parts: Parts, kind: ResourceKind, name: str) -> ResourceRecord:
    """A resource; Refused MODEL_NOT_FOUND or DATASET_NOT_FOUND."""
    parsed = parts.name(_NAMES[kind], name)
    return await parts.store.read(lambda conn: resources.get_resource(conn, kind, parsed.project, parsed.id))


async def describe(
    parts: Parts, kind: ResourceKind, name: str, encode: Callable[[ResourceRecord, list[FileRecord]], _T]
) -> _T:
    """Encodes a resource and its files in the reader's thread, because there may be very many files.

    Refused MODEL_NOT_FOUND or DATASET_NOT_FOUND.
    """
    parsed = parts.name(_NAMES[kind], name)

    def query(conn: Connection) -> _T:
        record = resources.get_resource(conn, kind, parsed.project, parsed.id)
        return encode(record, resources.list_files(conn, record.uid))

    return await parts.store.read(query)


def ready(record: ResourceRecord) -> None:
    """Raises Refused MODEL_NOT_READY or DATASET_NOT_READY while the resource is being uploaded."""
    if record.state is not ResourceState.READY:
        reason = Reason.MODEL_NOT_READY if record.kind is ResourceKind.MODEL else Reason.DATASET_NOT_READY
        raise Refused(reason, f"`{record.name}` is still being uploaded; finish the upload first")


def _open(claim: worker_pb2.StorageClaim, record: ResourceRecord, file: FileRecord, offset: int) -> BinaryIO:
    """Opens the file at the offset. A link in place of the file is not followed.

    Raises: Refused FILE_DAMAGED if the file does not have its recorded size; StorageFailed if the storage is not
    mounted, because then the file is not damaged.
    """
    try:
        stream = open(Path(record.path) / file.path, "rb", opener=_open_itself)  # noqa: SIM115 - the reader closes the stream.
    except OSError as error:
        check_claim(claim)
        raise _damaged(record, file, f"it cannot be read: {error.strerror}") from error
    size = os.fstat(stream.fileno()).st_size
    if size != file.size_bytes:
        stream.close()
        raise _damaged(record, file, f"it has {size:,} bytes, {file.size_bytes:,} are recorded")
    stream.seek(offset)
    return stream


def _open_itself(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _damaged(record: ResourceRecord, file: FileRecord, why: str) -> Refused:
    step = (
        "ask the operator to restore it"
        if record.source_job
        else "ask the operator to restore it, or delete it and upload it again"
    )
    text = f"the service's own copy of {file.path} of `{record.name}` is damaged: {why}; {step}"
    return Refused(Reason.FILE_DAMAGED, text, metadata={"file": file.path, "resource": record.name})

"""Downloads: one file from an offset on, in checked chunks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import google_crc32c
from sqlalchemy import Connection

from shardyard.v1 import transfer_pb2
from shardyard_coordinator.domain.errors import FieldViolation, Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import FileRecord, ResourceKind, ResourceRecord, ResourceState
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.validation.text import show
from shardyard_coordinator.store import resources

_CHUNK_BYTES = 1024 * 1024


async def download(
    parts: Parts, kind: ResourceKind, name: str, path: str, offset: int
) -> AsyncIterator[transfer_pb2.DownloadChunk]:
    """The file's chunks from the offset on; none where the offset is its end."""
    record, files = await find(parts, kind, name)
    ready(record)
    file = next((each for each in files if each.path == path), None)
    if file is None:
        there = ", ".join(each.path for each in files[:10])
        text = f"{show(path)} is not a file of `{name}`; it has: {there}"
        raise Refused(Reason.FILE_NOT_FOUND, text, violations=[FieldViolation("path", text, Reason.FILE_NOT_FOUND)])
    if offset > file.size_bytes:
        text = f"`{offset}` is past the end of {path}, which has {file.size_bytes} bytes; begin at most there"
        raise Refused(
            Reason.OFFSET_OUT_OF_RANGE,
            text,
            metadata={"size_bytes": str(file.size_bytes)},
            violations=[FieldViolation("offset", text, Reason.OFFSET_OUT_OF_RANGE)],
        )
    stream = await asyncio.to_thread(_open, Path(record.path) / path, offset)
    try:
        while data := await asyncio.to_thread(stream.read, _CHUNK_BYTES):
            yield transfer_pb2.DownloadChunk(offset=offset, data=data, crc32c=google_crc32c.value(data))
            offset += len(data)
    finally:
        stream.close()


async def find(parts: Parts, kind: ResourceKind, name: str) -> tuple[ResourceRecord, list[FileRecord]]:
    """A resource and its files; Refused MODEL_NOT_FOUND or DATASET_NOT_FOUND."""
    parsed = parts.name("model" if kind is ResourceKind.MODEL else "dataset", name)

    def query(conn: Connection) -> tuple[ResourceRecord, list[FileRecord]]:
        record = resources.get_resource(conn, kind, parsed.project, parsed.id)
        return record, resources.list_files(conn, record.uid)

    return await parts.store.read(query)


def ready(record: ResourceRecord) -> None:
    """Refused MODEL_NOT_READY or DATASET_NOT_READY while it is being uploaded."""
    if record.state is not ResourceState.READY:
        reason = Reason.MODEL_NOT_READY if record.kind is ResourceKind.MODEL else Reason.DATASET_NOT_READY
        raise Refused(reason, f"`{record.name}` is still being uploaded; finish the upload first")


def _open(path: Path, offset: int) -> BinaryIO:
    """The last part of the path is never followed: nothing that replaced the file is read instead."""
    try:
        stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
    except OSError as error:
        raise Refused(Reason.FILE_NOT_FOUND, f"the file is not on the storage any more: {error.strerror}") from error
    stream.seek(offset)
    return stream

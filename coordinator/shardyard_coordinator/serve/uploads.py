"""Uploads: a header, then chunks; resumable by request id and the bytes that were committed.

Parts are written where the files belong, in a folder that nobody reads before its row is READY. A file's committed
bytes move in the store after its fsync; the row becomes READY when every file is whole, has the sha256 announced and,
for a model, loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from io import FileIO
from pathlib import Path

import google_crc32c
from sqlalchemy import Connection

from shardyard.v1 import model_service_pb2, transfer_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.domain.errors import FieldViolation, Refused, refused_fields
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import FileRecord, NewUpload, ResourceKind, ResourceRecord, ResourceState
from shardyard_coordinator.launch.claim import check_claim
from shardyard_coordinator.launch.protocols import StorageFailed, storage_cause
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.downloads import find
from shardyard_coordinator.serve.parts import Parts, in_time, raise_violations
from shardyard_coordinator.store import resources

INSPECT_FUNCTION = "shardyard_trainer.inspect:inspect_model"
INSPECT_S = 60.0
_NEXT_STEPS = {
    Cause.STORAGE_FULL: "try again when the operator has made space",
    Cause.STORAGE_NOT_WRITABLE: "ask the operator to make it writable, then try again",
    Cause.STORAGE_UNAVAILABLE: "ask the operator to bring it back, then try again",
}
_COMMIT_BYTES = 8 * 1024 * 1024

UploadMessage = model_service_pb2.CreateModelRequest
"""Or a CreateDatasetRequest, which has the same shape."""


class Uploads:
    """Receives uploads; one at a time of each resource."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._live: set[tuple[ResourceKind, str, str]] = set()

    async def receive(self, kind: ResourceKind, messages: AsyncIterator[UploadMessage], call: Call) -> ResourceRecord:
        """The resource, READY."""
        header = await self._header(messages)
        project = self._parts.name("project", header.parent).project
        with self._alone(kind, project, header.resource_id), _storage_errors():
            await asyncio.to_thread(check_claim, self._parts.claim)
            record, files = await self._begin(kind, project, header, call)
            if record.state is ResourceState.READY:
                return record
            order = {file.path: at for at, file in enumerate(header.files)}
            files.sort(key=lambda file: order[file.path])
            folder = Path(record.path)
            await self._take(record, folder, files, messages, call)
            await self._verify(record, folder, files, call)
            description = await self._inspect(record, folder, call) if kind is ResourceKind.MODEL else b""
            self._parts.trace.point("upload.verified")
            return await self._parts.store.write(lambda conn: _finish(conn, record, description), call.actor)

    async def delete(self, kind: ResourceKind, name: str, call: Call) -> None:
        """Removes a resource; Refused where a live job reads it or it is being uploaded at the moment."""
        record, _ = await find(self._parts, kind, name)
        with self._alone(kind, record.project, record.resource_id):
            await discard(self._parts, record, Path(record.path), call)

    @contextlib.contextmanager
    def _alone(self, kind: ResourceKind, project: str, resource_id: str) -> Iterator[None]:
        """Holds the resource; Refused UPLOAD_IN_PROGRESS where another call does."""
        key = (kind, project, resource_id)
        if key in self._live:
            text = f"`{resource_id}` is being uploaded or deleted by another call; wait for it, or choose another id"
            raise Refused(Reason.UPLOAD_IN_PROGRESS, text, retry_after_s=5.0)
        self._live.add(key)
        try:
            yield
        finally:
            self._live.discard(key)

    async def _header(self, messages: AsyncIterator[UploadMessage]) -> transfer_pb2.UploadHeader:
        first = await self._next(messages)
        if first is None or first.WhichOneof("message") != "header":
            text = "is missing; the first message of an upload is its header, then come chunks; send it first"
            raise refused_fields([FieldViolation("header", text)])
        return first.header

    async def _next(self, messages: AsyncIterator[UploadMessage]) -> UploadMessage | None:
        """The next message; None at the end."""
        try:
            async with asyncio.timeout(self._parts.limits.upload_idle_s):
                return await anext(messages, None)
        except TimeoutError:
            text = f"nothing arrived for {self._parts.limits.upload_idle_s:g} s; go on with the same request_id"
            raise Refused(Reason.DEADLINE_EXCEEDED, text) from None

    async def _begin(
        self, kind: ResourceKind, project: str, header: transfer_pb2.UploadHeader, call: Call
    ) -> tuple[ResourceRecord, list[FileRecord]]:
        """The row, new or of an earlier try; Refused where a quota, the disk or another resource is in the way."""
        parts, uid = self._parts, uuid.uuid4().hex
        total = sum(file.size_bytes for file in header.files)
        if total > (most := parts.limits.max_upload_bytes):
            raise _over_quota(f"{total:,} bytes; an upload has at most {most:,}; leave out what is not needed")
        free = (await asyncio.to_thread(shutil.disk_usage, parts.storage)).free
        new = NewUpload(
            kind=kind,
            project=project,
            resource_id=header.resource_id,
            uid=uid,
            path=str(parts.storage / kind.value / uid),
            display_name=header.display_name,
            request_id=header.request_id.lower(),
            files=tuple(FileRecord(file.path, file.size_bytes, file.sha256) for file in header.files),
        )
        now_us = parts.clock.now_us()

        def begin(conn: Connection) -> tuple[ResourceRecord, list[FileRecord]]:
            record = resources.begin_upload(conn, new, call.actor, now_us)
            files = resources.list_files(conn, record.uid)
            if record.state is not ResourceState.READY:
                self._check_quota(conn, record, total, free + sum(file.committed_bytes for file in files))
            return record, files

        return await parts.store.write(begin, call.actor)

    def _check_quota(self, conn: Connection, record: ResourceRecord, total: int, free: int) -> None:
        project, used = record.project, resources.held_bytes(conn, record.project, but=record.uid)
        room = max(self._parts.limits.max_project_upload_bytes - used, 0)
        if total > room:
            raise _over_quota(
                f"{total:,} bytes, but projects/{project} has room for {room:,}; delete what is not needed"
            )
        if total > free - 64 * 1024 * 1024:
            text = f"{total:,} bytes, but the storage has {free:,} free; ask the operator for space"
            raise Refused(Reason.STORAGE_FULL, text, retry_after_s=60.0)

    async def _take(
        self,
        record: ResourceRecord,
        folder: Path,
        files: list[FileRecord],
        messages: AsyncIterator[UploadMessage],
        call: Call,
    ) -> None:
        """Writes the chunks; whatever ends it, what arrived is committed."""
        committed = [file.committed_bytes for file in files]
        missing = record.size_bytes - sum(committed)
        await asyncio.to_thread(_prepare, folder, files)
        writer = _Writer(folder, files, committed)

        async def commit() -> None:
            for at in await asyncio.to_thread(writer.sync):
                path, size = files[at].path, committed[at]
                await self._parts.store.write(
                    lambda conn, path=path, size=size: resources.commit_part(conn, record.uid, path, size),  # type: ignore[misc]
                    call.actor,
                )
                self._parts.trace.point("upload.part")

        try:
            while missing:
                message = await self._next(messages)
                if message is None:
                    raise _ended_early(files, committed)
                if message.WhichOneof("message") == "header":
                    raise refused_fields(
                        [FieldViolation("header", "came twice; an upload has one, first; send chunks")]
                    )
                _check_chunk(message.chunk, files, committed, self._parts.limits.max_chunk_bytes)
                await asyncio.to_thread(writer.write, message.chunk)
                missing -= len(message.chunk.data)
                if writer.unsynced >= _COMMIT_BYTES:
                    await commit()
        finally:
            try:
                await asyncio.shield(commit())
            finally:
                await asyncio.to_thread(writer.close)

    async def _verify(self, record: ResourceRecord, folder: Path, files: list[FileRecord], call: Call) -> None:
        """Compares every sha256; a file that differs begins anew."""
        wrong = await asyncio.to_thread(_differing, folder, files)
        if not wrong:
            return
        for file in wrong:
            await asyncio.to_thread(os.truncate, folder / file.path, 0)
            await self._parts.store.write(
                lambda conn, path=file.path: resources.reset_part(conn, record.uid, path),  # type: ignore[misc]
                call.actor,
            )
        names = ", ".join(file.path for file in wrong[:5])
        text = f"the sha256 of {names} is not the one announced; send the file again with the same request_id"
        raise Refused(Reason.CHECKSUM_MISMATCH, text, metadata={"file": wrong[0].path})

    async def _inspect(self, record: ResourceRecord, folder: Path, call: Call) -> bytes:
        request = worker_pb2.InspectModelRequest(folder=str(folder))
        asked = self._parts.ask(INSPECT_FUNCTION, request.SerializeToString(), call, at_most_s=INSPECT_S)
        answer = await in_time(call, asked)
        result = worker_pb2.InspectModelResult.FromString(answer)
        try:
            raise_violations(result.violations)
        except Refused as refused:
            if refused.retry_after_s is None:
                await discard(self._parts, record, folder, call)
            raise
        return result.model.SerializeToString()


async def discard(parts: Parts, record: ResourceRecord, folder: Path, call: Call) -> None:
    """Removes a resource and its files: the intention first, so that a crash in between is finished by recovery."""
    await parts.store.write(
        lambda conn: resources.begin_delete(conn, record.kind, record.project, record.resource_id), call.actor
    )
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    parts.trace.point("delete.unlinked")
    await parts.store.write(lambda conn: resources.finish_delete(conn, record.uid), call.actor)


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """Turns what the storage answers into Refused STORAGE_FULL, STORAGE_NOT_WRITABLE or STORAGE_UNAVAILABLE."""
    try:
        yield
    except OSError as error:
        raise _storage_refusal(storage_cause(error), error.strerror or "its disk fails") from error
    except StorageFailed as failed:
        raise _storage_refusal(failed.cause, "it is not mounted") from failed


def _storage_refusal(cause: Cause, why: str) -> Refused:
    text = f"the storage cannot be written: {why}; {_NEXT_STEPS[cause]}"
    return Refused(Reason(cause.value), text, retry_after_s=60.0)


def _over_quota(text: str) -> Refused:
    violation = FieldViolation("header.files", text, Reason.QUOTA_EXCEEDED)
    return Refused(Reason.QUOTA_EXCEEDED, text, violations=[violation])


def _finish(conn: Connection, record: ResourceRecord, description: bytes) -> ResourceRecord:
    """READY; Refused MODEL_NOT_FOUND or DATASET_NOT_FOUND where a sweep has taken it for abandoned."""
    resources.get_resource(conn, record.kind, record.project, record.resource_id)
    return resources.finish_upload(conn, record.uid, description)


class _Writer:
    """Appends chunks to files; blocks. A call that was cancelled may still be writing when the next one comes."""

    def __init__(self, folder: Path, files: list[FileRecord], committed: list[int]) -> None:
        self._folder = folder
        self._files = files
        self._committed = committed
        self._open: FileIO | None = None
        self._at = -1
        self._touched: set[int] = set()
        self._lock = threading.Lock()
        self._closed = False
        self.unsynced = 0

    def write(self, chunk: transfer_pb2.Chunk) -> None:
        """Appends a checked chunk; nothing once it is closed."""
        with self._lock:
            if self._closed:
                return
            if self._at != chunk.file_index:
                self._sync_file()
                self._release()
                self._at = chunk.file_index
                path = self._folder / self._files[self._at].path
                # Unbuffered: what a full disk has refused is not tried again by a flush.
                self._open = open(path, "r+b", buffering=0)  # noqa: SIM115 - kept open over many chunks.
                self._open.seek(chunk.offset)
            assert self._open is not None
            rest = memoryview(chunk.data)
            while rest:
                rest = rest[self._open.write(rest) :]
            self._committed[self._at] += len(chunk.data)
            self._touched.add(self._at)
            self.unsynced += len(chunk.data)

    def sync(self) -> list[int]:
        """Makes what was written durable; the files that it was written to."""
        with self._lock:
            self._sync_file()
            touched, self._touched, self.unsynced = sorted(self._touched), set(), 0
            return touched

    def close(self) -> None:
        """Lets go of the open file; nothing is written from here on."""
        with self._lock:
            self._closed = True
            self._release()

    def _release(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _sync_file(self) -> None:
        if self._open is not None:
            os.fsync(self._open.fileno())


def _prepare(folder: Path, files: list[FileRecord]) -> None:
    """Makes every file, cut to what was committed: what lies beyond may not have reached the disk whole."""
    folder.mkdir(exist_ok=True)  # Without its parents: they are there, or the storage is not.
    for file in files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        os.ftruncate(descriptor, file.committed_bytes)
        os.close(descriptor)


def _check_chunk(chunk: transfer_pb2.Chunk, files: list[FileRecord], committed: list[int], most: int) -> None:
    if chunk.file_index >= len(files):
        text = f"`{chunk.file_index}` is not one of the header's files 0 to {len(files) - 1}; correct it"
        raise refused_fields([FieldViolation("chunk.file_index", text)])
    if len(chunk.data) > most:
        text = f"{len(chunk.data):,} bytes; a chunk has at most {most:,} (1 MiB); send smaller ones"
        raise refused_fields([FieldViolation("chunk.data", text, Reason.CHUNK_TOO_LARGE)])
    file, have = files[chunk.file_index], committed[chunk.file_index]
    if chunk.offset != have:
        text = f"`{chunk.offset}`: a chunk begins where the last one ended, at {have} of {file.path}; go on from there"
        raise refused_fields([FieldViolation("chunk.offset", text)])
    if have + len(chunk.data) > file.size_bytes:
        text = (
            f"{have + len(chunk.data):,} bytes of {file.path}, announced with {file.size_bytes:,}; correct the header"
        )
        raise refused_fields([FieldViolation("chunk.data", text)])
    if google_crc32c.value(chunk.data) != chunk.crc32c:
        text = f"the crc32c of the chunk at {chunk.offset} of {file.path} is not that of its data; send it again"
        raise Refused(Reason.CRC_MISMATCH, text, metadata={"offset": str(chunk.offset), "file": file.path})


def _ended_early(files: list[FileRecord], committed: list[int]) -> Refused:
    found = [
        FieldViolation(
            f"files[{at}]",
            f"{size} of {file.size_bytes} bytes of {file.path} arrived; send the rest with the same request_id",
        )
        for at, (file, size) in enumerate(zip(files, committed, strict=True))
        if size < file.size_bytes
    ]
    return refused_fields(found)


def _differing(folder: Path, files: list[FileRecord]) -> list[FileRecord]:
    wrong = []
    for file in files:
        with open(folder / file.path, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
                wrong.append(file)
    for each in {folder, *(path for file in files for path in (folder / file.path).parents if folder in path.parents)}:
        _sync_folder(each)
    return wrong


def _sync_folder(folder: Path) -> None:
    """The entries of the files are as durable as their bytes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

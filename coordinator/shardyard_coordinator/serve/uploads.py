"""Uploads: a header, then chunks; resumable by request id and the bytes that were committed.

A header alone makes nothing: the row and its folder are made when the first bytes arrive. Quotas count arrived bytes,
not announced ones. Parts that contradict the header are refused, and nothing of them is kept.

Parts are written where the files belong, in a folder that is not read before its row is READY. A file's committed
bytes move in the store after its fsync; the row becomes READY when every file is whole, has the sha256 announced and,
for a model, loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

from sqlalchemy import Connection

from shardyard.v1 import model_service_pb2, transfer_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.errors import FieldViolation, Refused, refused_fields
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import FileRecord, NewUpload, ResourceKind, ResourceRecord, ResourceState
from shardyard_coordinator.launch.claim import check_claim
from shardyard_coordinator.seams import Actor
from shardyard_coordinator.serve.arriving import Arriving, Writer, cut, differing, make_empty, mismatch
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.downloads import find
from shardyard_coordinator.serve.inspection import Subject, still_looking
from shardyard_coordinator.serve.parts import Parts, in_time, raise_violations
from shardyard_coordinator.serve.places import Place, UploadPlaces
from shardyard_coordinator.serve.shared import Shared
from shardyard_coordinator.serve.storage_errors import storage_errors
from shardyard_coordinator.store import resources

INSPECT_FUNCTION = "shardyard_trainer.answering.inspect:inspect_model"
_SUBJECT = Subject("files", "the model", Reason.MODEL_INVALID)
_COMMIT_BYTES = 8 * 1024 * 1024
SPARE_BYTES = 64 * 1024 * 1024

UploadMessage = model_service_pb2.CreateModelRequest
"""Or a CreateDatasetRequest, which has the same shape."""


class Uploads:
    """Receives uploads, one at a time for each resource."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._places = UploadPlaces(parts.limits)
        self._live: set[tuple[ResourceKind, str, str]] = set()
        self._inspections: Shared[bytes] = Shared()

    async def receive(self, kind: ResourceKind, messages: AsyncIterator[UploadMessage], call: Call) -> ResourceRecord:
        """Returns the resource, READY. Before the first bytes arrive nothing of an upload is kept or reserved."""
        with contextlib.ExitStack() as held:
            place = held.enter_context(self._places.take(messages, call.principal))
            header = _header(await place.next())
            project = self._parts.name("project", header.parent).project
            with self._alone(kind, project, header.resource_id), storage_errors():
                record, files = await self._arrive(kind, project, header, place, call)
                if record.state is ResourceState.READY:
                    return record
                held.close()  # The inspection of a model may have to wait: others may send meanwhile.
                folder = Path(record.path)
                description = await self._inspect(record, folder, files, call) if kind is ResourceKind.MODEL else b""
                self._parts.trace.point("upload.verified")
                now_us = self._parts.clock.now_us()
                return await self._parts.store.write(
                    lambda conn: _finish(conn, record, description, call.actor, now_us), call.actor
                )

    async def _arrive(
        self,
        kind: ResourceKind,
        project: str,
        header: transfer_pb2.UploadHeader,
        place: Place[UploadMessage],
        call: Call,
    ) -> tuple[ResourceRecord, list[FileRecord]]:
        """The row and its files, complete and as announced; or the READY row of an earlier try."""
        await asyncio.to_thread(check_claim, self._parts.claim)
        new = await asyncio.to_thread(self._announced, kind, project, header)
        known, files = await self._look(new, call)
        if known is not None and known.state is ResourceState.READY:
            return known, files
        arriving = Arriving(files)
        first = await self._chunk(arriving, place)
        record = known or await self._begin(new, call)
        folder = Path(record.path)
        # Without its parents, which exist if the storage is mounted. An earlier try may not have made the folder.
        await asyncio.to_thread(folder.mkdir, mode=0o700, exist_ok=True)
        if first is not None:
            await self._take(record, folder, arriving, self._chunks(first, arriving, place), call)
        await self._verify(record, folder, files, call)
        return record, files

    async def delete(self, kind: ResourceKind, name: str, call: Call) -> None:
        """Removes a resource; Refused if a live job reads it or it is being uploaded at the moment."""
        record = await find(self._parts, kind, name)
        with self._alone(kind, record.project, record.resource_id):
            await discard(self._parts, record, Path(record.path), call)

    @contextlib.contextmanager
    def _alone(self, kind: ResourceKind, project: str, resource_id: str) -> Iterator[None]:
        """Holds the resource; Refused UPLOAD_IN_PROGRESS if another call does."""
        key = (kind, project, resource_id)
        if key in self._live:
            text = f"`{resource_id}` is being uploaded or deleted by another call; wait for it, or choose another id"
            raise Refused(Reason.UPLOAD_IN_PROGRESS, text, retry_after_s=5.0)
        self._live.add(key)
        try:
            yield
        finally:
            self._live.discard(key)

    def _announced(self, kind: ResourceKind, project: str, header: transfer_pb2.UploadHeader) -> NewUpload:
        """The upload that the header announces; Refused QUOTA_EXCEEDED if it is larger than any upload may be."""
        uid = uuid.uuid4().hex
        total = sum(file.size_bytes for file in header.files)
        if total > (most := self._parts.limits.max_upload_bytes):
            raise _over_quota(f"{total:,} bytes; an upload has at most {most:,}; leave out what is not needed")
        return NewUpload(
            kind=kind,
            project=project,
            resource_id=header.resource_id,
            uid=uid,
            path=str(self._parts.storage / kind.value / uid),
            display_name=header.display_name,
            request_id=header.request_id.lower(),
            files=tuple(FileRecord(file.path, file.size_bytes, file.sha256) for file in header.files),
        )

    async def _look(self, new: NewUpload, call: Call) -> tuple[ResourceRecord | None, list[FileRecord]]:
        """The row of an earlier try, if there is one, and the files in the header's order, with what has arrived.

        Refused if a quota, the disk or another resource prevents it.
        """
        free = (await asyncio.to_thread(shutil.disk_usage, self._parts.storage)).free

        def look(conn: Connection) -> tuple[ResourceRecord | None, list[FileRecord]]:
            known = resources.find_upload(conn, new, call.actor)
            if known is None:
                self._check_room(conn, new, free)
                return None, list(new.files)
            arrived = {file.path: file for file in resources.list_files(conn, known.uid)}
            files = [arrived[file.path] for file in new.files]
            if known.state is not ResourceState.READY:
                self._check_room(conn, new, free + sum(file.committed_bytes for file in files), known.uid)
            return known, files

        return await self._parts.store.read(look)

    async def _begin(self, new: NewUpload, call: Call) -> ResourceRecord:
        """Makes the new row; Refused if a quota or another resource prevents it by now."""
        parts = self._parts
        free = (await asyncio.to_thread(shutil.disk_usage, parts.storage)).free
        now_us = parts.clock.now_us()

        def begin(conn: Connection) -> ResourceRecord:
            record = resources.begin_upload(conn, new, call.actor, now_us)
            self._check_room(conn, new, free, record.uid)
            return record

        return await parts.store.write(begin, call.actor)

    def _check_room(self, conn: Connection, new: NewUpload, free: int, uid: str = "") -> None:
        """Refused QUOTA_EXCEEDED or STORAGE_FULL if the upload cannot fit. `uid`: of its row, once it has one."""
        limits, project = self._parts.limits, new.project
        total = sum(file.size_bytes for file in new.files)
        room = max(limits.max_project_upload_bytes - resources.held_bytes(conn, project, but=uid), 0)
        if total > room:
            raise _over_quota(
                f"{total:,} bytes, but projects/{project} has room for {room:,}; delete what is not needed"
            )
        room = max(limits.max_project_files - resources.num_files(conn, project, but=uid), 0)
        if len(new.files) > room:
            raise _over_quota(
                f"{len(new.files):,} files, but projects/{project} has room for {room:,}; join small files into fewer, "
                "or delete what is not needed"
            )
        if total > free - SPARE_BYTES:
            text = f"{total:,} bytes, but the storage has {free:,} free; ask the operator for space"
            raise Refused(Reason.STORAGE_FULL, text, retry_after_s=60.0)

    async def _chunk(self, arriving: Arriving, place: Place[UploadMessage]) -> transfer_pb2.Chunk | None:
        """The next chunk, checked; None at the end of a complete upload."""
        message = await place.next()
        if message is None:
            if arriving.missing:
                raise arriving.ended_early()
            return None
        if message.WhichOneof("message") == "header":
            raise mismatch("header", "came twice; an upload has one, first; send chunks")
        arriving.check(message.chunk, self._parts.limits.max_chunk_bytes)
        place.moved(len(message.chunk.data))
        return message.chunk

    async def _chunks(
        self,
        first: transfer_pb2.Chunk,
        arriving: Arriving,
        place: Place[UploadMessage],
    ) -> AsyncIterator[transfer_pb2.Chunk]:
        chunk: transfer_pb2.Chunk | None = first
        while chunk is not None:
            yield chunk
            chunk = await self._chunk(arriving, place)

    async def _take(
        self,
        record: ResourceRecord,
        folder: Path,
        arriving: Arriving,
        chunks: AsyncIterator[transfer_pb2.Chunk],
        call: Call,
    ) -> None:
        """Writes the chunks; commits what has arrived, however the upload ends."""
        writer = Writer(folder, arriving)

        async def commit() -> None:
            if sizes := await asyncio.to_thread(writer.sync):
                try:
                    await self._parts.store.write(lambda conn: self._commit(conn, record, sizes), call.actor)
                except Refused as refused:
                    if refused.reason is Reason.QUOTA_EXCEEDED:
                        await self._cut_back(record, folder, sizes)
                    raise
                self._parts.trace.point("upload.part")

        try:
            async for chunk in chunks:
                await asyncio.to_thread(writer.write, chunk)
                if writer.unsynced >= _COMMIT_BYTES:
                    await commit()
        finally:
            try:
                await asyncio.shield(commit())
            finally:
                await asyncio.to_thread(writer.close)

    def _commit(self, conn: Connection, record: ResourceRecord, sizes: Mapping[str, int]) -> None:
        """Records the bytes on the disk; Refused QUOTA_EXCEEDED if others have taken the room meanwhile."""
        resources.commit_parts(conn, record.uid, sizes)
        if (held := resources.held_bytes(conn, record.project)) > (most := self._parts.limits.max_project_upload_bytes):
            raise _over_quota(
                f"projects/{record.project} would hold {held:,} bytes, at most {most:,} are allowed; delete what is "
                "not needed, then continue with the same request_id"
            )

    async def _cut_back(self, record: ResourceRecord, folder: Path, sizes: Mapping[str, int]) -> None:
        files = await self._parts.store.read(lambda conn: resources.list_files(conn, record.uid))
        await asyncio.to_thread(cut, folder, [file for file in files if file.path in sizes])

    async def _verify(self, record: ResourceRecord, folder: Path, files: Sequence[FileRecord], call: Call) -> None:
        """Compares every sha256; a file that differs must be sent again."""
        await asyncio.to_thread(make_empty, folder, files)
        wrong = [
            dataclasses.replace(file, committed_bytes=0) for file in await asyncio.to_thread(differing, folder, files)
        ]
        if not wrong:
            return
        await asyncio.to_thread(cut, folder, wrong)
        await self._parts.store.write(
            lambda conn: resources.reset_parts(conn, record.uid, [file.path for file in wrong]), call.actor
        )
        names = ", ".join(file.path for file in wrong[:5])
        text = f"the sha256 of {names} is not the one announced; send the file again with the same request_id"
        raise Refused(Reason.CHECKSUM_MISMATCH, text, metadata={"file": wrong[0].path})

    async def _inspect(self, record: ResourceRecord, folder: Path, files: list[FileRecord], call: Call) -> bytes:
        request = worker_pb2.InspectModelRequest(folder=str(folder), cache_dir=self._parts.cache_dir)
        content = "".join(sorted(f"{file.path} {file.sha256}\n" for file in files))
        key = hashlib.sha256(f"{INSPECT_FUNCTION}\n{content}".encode("utf-8", "surrogateescape")).digest()
        asked = self._inspections.get(
            key + record.uid.encode(),
            lambda: self._parts.questions.inspect(
                INSPECT_FUNCTION, request.SerializeToString(), call, subject=_SUBJECT, key=key
            ),
        )
        try:
            answer = await in_time(call, asked, late=lambda: still_looking("the model"))
            result = worker_pb2.InspectModelResult.FromString(answer)
            raise_violations(result.violations)
        except Refused as refused:
            if refused.retry_after_s is None:
                await discard(self._parts, record, folder, call)
            raise
        return result.model.SerializeToString()


async def discard(parts: Parts, record: ResourceRecord, folder: Path, call: Call) -> None:
    """Removes a resource and its files: the intention first, so that a crash in between is finished by recovery."""
    actor, now_us = call.actor, parts.clock.now_us()
    await parts.store.write(
        lambda conn: resources.begin_delete(
            conn, record.kind, record.project, record.resource_id, actor=actor, now_us=now_us
        ),
        actor,
    )
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    parts.trace.point("delete.unlinked")
    await parts.store.write(lambda conn: resources.finish_delete(conn, record.uid), actor)


def _over_quota(text: str) -> Refused:
    violation = FieldViolation("header.files", text, Reason.QUOTA_EXCEEDED)
    return Refused(Reason.QUOTA_EXCEEDED, text, violations=[violation])


def _finish(conn: Connection, record: ResourceRecord, description: bytes, actor: Actor, now_us: int) -> ResourceRecord:
    """READY; Refused MODEL_NOT_FOUND or DATASET_NOT_FOUND if a sweep has taken it for abandoned."""
    resources.get_resource(conn, record.kind, record.project, record.resource_id)
    return resources.finish_upload(conn, record.uid, description, actor=actor, now_us=now_us)


def _header(first: UploadMessage | None) -> transfer_pb2.UploadHeader:
    if first is None or first.WhichOneof("message") != "header":
        text = "is missing; the first message of an upload is its header, then come chunks; send it first"
        raise refused_fields([FieldViolation("header", text)])
    return first.header

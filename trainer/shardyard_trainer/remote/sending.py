"""One file becomes one object: its sha256 is compared before it is sent, and the store's ETag afterwards."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shardyard_trainer.data.errors import SpecError, shorten
from shardyard_trainer.remote.download import OutOfTime
from shardyard_trainer.remote.faults import EXISTS, UNREACHABLE, ObjectTaken, is_conflict
from shardyard_trainer.remote.notes import LargeFile, Notes
from shardyard_trainer.remote.store import CHUNK_BYTES, Object, Store
from shardyard_trainer.remote.workers import all_of

PART_BYTES = 16 * 2**20

# S3 takes 10,000 parts.
_MOST_PARTS = 9_000
_PARTS_AT_ONCE = 4
_MD5 = re.compile(r"[0-9a-f]{32}")


class LocalFile(NamedTuple):
    """A file of the model, the object that it becomes, and what it was registered with."""

    path: Path
    key: str
    size: int
    sha256: str
    least_part_bytes: int = PART_BYTES

    @property
    def part_bytes(self) -> int:
        """Bytes of each of its parts but the last."""
        return max(self.least_part_bytes, -(-self.size // _MOST_PARTS))


class Sending:
    """Sends files into one bucket; `is_over` says when the call's time is over."""

    def __init__(self, store: Store, bucket: str, notes: Notes, *, field: str, is_over: Callable[[], bool]) -> None:
        self._store = store
        self._bucket = bucket
        self._notes = notes
        self._field = field
        self._is_over = is_over

    async def send(self, file: LocalFile) -> None:
        """Raises OutOfTime; SpecError OBJECT_EXISTS, MODEL_CHANGED; errors of the object store and of this disk."""
        try:
            if file.size <= file.least_part_bytes:
                await self._send_whole(file)
            else:
                await self._send_parts(file)
        except ObjectTaken:
            # Perhaps by a request of ours whose answer was lost.
            found = await self._store.look(self._bucket, file.key)
            if found is None:
                raise self._later(file, "it is being written by others, too") from None
            await self.compare(file, found)

    async def compare(self, file: LocalFile, found: Object) -> None:
        """Raises SpecError OBJECT_EXISTS unless the object has the bytes of the file."""
        if self._notes.etags.get(file.key) == found.etag and found.size == file.size:
            return
        if found.size != file.size or not await self._is_same(file, found):
            raise self._exists(file.key)
        if file.key in self._notes.large:
            await self._forget(file.key)
        self._notes.sent(file.key, found.etag)

    async def send_bytes(self, key: str, data: bytes) -> None:
        """An object of these bytes. Raises SpecError OBJECT_EXISTS; errors of the object store."""
        try:
            await self._store.put(self._bucket, key, data)
        except ObjectTaken:
            found = await self._store.look(self._bucket, key)
            wanted = len(data), hashlib.sha256(data).hexdigest()
            if found is None or (found.size, await self._sha256(found)) != wanted:
                raise self._exists(key) from None

    async def _sha256(self, found: Object) -> str:
        total = hashlib.sha256()
        async with self._store.read(self._bucket, found, 0) as (_, stream, _):
            while chunk := await stream.read(CHUNK_BYTES):
                total.update(chunk)
        return total.hexdigest()

    def _exists(self, key: str) -> SpecError:
        text = (
            f"`s3://{self._bucket}/{shorten(key)}` is there already with other bytes, and is not replaced; choose "
            "another address, or remove it in the object store"
        )
        return SpecError(self._field, EXISTS, text, {"object": key})

    async def _is_same(self, file: LocalFile, found: Object) -> bool:
        md5s = await asyncio.to_thread(self._md5s, file)
        if found.etag in (md5s[0] if len(md5s) == 1 else "", _etag_of(md5s)):
            return True
        # The ETag of an encrypted object, or of one in other parts, says nothing of its bytes.
        return await self._sha256(found) == file.sha256

    async def _send_whole(self, file: LocalFile) -> None:
        data = await asyncio.to_thread(self._read_whole, file)
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        written = await self._store.put(self._bucket, file.key, data)
        if written.is_md5 and _MD5.fullmatch(written.etag) and written.etag != md5:
            raise self._later(file, "the store says that it has other bytes than were sent")
        self._notes.sent(file.key, written.etag)

    async def _send_parts(self, file: LocalFile) -> None:
        large = self._notes.large.get(file.key)
        if large is None:
            large = LargeFile(await asyncio.to_thread(self._md5s, file))
            self._notes.large[file.key] = large
            self._notes.save()
        there = await self._parts_there(file, large)
        missing = [number for number in range(len(large.md5s), 0, -1) if number not in there]
        etags = {number: each.etag for number, each in there.items()}

        async def work() -> None:
            while missing:
                number = missing.pop()
                data = await asyncio.to_thread(self._read_part, file, number, large.md5s[number - 1])
                written = await self._store.put_part(self._bucket, file.key, large.upload, number, data)
                if written.is_md5 and _MD5.fullmatch(written.etag) and written.etag != large.md5s[number - 1]:
                    raise self._later(file, "the store says that it has other bytes than were sent")
                etags[number] = large.etags[str(number)] = written.etag
                if self._is_over():
                    return

        try:
            await all_of(work, min(_PARTS_AT_ONCE, len(missing)))
        finally:
            self._notes.save()
        if len(etags) < len(large.md5s):
            raise OutOfTime
        try:
            written = await self._store.put_together(self._bucket, file.key, large.upload, etags)
        except OSError as error:
            if not is_conflict(error):
                raise
            # S3 does not put these parts together any more.
            await self._forget(file.key)
            raise self._later(file, "others write it at the same time") from None
        is_md5 = written.is_md5 and all(etags[at] == md5 for at, md5 in enumerate(large.md5s, 1))
        if is_md5 and re.fullmatch(r"[0-9a-f]{32}-[0-9]+", written.etag) and written.etag != _etag_of(large.md5s):
            raise self._later(file, "the store has put its parts together otherwise")
        self._notes.sent(file.key, written.etag)

    async def _parts_there(self, file: LocalFile, large: LargeFile) -> dict[int, Object]:
        """The parts that were sent before; a new upload, if there is none."""
        found = await self._store.parts(self._bucket, file.key, large.upload) if large.upload else None
        if found is None:
            large.etags = {}
            large.upload = await self._store.begin_parts(self._bucket, file.key)
            self._notes.save()
            return {}
        return {
            number: each
            for number, each in found.items()
            if number <= len(large.md5s)
            and each.size == min(file.part_bytes, file.size - (number - 1) * file.part_bytes)
            and each.etag in (large.md5s[number - 1], large.etags.get(str(number)))
        }

    async def abort(self) -> None:
        """Removes the parts of all files that were not put together. Raises errors of the object store."""
        for key in list(self._notes.large):
            await self._forget(key)

    async def _forget(self, key: str) -> None:
        if upload := self._notes.large[key].upload:
            await self._store.abort_parts(self._bucket, key, upload)
        del self._notes.large[key]
        self._notes.save()

    def _md5s(self, file: LocalFile) -> list[str]:
        """The MD5 of each part, of a file that has its sha256. Raises SpecError MODEL_CHANGED."""
        total, md5s = hashlib.sha256(), []
        with self._open(file) as source:
            for part in _parts(source, file):
                total.update(part)
                md5s.append(hashlib.md5(part, usedforsecurity=False).hexdigest())
        if total.hexdigest() != file.sha256:
            raise self._damaged(file, "does not have the sha256 that it was registered with")
        return md5s

    def _read_whole(self, file: LocalFile) -> bytes:
        with self._open(file) as source:
            data = source.read(file.size + 1)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise self._damaged(file, "does not have the sha256 that it was registered with")
        return data

    def _read_part(self, file: LocalFile, number: int, md5: str) -> bytes:
        with self._open(file) as source:
            source.seek((number - 1) * file.part_bytes)
            data = source.read(file.part_bytes)
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
            raise self._damaged(file, "has changed while it was being sent")
        return data

    def _open(self, file: LocalFile) -> BinaryIO:
        try:
            source = os.fdopen(os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
        except OSError as error:
            raise self._damaged(file, f"cannot be read ({error.strerror})") from None
        status = os.fstat(source.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size != file.size:
            source.close()
            raise self._damaged(file, f"has {status.st_size:,} bytes, it was registered with {file.size:,}")
        return source

    def _damaged(self, file: LocalFile, how: str) -> SpecError:
        text = f"the service's copy is damaged: {file.path.name} {how}; restore the file, or export or upload it again"
        return SpecError(self._field, "MODEL_CHANGED", text, {"file": file.path.name})

    def _later(self, file: LocalFile, why: str) -> SpecError:
        text = f"`s3://{self._bucket}/{shorten(file.key)}` cannot be written: {why}; try again"
        return SpecError(self._field, UNREACHABLE, text)


def _parts(source: BinaryIO, file: LocalFile) -> Iterator[bytes]:
    part = source.read(file.part_bytes)
    yield part  # An empty file has one part, too.
    while part := source.read(file.part_bytes):
        yield part


def _etag_of(md5s: list[str]) -> str:
    """The ETag that S3 gives to an object in parts."""
    whole = hashlib.md5(b"".join(map(bytes.fromhex, md5s)), usedforsecurity=False).hexdigest()
    return f"{whole}-{len(md5s)}"

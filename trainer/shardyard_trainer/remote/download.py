"""One object becomes one file: in one piece or continued, compared with its size and its checksum."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from shardyard_trainer.data.errors import SpecError, shorten
from shardyard_trainer.remote.faults import UNREACHABLE, ObjectChanged, is_passing
from shardyard_trainer.remote.store import CHUNK_BYTES, Object, Store

_MD5 = re.compile(r"[0-9a-f]{32}")
_ATTEMPTS = 6
_FIRST_PAUSE_S = 0.2


class OutOfTime(Exception):
    """The call's time is over; what is here is kept for the next one."""


class Download:
    """The bytes of one object on their way into `blobs`; `name` is that of the object's bytes."""

    def __init__(self, blobs: Path, name: str, bucket: str, wanted: Object, *, field: str) -> None:
        self._kept = blobs / f".{name}.kept"
        self._part = blobs / f".{name}.part"
        self._bucket = bucket
        self._wanted = wanted
        self._field = field
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._sha256 = hashlib.sha256()
        self._at = 0

    async def fetch(self, store: Store, is_over: Callable[[], bool], keep: Callable[[Path, str], None]) -> None:
        """Hands the whole file and its sha256 to `keep`, while no other call can open it.

        Raises OutOfTime, ObjectChanged; SpecError if the bytes are not those that the store announced; OSError of this
        disk; errors of the object store, after several attempts.
        """
        with self._open() as file:
            for attempt in range(_ATTEMPTS):
                try:
                    is_md5 = await self._read_on(store, file, is_over)
                except ObjectChanged:
                    raise
                except _Broken as broken:
                    if attempt + 1 == _ATTEMPTS or not is_passing(broken.error):
                        raise broken.error from broken.error.__cause__
                    await asyncio.sleep(_FIRST_PAUSE_S * 2**attempt)
                    continue
                if self._is_whole(is_md5=is_md5):
                    file.flush()
                    os.fsync(file.fileno())
                    keep(self._part, self._sha256.hexdigest())
                    return
                self._begin_again(file)
        text = (
            f"`{shorten(self._wanted.key)}` arrives damaged again and again: its bytes are not those of its ETag "
            f"{shorten(self._wanted.etag)}; store the object again"
        )
        raise SpecError(self._field, "DATA_INVALID", text)

    def _open(self) -> BinaryIO:
        """The file to continue, or a new one. What a process left that did not end in good order is not trusted."""
        is_continued = self._kept.exists()
        if is_continued:
            self._kept.replace(self._part)
        file = os.fdopen(os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file of a call that ended in between has its final name, and is not ours to write.
            is_ours = self._part.stat().st_ino == os.fstat(file.fileno()).st_ino
        except OSError:
            is_ours = False  # Another call fetches it just now.
        if not is_ours:
            file.close()
            raise OutOfTime
        if not is_continued:
            file.truncate()
        while chunk := file.read(CHUNK_BYTES):
            self._count(chunk)
        return file

    async def _read_on(self, store: Store, file: BinaryIO, is_over: Callable[[], bool]) -> bool:
        """Reads to the end; whether the ETag is the MD5 of the bytes. Raises _Broken, with what the store failed at."""
        is_md5 = True
        if self._at == self._wanted.size and self._at:
            return is_md5
        try:
            async with store.read(self._bucket, self._wanted, self._at) as (at, stream, is_md5):
                if at != self._at:
                    self._begin_again(file)
                while chunk := await _chunk(stream):
                    if self._at + len(chunk) > self._wanted.size:
                        raise ObjectChanged(self._wanted.key)
                    file.write(chunk)
                    self._count(chunk)
                    if is_over() and self._at < self._wanted.size:
                        self._keep(file)
        except (ObjectChanged, OutOfTime, _Broken):
            raise
        except Exception as error:  # edge: what aiobotocore and aiohttp raise is not one family.
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise _Broken(error) from None
        if self._at < self._wanted.size:
            raise _Broken(ConnectionError("the object ended early"))
        return is_md5

    def _is_whole(self, *, is_md5: bool) -> bool:
        # Of an object that was stored in parts the ETag is no MD5 of its bytes, nor of one that KMS encrypts.
        etag = self._wanted.etag
        return not (is_md5 and _MD5.fullmatch(etag)) or self._md5.hexdigest() == etag

    def _keep(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        self._part.replace(self._kept)
        raise OutOfTime

    def _begin_again(self, file: BinaryIO) -> None:
        file.seek(0)
        file.truncate()
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._sha256 = hashlib.sha256()
        self._at = 0

    def _count(self, chunk: bytes) -> None:
        self._md5.update(chunk)
        self._sha256.update(chunk)
        self._at += len(chunk)


class _Broken(Exception):
    """The store failed a request, or broke an answer off."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(UNREACHABLE)
        self.error = error


async def _chunk(stream: Any) -> bytes:
    try:
        return bytes(await stream.read(CHUNK_BYTES))
    except Exception as error:  # edge: as above; an error of the network is not one of this disk.
        raise _Broken(error) from None

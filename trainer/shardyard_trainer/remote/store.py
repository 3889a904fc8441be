"""An S3 object store, as much of it as copies need: look, list, read. Through s3fs, the fsspec of S3."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from shardyard_trainer.remote.faults import ObjectChanged, is_changed, is_missing
from shardyard_trainer.remote.secrets import Keys

CHUNK_BYTES = 2**20

_PAGE = 1000
_CONNECT_S = 10
_SILENT_S = 30
_ATTEMPTS = 4
# Not S3's own, and only the keys that the operator has named: neither this machine's, nor those of its account.
_NO_OTHER_KEYS = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Object(NamedTuple):
    """An object as the store describes it; the ETag changes with its bytes."""

    key: str
    size: int
    etag: str


class Store:
    """One session with an object store; use `session`."""

    def __init__(self, files: Any) -> None:
        self._files = files

    async def look(self, bucket: str, key: str) -> Object | None:
        """The object of just this key; None if there is none, or nothing may be said about it."""
        try:
            found = await self._files._call_s3("head_object", Bucket=bucket, Key=key)
        except OSError as error:
            # Without the right to list, S3 says 403 of an object that is not there.
            if is_missing(error) or isinstance(error, PermissionError):
                return None
            raise
        return Object(key, int(found["ContentLength"]), _plain(found["ETag"]))

    async def pages(self, bucket: str, prefix: str) -> AsyncIterator[list[Object]]:
        """The objects below a prefix, at most a thousand at a time."""
        token: dict[str, str] = {}
        while True:
            found = await self._files._call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=_PAGE, **token)
            yield [Object(each["Key"], int(each["Size"]), _plain(each["ETag"])) for each in found.get("Contents", ())]
            if not found.get("IsTruncated"):
                return
            token = {"ContinuationToken": found["NextContinuationToken"]}

    @asynccontextmanager
    async def read(self, bucket: str, wanted: Object, begin: int) -> AsyncIterator[tuple[int, Any, bool]]:
        """(offset, stream, whether the ETag is the MD5): the object's bytes from `begin`, or from 0 if the store
        does not do parts. Raises ObjectChanged if it is another object by now.
        """
        part = {"Range": f"bytes={begin}-"} if begin else {}
        try:
            answer = await self._files._call_s3(
                "get_object", Bucket=bucket, Key=wanted.key, IfMatch=f'"{wanted.etag}"', **part
            )
        except OSError as error:
            if is_changed(error) or is_missing(error):
                raise ObjectChanged(wanted.key) from error
            raise
        async with answer["Body"] as stream:
            if _plain(answer["ETag"]) != wanted.etag:
                raise ObjectChanged(wanted.key)
            at = begin if answer.get("ContentRange") else 0
            yield at, stream, not str(answer.get("ServerSideEncryption", "")).startswith("aws:")


@asynccontextmanager
async def session(*, endpoint: str, region: str, keys: Keys | None) -> AsyncIterator[Store]:
    """A session with the keys; None: requests are not signed. An empty endpoint is Amazon's."""
    os.environ.update(_NO_OTHER_KEYS)
    os.environ.pop("S3FS_LOGGING_LEVEL", None)  # Its log has the requests.
    from s3fs import S3FileSystem  # Of the extra `s3`, and a second to import.

    files = S3FileSystem(
        asynchronous=True,
        skip_instance_cache=True,
        use_listings_cache=False,
        anon=keys is None,
        endpoint_url=endpoint or None,
        client_kwargs={"region_name": region or "us-east-1"},
        config_kwargs={
            "connect_timeout": _CONNECT_S,
            "read_timeout": _SILENT_S,
            "retries": {"mode": "standard", "max_attempts": _ATTEMPTS},
        },
        **({} if keys is None else keys._asdict()),
    )
    client = await files.set_session()
    try:
        yield Store(files)
    finally:
        await client.close()


def _plain(etag: str) -> str:
    return etag.strip().strip('"')

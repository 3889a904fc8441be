"""An S3 object store, as much of it as copies need: look, list, read, write. Through s3fs, the fsspec of S3."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from shardyard_trainer.remote.faults import (
    ObjectChanged,
    ObjectTaken,
    is_changed,
    is_missing,
    is_no_upload,
    is_not_offered,
)
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


class Written(NamedTuple):
    """The ETag of an object or part that was written, and whether it should be the MD5 of the bytes."""

    etag: str
    is_md5: bool


class Store:
    """One session with an object store; use `session`."""

    def __init__(self, files: Any) -> None:
        self._files = files
        # Not every store offers it: then only a look beforehand keeps from replacing an object.
        self._only_new: Mapping[str, str] = {"IfNoneMatch": "*"}

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
            yield at, stream, _has_md5(answer)

    async def put(self, bucket: str, key: str, data: bytes) -> Written:
        """Writes an object in one piece. The store compares the bytes with their MD5. Raises ObjectTaken."""
        return _written(await self._call_new("put_object", Bucket=bucket, Key=key, Body=data, ContentMD5=_md5(data)))

    async def begin_parts(self, bucket: str, key: str) -> str:
        """Begins an object in parts; returns the upload's id."""
        return str((await self._files._call_s3("create_multipart_upload", Bucket=bucket, Key=key))["UploadId"])

    async def put_part(self, bucket: str, key: str, upload: str, number: int, data: bytes) -> Written:
        """Writes one part, counted from 1; the store compares it with its MD5."""
        answer = await self._files._call_s3(
            "upload_part",
            Bucket=bucket,
            Key=key,
            UploadId=upload,
            PartNumber=number,
            Body=data,
            ContentMD5=_md5(data),
        )
        return _written(answer)

    async def parts(self, bucket: str, key: str, upload: str) -> dict[int, Object] | None:
        """The parts that are there, by number; None if there is no such upload any more."""
        found: dict[int, Object] = {}
        after: dict[str, str] = {}
        while True:
            try:
                page = await self._files._call_s3("list_parts", Bucket=bucket, Key=key, UploadId=upload, **after)
            except OSError as error:
                if is_no_upload(error):
                    return None
                raise
            for each in page.get("Parts", ()):
                found[int(each["PartNumber"])] = Object(key, int(each["Size"]), _plain(each["ETag"]))
            if not page.get("IsTruncated"):
                return found
            after = {"PartNumberMarker": str(page["NextPartNumberMarker"])}

    async def put_together(self, bucket: str, key: str, upload: str, etags: Mapping[int, str]) -> Written:
        """Makes the object of its parts. Raises ObjectTaken."""
        parts = [{"PartNumber": number, "ETag": f'"{etags[number]}"'} for number in sorted(etags)]
        answer = await self._call_new(
            "complete_multipart_upload", Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
        )
        return _written(answer)

    async def abort_parts(self, bucket: str, key: str, upload: str) -> None:
        """Removes the parts of an object that is not to be; no error if there are none."""
        try:
            await self._files._call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
        except OSError as error:
            if not is_no_upload(error):
                raise

    async def _call_new(self, method: str, **fields: Any) -> Any:
        """A request that replaces no object. Raises ObjectTaken."""
        only_new = self._only_new
        try:
            return await self._files._call_s3(method, **fields, **only_new)
        except OSError as error:
            if is_changed(error) or is_no_upload(error):
                raise ObjectTaken(fields["Key"]) from error
            if not only_new or not is_not_offered(error):
                raise
        self._only_new = {}
        return await self._files._call_s3(method, **fields)


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
            # Stores that are not Amazon's refuse checksums that they do not know; Content-MD5 is known to all.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
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


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _written(answer: Mapping[str, Any]) -> Written:
    return Written(_plain(answer["ETag"]), is_md5=_has_md5(answer))


def _has_md5(answer: Mapping[str, Any]) -> bool:
    # Of what KMS encrypts the ETag is no MD5.
    return not str(answer.get("ServerSideEncryption", "")).startswith("aws:")

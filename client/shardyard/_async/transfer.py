"""Uploads are sent once and continue where they stopped; downloads are complete or absent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grpc

from shardyard._async import runtime
from shardyard._async.connection import AsyncConnection
from shardyard._files import Download, LocalFile, Package, chunks, make_staging, package, publish, written_to
from shardyard._names import full_name
from shardyard._parse import Upload
from shardyard._retry import Patience
from shardyard.errors import Aborted, DataLoss, NotFound, RequestError, from_rpc
from shardyard.v1 import dataset_service_pb2, model_service_pb2, transfer_pb2

Collection = Literal["datasets", "models"]

_READY = 2  # STATE_READY of both messages.
_MOST_DAMAGED = 5  # Damaged chunks of one file that are requested again.


async def upload(connection: AsyncConnection, path: Path, collection: Collection) -> Any:
    """Send what the service does not have yet; the Dataset or Model message, READY.

    Raises: RequestError.
    """
    content = await runtime.in_thread(package, path, collection)
    name = full_name(connection.project, collection, content.resource_id)
    patience = connection.patience()
    committed = broke_at = -1
    while True:
        content.check_unchanged()
        known = await _get(connection, collection, name)
        if known is not None and known.state == _READY:
            return known
        arrived = {file.path: file.committed_bytes for file in known.files} if known is not None else {}
        if sum(arrived.values()) > committed:
            committed = sum(arrived.values())
            patience.progressed()
        try:
            messages = _messages(connection, collection, content, arrived)
            return await connection.upload(_create_method(connection, collection), messages)
        except grpc.RpcError as error:
            ours = from_rpc(error, address=connection.address)
        if ours.reason == "UPLOAD_MISMATCH" and broke_at < committed:
            broke_at = committed  # Another client sent the same files meanwhile: continue from its bytes.
            continue
        await runtime.sleep(_upload_delay(ours, patience))


async def upload_all(connection: AsyncConnection, uploads: Iterable[Upload]) -> None:
    """Send local paths, and name the resources in the messages that name the paths."""
    for item in uploads:
        resource = await upload(connection, item.path, item.collection)
        setattr(item.message, item.member, resource.name)


async def download(
    connection: AsyncConnection,
    collection: Collection,
    resource: Any,
    folder: Path,
    *,
    prefix: str = "",
    without: tuple[str, ...] = (),
) -> Path:
    """Download the files of a Model or Dataset message into `folder`; an interrupted download continues.

    Only those whose paths begin with `prefix`, which is left out, and with nothing of `without`.

    Raises: RequestError, also if the folder has other files, or the disk refuses one (LOCAL_FILE); DataLoss if a
    file is not what was announced.
    """
    files = [file for file in resource.files if file.path.startswith(prefix) and not file.path.startswith(without)]
    with written_to(folder):
        names = [file.path.removeprefix(prefix) for file in files]
        staging, place = await runtime.in_thread(make_staging, folder, names)
        for name, file in zip(names, files, strict=True):
            wanted = Download(staging, place, name, file.size_bytes, file.sha256)
            await _download_file(connection, collection, _Source(resource.name, file.path), wanted)
        await runtime.in_thread(publish, staging, place)
    return folder


class _Source(NamedTuple):
    """A file of the service: the name of its model or data set, and its path there."""

    name: str
    path: str


async def _download_file(connection: AsyncConnection, collection: Collection, source: _Source, file: Download) -> None:
    if await runtime.in_thread(file.is_done):
        return None
    while True:
        await runtime.in_thread(file.open)
        await _receive(connection, collection, source, file)
        try:
            return await runtime.in_thread(file.finish)
        except DataLoss as error:
            # The remains of an earlier download may be damaged: retry once from the start.
            if error.reason != "CHECKSUM_MISMATCH" or not file.is_resumed:
                raise


async def _receive(connection: AsyncConnection, collection: Collection, source: _Source, file: Download) -> None:
    """All bytes that are missing.

    Raises: RequestError; DataLoss if the service ends the stream early with OK, and then sends nothing more.
    """
    kind: Any = (
        model_service_pb2.DownloadModelRequest if collection == "models" else dataset_service_pb2.DownloadDatasetRequest
    )
    method = connection.models.DownloadModel if collection == "models" else connection.datasets.DownloadDataset

    def request() -> Any:
        return kind(name=source.name, path=source.path, offset=file.offset)

    damaged = 0
    while not file.is_complete:
        before = file.offset
        try:
            async with runtime.closing(connection.streaming(method, request, lambda: file.is_complete)) as stream:
                async for message in stream:
                    file.write(message.chunk.offset, message.chunk.data, message.chunk.crc32c)
        except DataLoss as error:
            damaged += 1
            if error.reason != "CRC_MISMATCH" or damaged > _MOST_DAMAGED:
                raise
        else:
            if file.offset == before:
                raise file.damaged(f"it has no bytes after the first {before:,}")


async def _get(connection: AsyncConnection, collection: Collection, name: str) -> Any:
    """The resource as it is, or None."""
    try:
        if collection == "models":
            return await connection.call(connection.models.GetModel, model_service_pb2.GetModelRequest(name=name))
        return await connection.call(connection.datasets.GetDataset, dataset_service_pb2.GetDatasetRequest(name=name))
    except NotFound:
        return None


def _create_method(connection: AsyncConnection, collection: Collection) -> Any:
    return connection.models.CreateModel if collection == "models" else connection.datasets.CreateDataset


def _upload_delay(error: RequestError, patience: Patience) -> float:
    """Seconds until the upload may continue.

    Raises: the error if it may not continue.
    """
    if isinstance(error, Aborted) and error.reason == "UPLOAD_IN_PROGRESS":
        return error.retry_after or 1.0  # Another client is sending the same files: wait for it.
    if isinstance(error, DataLoss) and error.reason == "CRC_MISMATCH":
        return 0.0
    return patience.after(error)


async def _messages(
    connection: AsyncConnection, collection: Collection, content: Package, arrived: Mapping[str, int]
) -> AsyncIterator[Any]:
    """The header, then what has not arrived of each file."""
    kind: Any = (
        model_service_pb2.CreateModelRequest if collection == "models" else dataset_service_pb2.CreateDatasetRequest
    )
    yield kind(header=_header(connection.parent, content))
    for index, file in enumerate(content.files):
        for offset, data, crc32c in chunks(file, arrived.get(file.path, 0)):
            yield kind(chunk=transfer_pb2.Chunk(file_index=index, offset=offset, data=data, crc32c=crc32c))


def _header(parent: str, content: Package) -> transfer_pb2.UploadHeader:
    return transfer_pb2.UploadHeader(
        parent=parent,
        resource_id=content.resource_id,
        request_id=content.request_id,
        files=[_upload_file(file) for file in content.files],
        display_name=content.display_name,
    )


def _upload_file(file: LocalFile) -> transfer_pb2.UploadFile:
    return transfer_pb2.UploadFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)

"""Uploads as a client makes them, message by message."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import google_crc32c

from helpers.service import PARENT, Service
from shardyard.v1 import dataset_service_pb2 as pb
from shardyard.v1 import model_service_pb2, transfer_pb2

MIB = 1024 * 1024


def header(name: str, files: Mapping[str, bytes], request_id: str = "", **fields: Any) -> transfer_pb2.UploadHeader:
    announced = [
        transfer_pb2.UploadFile(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in files.items()
    ]
    return transfer_pb2.UploadHeader(
        parent=PARENT, resource_id=name, request_id=request_id or str(uuid.uuid4()), files=announced, **fields
    )


def chunk(index: int, offset: int, data: bytes, crc: int | None = None) -> transfer_pb2.Chunk:
    value = google_crc32c.value(data) if crc is None else crc
    return transfer_pb2.Chunk(file_index=index, offset=offset, data=data, crc32c=value)


def messages(top: transfer_pb2.UploadHeader, *chunks: transfer_pb2.Chunk) -> Iterator[pb.CreateDatasetRequest]:
    yield pb.CreateDatasetRequest(header=top)
    for each in chunks:
        yield pb.CreateDatasetRequest(chunk=each)


def whole(files: Mapping[str, bytes]) -> list[transfer_pb2.Chunk]:
    return [
        chunk(index, offset, data[offset : offset + MIB])
        for index, data in enumerate(files.values())
        for offset in range(0, len(data), MIB)
    ]


async def send_dataset(service: Service, name: str, files: Mapping[str, bytes], request_id: str = "") -> pb.Dataset:
    return await service.datasets.CreateDataset(messages(header(name, files, request_id), *whole(files)))


async def fetch(service: Service, name: str, path: str, offset: int = 0) -> bytes:
    data = b""
    request = pb.DownloadDatasetRequest(name=f"{PARENT}/datasets/{name}", path=path, offset=offset)
    async for answer in service.datasets.DownloadDataset(request):
        assert answer.chunk.offset == offset + len(data)
        assert answer.chunk.crc32c == google_crc32c.value(answer.chunk.data)
        data += answer.chunk.data
    return data


def model_messages(name: str, request_id: str = "") -> Iterator[model_service_pb2.CreateModelRequest]:
    files = {"config.json": b"{}"}
    yield model_service_pb2.CreateModelRequest(header=header(name, files, request_id))
    yield model_service_pb2.CreateModelRequest(chunk=whole(files)[0])

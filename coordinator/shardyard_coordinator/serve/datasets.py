"""DatasetService: uploaded data, and data that jobs wrote."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import cast

from google.protobuf import empty_pb2

from shardyard.v1 import dataset_service_pb2 as pb
from shardyard_coordinator.domain.records import ResourceKind
from shardyard_coordinator.serve.call import Behaviour, Call
from shardyard_coordinator.serve.downloads import describe, download
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.tokens import Pages
from shardyard_coordinator.serve.uploads import UploadMessage, Uploads
from shardyard_coordinator.store import encode, resources

_KIND = ResourceKind.DATASET


class DatasetService:
    """Files to train, evaluate or extract on."""

    full_name = "shardyard.v1.DatasetService"

    def __init__(self, parts: Parts, uploads: Uploads) -> None:
        self._parts = parts
        self._uploads = uploads

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return {
            "CreateDataset": self.create,
            "GetDataset": self.get,
            "ListDatasets": self.list,
            "DeleteDataset": self.delete,
            "DownloadDataset": self.download,
        }

    async def create(self, messages: AsyncIterator[pb.CreateDatasetRequest], call: Call) -> pb.Dataset:
        """Receives an upload; returns the data set, complete and checked."""
        record = await self._uploads.receive(_KIND, cast(AsyncIterator[UploadMessage], messages), call)
        return await self._get(record.name)

    async def get(self, request: pb.GetDatasetRequest, _call: Call) -> pb.Dataset:
        """Returns one data set; during an upload its files show the progress."""
        return await self._get(request.name)

    async def _get(self, name: str) -> pb.Dataset:
        return await describe(self._parts, _KIND, name, encode.resource_to_dataset)

    async def list(self, request: pb.ListDatasetsRequest, _call: Call) -> pb.ListDatasetsResponse:
        """Lists data sets that are READY, or with `show_uploading` all, the newest first, without their files."""
        project = self._parts.name("project", request.parent).project
        pages = Pages(self._parts.tokens, "datasets", request)
        after = pages.after()
        found = await self._parts.store.read_many(
            lambda conn: resources.list_resources(
                conn,
                _KIND,
                project,
                after=after,
                limit=pages.size + 1,
                show_uploading=request.show_uploading,
            )
        )
        page, token = pages.fill(found, encode.resource_to_dataset, lambda record: record.id)
        return pb.ListDatasetsResponse(datasets=page, next_page_token=token)

    async def delete(self, request: pb.DeleteDatasetRequest, call: Call) -> empty_pb2.Empty:
        """Deletes a data set that no live job reads."""
        await self._uploads.delete(_KIND, request.name, call)
        return empty_pb2.Empty()

    async def download(
        self, request: pb.DownloadDatasetRequest, _call: Call
    ) -> AsyncIterator[pb.DownloadDatasetResponse]:
        """Sends one file from an offset on."""
        async for chunk in download(self._parts, _KIND, request.name, request.path, request.offset):
            yield pb.DownloadDatasetResponse(chunk=chunk)

"""The scripted services of models and data sets: uploads and downloads, cut and damaged as the script says."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import google_crc32c
import grpc
import grpc.aio
from google.protobuf import empty_pb2

from helpers.script import UID, Failure, ScriptedServicer
from shardyard.v1 import (
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    transfer_pb2,
)


class _Files(ScriptedServicer):
    """Uploads and downloads, the same for models and data sets."""

    async def receive(self, method: str, messages: Any, context: Any, kind: Any) -> Any:
        """Take an upload, or as much of it as the script allows."""
        script = self.script
        header, taken, limit = None, 0, script.upload_cuts.pop(0) if script.upload_cuts else None
        async for message in messages:
            if header is None:
                header = message.header
                await self.begin(method, header, context)
                script.headers[header.resource_id] = header
                stored = script.uploads.setdefault(header.resource_id, {f.path: bytearray() for f in header.files})
                continue
            chunk = message.chunk
            body = stored[header.files[chunk.file_index].path]
            assert chunk.offset == len(body), "a chunk that does not follow"
            assert google_crc32c.value(chunk.data) == chunk.crc32c
            body += chunk.data
            taken += len(chunk.data)
            if limit is not None and taken >= limit:
                script.on_upload_cut()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the script")
        script.ready.add(header.resource_id)
        return self.resource(f"{header.parent}/{self.collection}/{header.resource_id}", kind)

    def resource(self, name: str, kind: Any) -> Any:
        """The model or data set of that name as it is."""
        resource_id = name.rsplit("/", 1)[-1]
        made = kind(name=name, uid=UID)
        if kind is model_service_pb2.Model:
            made.inputs.extend(self.script.inputs)
            made.task = self.script.task
        made.state = kind.STATE_READY if resource_id in self.script.ready else kind.STATE_UPLOADING
        for path, body in self.script.uploads.get(resource_id, {}).items():
            made.files.add(path=path, committed_bytes=len(body))
        for path, sent in self.script.files.items():
            data = self.script.announced.get(path, sent)
            made.files.add(path=path, size_bytes=len(data), sha256=_sha256(data), committed_bytes=len(data))
        return made

    async def get(self, method: str, request: Any, context: Any, kind: Any) -> Any:
        """Answer a Get."""
        await self.begin(method, request, context)
        resource_id = request.name.rsplit("/", 1)[-1]
        if resource_id not in self.script.ready and resource_id not in self.script.uploads:
            missing = Failure(grpc.StatusCode.NOT_FOUND, self.missing, f"there is no {request.name}")
            await context.abort_with_status(missing.status())
        return self.resource(request.name, kind)

    async def send(self, method: str, request: Any, context: Any, kind: Any) -> AsyncIterator[Any]:
        """Send a file in chunks, cut and damaged as the script says."""
        await self.begin(method, request, context)
        script = self.script
        data = script.files[request.path]
        cut = script.download_cuts.pop(0) if script.download_cuts else None
        for offset in range(request.offset, len(data), script.chunk_bytes):
            if cut is not None and offset - request.offset >= cut:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the script")
            part = data[offset : offset + script.chunk_bytes]
            crc32c = google_crc32c.value(part)
            if script.corrupt_downloads:
                script.corrupt_downloads -= 1
                crc32c ^= 1
            yield kind(chunk=transfer_pb2.DownloadChunk(offset=offset, data=part, crc32c=crc32c))

    collection = ""
    missing = ""


class Datasets(_Files, dataset_service_pb2_grpc.DatasetServiceServicer):
    collection = "datasets"
    missing = "DATASET_NOT_FOUND"

    async def CreateDataset(self, request_iterator: Any, context: Any) -> Any:
        return await self.receive("CreateDataset", request_iterator, context, dataset_service_pb2.Dataset)

    async def GetDataset(self, request: Any, context: Any) -> Any:
        return await self.get("GetDataset", request, context, dataset_service_pb2.Dataset)

    async def ListDatasets(self, request: Any, context: Any) -> Any:
        await self.begin("ListDatasets", request, context)
        found = [dataset_service_pb2.Dataset(name=f"{request.parent}/datasets/{name}") for name in self.script.ready]
        return dataset_service_pb2.ListDatasetsResponse(datasets=found)

    async def DeleteDataset(self, request: Any, context: Any) -> Any:
        await self.begin("DeleteDataset", request, context)
        return empty_pb2.Empty()

    async def DownloadDataset(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for message in self.send(
            "DownloadDataset", request, context, dataset_service_pb2.DownloadDatasetResponse
        ):
            yield message


class Models(_Files, model_service_pb2_grpc.ModelServiceServicer):
    collection = "models"
    missing = "MODEL_NOT_FOUND"

    async def CreateModel(self, request_iterator: Any, context: Any) -> Any:
        return await self.receive("CreateModel", request_iterator, context, model_service_pb2.Model)

    async def GetModel(self, request: Any, context: Any) -> Any:
        return await self.get("GetModel", request, context, model_service_pb2.Model)

    async def ListModels(self, request: Any, context: Any) -> Any:
        await self.begin("ListModels", request, context)
        found = [model_service_pb2.Model(name=f"{request.parent}/models/{name}") for name in self.script.ready]
        return model_service_pb2.ListModelsResponse(models=found)

    async def DeleteModel(self, request: Any, context: Any) -> Any:
        await self.begin("DeleteModel", request, context)
        return empty_pb2.Empty()

    async def DownloadModel(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for message in self.send("DownloadModel", request, context, model_service_pb2.DownloadModelResponse):
            yield message

    async def Predict(self, request: Any, context: Any) -> Any:
        await self.begin("Predict", request, context)
        await self._refuse_many(request, context)
        answer = self.script.predict or (lambda _: model_service_pb2.Prediction())
        return model_service_pb2.PredictResponse(predictions=[answer(instance) for instance in request.instances])

    async def Embed(self, request: Any, context: Any) -> Any:
        await self.begin("Embed", request, context)
        await self._refuse_many(request, context)
        found = [
            model_service_pb2.Embedding(shape=[2], values=[float(len(instance.text)), 1.0])
            for instance in request.instances
        ]
        return model_service_pb2.EmbedResponse(embeddings=found)

    async def ExplainPrediction(self, request: Any, context: Any) -> Any:
        await self.begin("ExplainPrediction", request, context)
        return self.script.explain or model_service_pb2.Explanation()

    async def _refuse_many(self, request: Any, context: Any) -> None:
        if len(request.instances) > self.script.most_instances:
            many = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "RESPONSE_TOO_LARGE", "over 3 MiB")
            await context.abort_with_status(many.status())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""ModelService: stores models, sends them, and asks them. This process never loads a model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from google.protobuf import empty_pb2

from shardyard.v1 import model_service_pb2 as pb
from shardyard.v1 import transfer_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import FileRecord, ResourceKind, ResourceRecord
from shardyard_coordinator.serve.call import Behaviour, Call
from shardyard_coordinator.serve.choosing import Choosing
from shardyard_coordinator.serve.downloads import describe, download, find, ready
from shardyard_coordinator.serve.exports import Exports
from shardyard_coordinator.serve.inspection import Subject
from shardyard_coordinator.serve.parts import Parts, in_time, raise_violations
from shardyard_coordinator.serve.storage_errors import blame_the_storage_if_away
from shardyard_coordinator.serve.tokens import Pages
from shardyard_coordinator.serve.uploads import Uploads
from shardyard_coordinator.store import encode, resources

PREDICT_FUNCTION = "shardyard_trainer.answering.infer:predict"
EMBED_FUNCTION = "shardyard_trainer.answering.infer:embed"
EXPLAIN_FUNCTION = "shardyard_trainer.answering.explain:explain"
_SUBJECT = Subject("model", "these instances with the model", Reason.MODEL_INVALID)
_KIND = ResourceKind.MODEL
_Call = worker_pb2.PredictCall | worker_pb2.EmbedCall | worker_pb2.ExplainCall


class ModelService:
    """Models, uploaded or trained here."""

    full_name = "shardyard.v1.ModelService"

    def __init__(self, parts: Parts, uploads: Uploads, exports: Exports, choosing: Choosing) -> None:
        self._parts = parts
        self._uploads = uploads
        self._exports = exports
        self._choosing = choosing

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return {
            "CreateModel": self.create,
            "GetModel": self.get,
            "ListModels": self.list,
            "DeleteModel": self.delete,
            "DownloadModel": self.download,
            "Predict": self.predict,
            "Embed": self.embed,
            "ExplainPrediction": self.explain,
            "ExportModel": self._exports.export,
            "CopyModel": self._exports.copy,
            "RecommendModels": self._choosing.recommend,
        }

    async def create(self, messages: AsyncIterator[pb.CreateModelRequest], call: Call) -> pb.Model:
        """Receives an upload; returns the model, which has been loaded once."""
        record = await self._uploads.receive(_KIND, messages, call)
        return await self._get(record.name)

    async def get(self, request: pb.GetModelRequest, _call: Call) -> pb.Model:
        """Returns one model."""
        return await self._get(request.name)

    async def _get(self, name: str) -> pb.Model:
        return await describe(self._parts, _KIND, name, encode.resource_to_model)

    async def list(self, request: pb.ListModelsRequest, _call: Call) -> pb.ListModelsResponse:
        """Lists models that are READY, or with `show_uploading` all, the newest first, without their files."""
        project = self._parts.name("project", request.parent).project
        pages = Pages(self._parts.tokens, "models", request)
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
        page, token = pages.fill(found, encode.resource_to_model, lambda record: record.id)
        return pb.ListModelsResponse(models=page, next_page_token=token)

    async def delete(self, request: pb.DeleteModelRequest, call: Call) -> empty_pb2.Empty:
        """Deletes a model that no live job reads."""
        await self._uploads.delete(_KIND, request.name, call)
        return empty_pb2.Empty()

    async def download(self, request: pb.DownloadModelRequest, _call: Call) -> AsyncIterator[pb.DownloadModelResponse]:
        """Sends one file from an offset on."""
        async for chunk in download(self._parts, _KIND, request.name, request.path, request.offset):
            yield pb.DownloadModelResponse(chunk=chunk)

    async def predict(self, request: pb.PredictRequest, call: Call) -> pb.PredictResponse:
        """Returns predictions in the order of the instances."""
        folder, files = await self._stored(request.model)
        message = worker_pb2.PredictCall(
            folder=folder,
            files=files,
            request=request,
            max_response_bytes=self._parts.limits.max_response_bytes,
            torch_hub=self._parts.torch_hub,
            cache_dir=self._parts.cache_dir,
        )
        answer = await self._ask(PREDICT_FUNCTION, message, call)
        reply = worker_pb2.PredictReply.FromString(answer)
        await self._refuse(reply.violations, request.model)
        return reply.response

    async def embed(self, request: pb.EmbedRequest, call: Call) -> pb.EmbedResponse:
        """Returns vectors in the order of the instances."""
        folder, files = await self._stored(request.model)
        message = worker_pb2.EmbedCall(
            folder=folder,
            files=files,
            request=request,
            max_response_bytes=self._parts.limits.max_response_bytes,
            torch_hub=self._parts.torch_hub,
            cache_dir=self._parts.cache_dir,
        )
        answer = await self._ask(EMBED_FUNCTION, message, call)
        reply = worker_pb2.EmbedReply.FromString(answer)
        await self._refuse(reply.violations, request.model)
        return reply.response

    async def explain(self, request: pb.ExplainPredictionRequest, call: Call) -> pb.Explanation:
        """Returns what the answer to the instance comes from."""
        folder, files = await self._stored(request.model)
        message = worker_pb2.ExplainCall(
            folder=folder,
            files=files,
            request=request,
            max_response_bytes=self._parts.limits.max_response_bytes,
            torch_hub=self._parts.torch_hub,
            cache_dir=self._parts.cache_dir,
        )
        answer = await self._ask(EXPLAIN_FUNCTION, message, call)
        reply = worker_pb2.ExplainReply.FromString(answer)
        await self._refuse(reply.violations, request.model)
        return reply.response

    async def _ask(self, function: str, message: _Call, call: Call) -> bytes:
        questions = self._parts.questions
        asked = questions.ask(function, message.folder, message.SerializeToString(), call, subject=_SUBJECT)
        return await in_time(call, asked)

    async def _refuse(self, violations: Sequence[worker_pb2.Violation], name: str) -> None:
        """Raises the error of the storage, of a model that was deleted meanwhile, or else the violations."""
        if violations:
            await blame_the_storage_if_away(self._parts.claim)
            await find(self._parts, _KIND, name)
            raise_violations(violations)

    async def _stored(self, name: str) -> tuple[str, Sequence[transfer_pb2.StoredFile]]:
        """The folder of a model, and its files as they were registered."""
        return await describe(self._parts, _KIND, name, _place)


def _place(record: ResourceRecord, files: list[FileRecord]) -> tuple[str, Sequence[transfer_pb2.StoredFile]]:
    ready(record)
    return record.path, encode.files_to_proto(files)

"""Models and data sets of the service: prediction, download, deletion."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from shardyard._async.connection import AsyncConnection
from shardyard._async.transfer import download, upload_all
from shardyard._convert import read, read_explanation, read_prediction
from shardyard._messages import build
from shardyard._names import last_part
from shardyard._parse import Reader
from shardyard._requests import PredictParameters, Text, batches, instance, set_parameters, shifted
from shardyard._sources import local_path
from shardyard._takes import takes_of
from shardyard._text import shown
from shardyard.errors import InvalidArgument, ResourceExhausted, invalid, invalid_fields
from shardyard.export_formats import word_of
from shardyard.spec_sources import Data, Resource
from shardyard.specs import Output, Pooling
from shardyard.types import DatasetInfo, Embedding, Explanation, ModelInfo, Prediction, Question
from shardyard.v1 import dataset_service_pb2, model_service_pb2

if TYPE_CHECKING:
    from shardyard._async.job import AsyncJob

_INSPECT_S = 120.0  # Model and data are inspected before the answer.
_ASK_S = 600.0  # A cold model has to be loaded first.


class AsyncModel:
    """A model of the service, uploaded or trained here."""

    def __init__(self, connection: AsyncConnection, message: model_service_pb2.Model) -> None:
        self._connection = connection
        self.message = message

    def __repr__(self) -> str:
        return f"<Model {self.name} {self.message.model_type} {self.message.task}>"

    @property
    def name(self) -> str:
        """`projects/{project}/models/{model}`."""
        return self.message.name

    @property
    def id(self) -> str:
        """The last part of the name."""
        return last_part(self.message.name)

    @property
    def info(self) -> ModelInfo:
        """The model as it was read."""
        return replace(read(ModelInfo, self.message), **takes_of(self.message)._asdict())

    async def predict(self, inputs: Sequence[Text], **parameters: Unpack[PredictParameters]) -> list[Prediction]:
        """An answer to each input, in their order: a text, pair of texts, `Words`, `Items`, a `Question`, a picture, or
        the messages of a conversation (a list of `{"role": …, "content": …}`, or `{"messages": […], "tools": […]}`).

        `threshold` is for multi-label classification; `max_new_tokens`, `temperature`, `top_p` and `seed` for models
        that write, and for encoder-decoders `num_beams` and `length_penalty`; `top_k` for masked ones; `top_k` and
        `exclude_seen` for recommendation; `top_k`, `max_answer_length` and `threshold` (how much likelier no answer has
        to be) for question answering. With `labels`, a text classification model that knows entailment sorts texts into
        these classes instead of its own: `hypothesis_template` says a class (`This text is about {}.`), and with
        `multi_label` each class is judged by itself. Any number may be asked: calls are split.
        Raises: InvalidArgument with the index of a bad input.
        """
        template = model_service_pb2.PredictRequest(model=self.name)
        set_parameters(template, parameters, own=takes_of(self.message).parameters)
        answers: list[Prediction] = []
        for start, instances in batches(_several(inputs)):
            request = model_service_pb2.PredictRequest()
            request.CopyFrom(template)
            found = await self._ask(self._connection.models.Predict, request, instances, start, "predictions")
            answers += [read_prediction(message) for message in found]
        return answers

    async def embed(
        self,
        inputs: Sequence[Text],
        *,
        output: Output | None = None,
        pooling: Pooling | None = None,
        max_length: int | None = None,
        normalize: bool = False,
    ) -> list[Embedding]:
        """A vector for each text, pair of texts or picture, or with `output="last_hidden_state"` one for each of its
        tokens or places.
        """
        reader = Reader(Path(), self._connection.project)
        template = build(model_service_pb2.EmbedRequest, model=self.name, max_length=max_length, normalize=normalize)
        reader.fill(template, {"output": output, "pooling": pooling}, "")
        if reader.violations:
            raise invalid_fields(reader.violations)
        answers: list[Embedding] = []
        for start, instances in batches(_several(inputs)):
            request = model_service_pb2.EmbedRequest()
            request.CopyFrom(template)
            found = await self._ask(self._connection.models.Embed, request, instances, start, "embeddings")
            answers += [read(Embedding, message) for message in found]
        return answers

    async def explain(
        self, item: Text, *, target: str | None = None, word: int | None = None, max_steps: int | None = None
    ) -> Explanation:
        """What the answer to one input, as for `predict`, comes from: the shares of its words, items or regions.

        `target` is the output to explain instead of the answer: a class, the tag of a word, or an item; `word` is the
        one whose tag is explained, counted from 0; `max_steps` bounds the gradients, 16 to 2,048 [256].
        Raises: InvalidArgument, also for a model whose answers cannot be explained.
        """
        fields = {"target": target, "word": word, "max_steps": max_steps}
        request = build(model_service_pb2.ExplainPredictionRequest, model=self.name, **fields)
        request.instance.CopyFrom(instance(item))
        call = self._connection.call(self._connection.models.ExplainPrediction, request, timeout=_ASK_S)
        return read_explanation(await call)

    async def download(self, folder: str | Path, *, format: str | None = None) -> Path:
        """Download its files into `folder`: checked, complete or absent; resumes an interrupted download.

        With a `format`, such as `onnx-int8`, the files of that further format alone, else those of the model alone.
        Raises: InvalidArgument for a format that the model does not have.
        """
        request = model_service_pb2.GetModelRequest(name=self.name)
        self.message = await self._connection.call(self._connection.models.GetModel, request)
        prefixes = {word_of(each.format): each.prefix for each in self.message.exports}
        place = local_path("folder", folder)
        if format is None:
            without = tuple(prefixes.values())
            return await download(self._connection, "models", self.message, place, without=without)
        prefix = prefixes.get(str(format).replace("_", "-"))
        if prefix is None:
            known = ", ".join(prefixes) or "no further format"
            raise invalid(
                "format", f"{shown(format)} is not a format of {self.name}, which has {known}; export it first"
            )
        return await download(self._connection, "models", self.message, place, prefix=prefix)

    async def export(
        self,
        format: str,
        *,
        data: Data | str | Path | Resource | None = None,
        max_drop: float | None = None,
        metric: str = "",
        job_id: str | None = None,
    ) -> AsyncJob:
        """Submit the job that writes the model as `onnx`, `onnx-int8` or `bf16`, measured beside the model on `data`.

        Unset, the data is that which the model's training was evaluated on. If `metric` (the task's first after the
        loss) is worse by more than `max_drop`, the job fails with EXPORT_REFUSED. `job.export()` is the receipt.
        Raises: InvalidArgument with every broken rule.
        """
        from shardyard._async.job import AsyncJob  # A job gives its model too: its module needs this one.

        request = build(
            model_service_pb2.ExportModelRequest,
            model=self.name,
            max_drop=max_drop,
            metric=metric,
            job_id=job_id,
            request_id=str(uuid.uuid4()),
        )
        reader = Reader(Path.cwd(), self._connection.project)
        given = {} if data is None else {"data": (data if isinstance(data, Data) else Data(data)).to_dict()}
        reader.fill(request, {"format": format, **given}, "")
        if reader.violations:
            raise invalid_fields(reader.violations)
        await upload_all(self._connection, reader.uploads)
        message = await self._connection.call(self._connection.models.ExportModel, request, timeout=_INSPECT_S)
        return AsyncJob(self._connection, message)

    async def copy(self, to: str, *, format: str | None = None, job_id: str | None = None) -> AsyncJob:
        """Submit the job that copies the model, or one of its further formats, to `s3://bucket/prefix`.

        Objects that are there with other bytes are never replaced (OBJECT_EXISTS); the same copy again continues where
        it ended, or finds itself done. `wait` for the job, then `to` can be a model's address.
        Raises: InvalidArgument with every broken rule, such as an address that the project may not write.
        """
        from shardyard._async.job import AsyncJob  # As above.

        request = build(
            model_service_pb2.CopyModelRequest, name=self.name, uri=to, job_id=job_id, request_id=str(uuid.uuid4())
        )
        reader = Reader(Path.cwd(), self._connection.project)
        reader.fill(request, {} if format is None else {"format": format}, "")
        if reader.violations:
            raise invalid_fields(reader.violations)
        message = await self._connection.call(self._connection.models.CopyModel, request, timeout=_INSPECT_S)
        return AsyncJob(self._connection, message)

    async def delete(self) -> None:
        """Delete the model, which no live job may read."""
        request = model_service_pb2.DeleteModelRequest(name=self.name)
        await self._connection.call(self._connection.models.DeleteModel, request)

    async def _ask(self, method: Any, request: Any, instances: list[Any], start: int, field: str) -> list[Any]:
        """The answers to one batch, in parts if they would be too large for one message."""
        del request.instances[:]
        request.instances.extend(instances)
        try:
            return list(getattr(await self._connection.call(method, request, timeout=_ASK_S), field))
        except InvalidArgument as error:
            raise shifted(error, start) from None
        except ResourceExhausted as error:
            if error.reason != "RESPONSE_TOO_LARGE" or len(instances) == 1:
                raise
            fits = int(error.metadata.get("fits", 0)) or len(instances) // 2
        answers: list[Any] = []
        size = min(fits, len(instances) - 1)
        for at in range(0, len(instances), size):
            answers += await self._ask(method, request, instances[at : at + size], start + at, field)
        return answers


class AsyncDataset:
    """A data set of the service, uploaded or written by a job."""

    def __init__(self, connection: AsyncConnection, message: dataset_service_pb2.Dataset) -> None:
        self._connection = connection
        self.message = message

    def __repr__(self) -> str:
        return f"<Dataset {self.name}>"

    @property
    def name(self) -> str:
        """`projects/{project}/datasets/{dataset}`."""
        return self.message.name

    @property
    def id(self) -> str:
        """The last part of the name."""
        return last_part(self.message.name)

    @property
    def info(self) -> DatasetInfo:
        """The data set as it was read."""
        return read(DatasetInfo, self.message)

    async def download(self, folder: str | Path) -> Path:
        """Download its files into `folder`: checked, complete or absent; resumes an interrupted download."""
        request = dataset_service_pb2.GetDatasetRequest(name=self.name)
        self.message = await self._connection.call(self._connection.datasets.GetDataset, request)
        return await download(self._connection, "datasets", self.message, local_path("folder", folder))

    async def delete(self) -> None:
        """Delete the data set, which no live job may read."""
        request = dataset_service_pb2.DeleteDatasetRequest(name=self.name)
        await self._connection.call(self._connection.datasets.DeleteDataset, request)


async def pages(connection: AsyncConnection, method: Any, request: Any, field: str) -> AsyncIterator[Any]:
    """Every item of a list, page by page."""
    while True:
        answer = await connection.call(method, request)
        for item in getattr(answer, field):
            yield item
        if not answer.next_page_token:
            return
        request.page_token = answer.next_page_token


def _several(inputs: Sequence[Text]) -> Sequence[Text]:
    """A single text or question becomes a list of one: its characters or keys are not meant."""
    return [inputs] if isinstance(inputs, str | Question | Mapping) else inputs

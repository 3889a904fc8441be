"""Predict and Embed in a warm process: takes a model folder and instances, returns answers in their order."""

from __future__ import annotations

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.asking import (
    PREDICT,
    Asking,
    Refused,
    check_instances,
    in_slices,
    in_turns,
    model_of,
    predictions,
    predictor_of,
    refuse_large,
    reply,
)
from shardyard_trainer.answering.explain import EXPLAIN, explain_steps
from shardyard_trainer.answering.serving import Answerer, Steps, finish
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.tasks.answers import refuse_kinds
from shardyard_trainer.tasks.base import at_once, violation
from shardyard_trainer.tasks.opening import Opened
from shardyard_trainer.tasks.vectors import Vectors

EMBED = "shardyard_trainer.answering.infer:embed"


def predict(request: bytes) -> bytes:
    """PredictCall → PredictReply, computed alone."""
    return finish(predict_steps(request))


def embed(request: bytes) -> bytes:
    """EmbedCall → EmbedReply, computed alone."""
    return finish(embed_steps(request))


def answerer(_settings: bytes) -> Answerer:
    """Answers the requests of a process, several at once (`serving`)."""
    return Answerer({PREDICT: predict_steps, EMBED: embed_steps, EXPLAIN: explain_steps})


def predict_steps(request: bytes) -> Steps:
    """`predict` in steps, between which other requests may have a turn."""
    return (yield from reply(_predict(worker_pb2.PredictCall.FromString(request)), worker_pb2.PredictReply))


def embed_steps(request: bytes) -> Steps:
    """`embed` in steps, between which other requests may have a turn."""
    return (yield from reply(_embed(worker_pb2.EmbedCall.FromString(request)), worker_pb2.EmbedReply))


def _predict(call: worker_pb2.PredictCall) -> Asking[model_service_pb2.PredictResponse]:
    violations = check_instances(call.request.instances)
    opened = model_of(call)
    predictor = predictor_of(opened, violations)
    violations += predictor.refuse(call.request)
    if violations:
        raise Refused(violations)
    encoded = yield from in_turns(call.request.instances, predictor.read)
    violations = predictor.complain(encoded)
    if violations:
        raise Refused(violations)
    sizes = predictor.most_bytes(call.request, encoded)
    refuse_large(sizes, call.max_response_bytes)
    found = yield from predictions(opened, predictor, call.request, encoded)
    response = model_service_pb2.PredictResponse(predictions=found)
    refuse_large([prediction.ByteSize() + 5 for prediction in found], call.max_response_bytes)
    return response


def _embed(call: worker_pb2.EmbedCall) -> Asking[model_service_pb2.EmbedResponse]:
    violations = check_instances(call.request.instances)
    vectors = _vectors(model_of(call))
    takes = " or ".join(f"`{kind}`" for kind in vectors.kinds)
    message = f"Embed reads {vectors.unit} with this model; send {takes}"
    violations += refuse_kinds(call.request.instances, vectors.kinds, message) + vectors.refuse(call.request)
    if violations:
        raise Refused(violations)
    wish = vectors.wish(call.request)
    encoded = yield from in_turns(call.request.instances, lambda some: vectors.read(some, wish))
    if violations := vectors.complain(encoded):
        raise Refused(violations)
    refuse_large([4 * count + 24 for count in vectors.numbers(encoded, wish)], call.max_response_bytes)
    key = (EMBED, id(vectors.loaded), wish._replace(length=0))
    found = yield from in_slices(key, lambda some, _places: at_once(lambda: vectors.compute(some, wish)), encoded)
    embeddings = [model_service_pb2.Embedding(shape=each.shape, values=each.flatten().tolist()) for each in found]
    return model_service_pb2.EmbedResponse(embeddings=embeddings)


def _vectors(opened: Opened) -> Vectors:
    try:
        return opened.vectors
    except FolderInvalid as problem:
        raise Refused([violation("model", problem.reason, str(problem), **problem.metadata)]) from problem

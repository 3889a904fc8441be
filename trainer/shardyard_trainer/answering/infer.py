"""Predict and embed, in a warm process: a folder and texts in, answers in the order asked out.

What is wrong with the question comes back as violations, all at once, with paths from the request on; nothing is then
computed. An answer that would be too large is refused before it is computed, with how many instances fit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from shardyard.v1 import model_service_pb2, spec_pb2, transfer_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering import answers
from shardyard_trainer.answering.serving import Answerer, Parts, Steps, Work, at_once, finish
from shardyard_trainer.answering.warm import WarmModel, shared_cache
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs import forward
from shardyard_trainer.inputs.forward import Encoded
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import FolderInvalid, open_folder
from shardyard_trainer.tasks.modules import POOLINGS

MAX_INSTANCE_BYTES = 64 * 1024
DEFAULT_EMBED_LENGTH = 128
PREDICT = "shardyard_trainer.answering.infer:predict"
EMBED = "shardyard_trainer.answering.infer:embed"
_ENCODED_AT_ONCE = 128 * 1024
"""Characters of text that are made into tokens in one turn."""

_T = TypeVar("_T")
Asking = Generator[Work | None, list[Any], _T]
Text = tuple[str, str | None]


class Refused(Exception):
    """The question cannot be answered; carries all violations."""

    def __init__(self, violations: Sequence[worker_pb2.Violation]) -> None:
        super().__init__("; ".join(violation.message for violation in violations))
        self.violations = list(violations)


def predict(request: bytes) -> bytes:
    """PredictCall → PredictReply, computed by itself."""
    return finish(predict_steps(request))


def embed(request: bytes) -> bytes:
    """EmbedCall → EmbedReply, computed by itself."""
    return finish(embed_steps(request))


def answerer(_settings: bytes) -> Answerer:
    """What answers the questions of a process (`serving`)."""
    return Answerer({PREDICT: predict_steps, EMBED: embed_steps})


def predict_steps(request: bytes) -> Steps:
    """`predict`, in steps between which other questions have their turn."""
    call = worker_pb2.PredictCall.FromString(request)
    try:
        response = yield from _predict(call)
    except Refused as refused:
        return worker_pb2.PredictReply(violations=refused.violations).SerializeToString()
    except SpecError as error:  # The model's tokenizer fails on a text.
        return worker_pb2.PredictReply(violations=_of_the_model(error)).SerializeToString()
    return worker_pb2.PredictReply(response=response).SerializeToString()


def embed_steps(request: bytes) -> Steps:
    """`embed`, in steps between which other questions have their turn."""
    call = worker_pb2.EmbedCall.FromString(request)
    try:
        response = yield from _embed(call)
    except Refused as refused:
        return worker_pb2.EmbedReply(violations=refused.violations).SerializeToString()
    except SpecError as error:
        return worker_pb2.EmbedReply(violations=_of_the_model(error)).SerializeToString()
    return worker_pb2.EmbedReply(response=response).SerializeToString()


def _predict(call: worker_pb2.PredictCall) -> Asking[model_service_pb2.PredictResponse]:
    texts, violations = read_instances(call.request.instances)
    model = _model(call.folder, call.files)
    task = model.folder.task
    violations += answers.wrong_parameters(call.request, model.folder)
    if task in {"causal_lm", "masked_lm"}:
        violations += [
            violation(f"instances[{index}].pair", "TASK_MISMATCH", f"a {task} model takes single texts; send `text`")
            for index, (_, pair) in enumerate(texts)
            if pair is not None
        ]
    if violations:
        raise Refused(violations)
    encoded = yield from _in_turns(texts, partial(answers.encode, model))
    violations = answers.wrong_tokens(model, encoded)
    if violations:
        raise Refused(violations)
    sizes = answers.most_bytes(model, call.request, encoded)
    _refuse_large(sizes, call.max_response_bytes)
    parameters = model_service_pb2.PredictRequest()
    parameters.CopyFrom(call.request)
    del parameters.instances[:]
    key = (PREDICT, id(model), parameters.SerializeToString(deterministic=True))
    predictions = yield from _in_slices(key, partial(answers.answer_in_parts, model, parameters), encoded)
    response = model_service_pb2.PredictResponse(predictions=predictions)
    _refuse_large([prediction.ByteSize() + 5 for prediction in predictions], call.max_response_bytes)
    return response


def _embed(call: worker_pb2.EmbedCall) -> Asking[model_service_pb2.EmbedResponse]:
    texts, violations = read_instances(call.request.instances)
    model = _model(call.folder, call.files)
    length = embed_length(model, call.request.max_length if call.request.HasField("max_length") else None)
    if length is None:
        message = (
            f"max_length {call.request.max_length} is more than the {model.longest} tokens that the model can address"
        )
        violations.append(violation("max_length", "SPEC_INVALID", message))
    if violations or length is None:
        raise Refused(violations)
    encoded = yield from _in_turns(texts, lambda some: forward.encode(model, some, length))
    whole = call.request.output == spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE
    numbers = [(len(each.ids) if whole else 1) * model.width for each in encoded]
    _refuse_large([4 * count + 24 for count in numbers], call.max_response_bytes)
    pooling, normalize = choose_pooling(model, call.request.pooling), call.request.normalize or model.folder.normalize
    key = (EMBED, id(model), whole, pooling, normalize)

    def compute(some: Sequence[Encoded]) -> list[torch.Tensor]:
        if whole:
            found = dict(forward.hidden_states(model, some))
            return [found[index] for index in range(len(some))]
        return list(forward.text_vectors(model, some, pooling=pooling, normalize=normalize))

    found = yield from _in_slices(key, at_once(compute), encoded)
    embeddings = [model_service_pb2.Embedding(shape=each.shape, values=each.flatten().tolist()) for each in found]
    return model_service_pb2.EmbedResponse(embeddings=embeddings)


def _in_turns(texts: Sequence[Text], encode: Callable[[Sequence[Text]], list[Encoded]]) -> Asking[list[Encoded]]:
    """Texts as tokens, with a pause after so many bytes."""
    encoded: list[Encoded] = []
    some: list[Text] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text[0]) + len(text[1] or "")
        if size > _ENCODED_AT_ONCE or len(some) == forward.TEXTS_AT_ONCE:
            encoded += _encoded(encode, some)
            some, size = [], 0
            yield None
    return encoded + (_encoded(encode, some) if some else [])


def _encoded(encode: Callable[[Sequence[Text]], list[Encoded]], texts: Sequence[Text]) -> list[Encoded]:
    try:
        return encode(texts)
    except SpecError as error:
        raise Refused([violation("model", error.reason, error.message)]) from None


def _in_slices(
    key: Hashable, compute: Callable[[Sequence[Encoded], Sequence[int]], Parts], encoded: Sequence[Encoded]
) -> Asking[list[Any]]:
    """A result for each text, in the order given; computed in slices of like length."""
    results: list[Any] = [None] * len(encoded)
    for indices in list(forward.batches(encoded)):
        found = yield Work(key, compute, [encoded[index] for index in indices], indices)
        for index, result in zip(indices, found, strict=True):
            results[index] = result
    return results


def read_instances(
    instances: Sequence[model_service_pb2.Instance],
) -> tuple[list[tuple[str, str | None]], list[worker_pb2.Violation]]:
    """The texts, and what is wrong with single instances."""
    texts: list[tuple[str, str | None]] = []
    violations = []
    for index, instance in enumerate(instances):
        field = instance.WhichOneof("input")
        where = f"instances[{index}]" + (f".{field}" if field else "")
        text = instance.pair.text if field == "pair" else instance.text
        pair = instance.pair.text_pair if field == "pair" else None
        texts.append((text, pair))
        size = len(text.encode()) + len((pair or "").encode())
        if field is None:
            violations.append(violation(where, "SPEC_INVALID", "no input; set `text` or `pair`"))
        elif size > MAX_INSTANCE_BYTES:
            violations.append(
                violation(where, "SPEC_INVALID", f"{size} bytes; an instance has at most {MAX_INSTANCE_BYTES} (64 KiB)")
            )
    if not instances:
        violations.append(violation("instances", "SPEC_INVALID", "no instances; send at least one"))
    return texts, violations


def choose_pooling(model: WarmModel, asked: spec_pb2.Pooling.ValueType) -> str:
    """As asked, else as trained, else `mean` for encoders and `last` for causal models."""
    return POOLINGS.get(asked) or architectures.default_pooling(model.model.config, model.folder)


def embed_length(model: WarmModel, asked: int | None) -> int | None:
    """Tokens that texts are cut to; None: more was asked than the model can address."""
    if asked is not None:
        return asked if model.longest is None or asked <= model.longest else None
    trained = model.folder.max_length or DEFAULT_EMBED_LENGTH
    return trained if model.longest is None else min(trained, model.longest)


def violation(field: str, reason: str, message: str, **metadata: str) -> worker_pb2.Violation:
    """One thing that is wrong."""
    return worker_pb2.Violation(field=field, reason=reason, message=message, metadata=metadata)


def _of_the_model(error: SpecError) -> list[worker_pb2.Violation]:
    return [violation("model", each.reason, each.message) for each in error.all()]


def _model(folder: str, known: Sequence[transfer_pb2.StoredFile]) -> WarmModel:
    try:
        return shared_cache().get(open_folder(Path(folder)), known)
    except FolderInvalid as problem:
        raise Refused([violation("model", problem.reason, str(problem), **problem.metadata)]) from problem


def _refuse_large(sizes: Sequence[int], limit: int) -> None:
    if not limit or sum(sizes) <= limit:
        return
    fits, left = 0, limit
    for size in sizes:
        if size > left:
            break
        fits, left = fits + 1, left - size
    raise Refused(
        [
            violation(
                "instances",
                "RESPONSE_TOO_LARGE",
                f"the answer to {len(sizes)} instances would take up to {sum(sizes)} bytes, over the limit of {limit}; "
                f"the first {fits} fit: send them in several calls",
                fits=str(fits),
                bytes=str(sum(sizes)),
            )
        ]
    )

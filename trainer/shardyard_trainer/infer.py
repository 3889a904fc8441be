"""Predict and embed, in a warm process: a folder and texts in, answers in the order asked out.

What is wrong with the question comes back as violations, all at once, with paths from the request on; nothing is then
computed. An answer that would be too large is refused before it is computed, with how many instances fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardyard.v1 import model_service_pb2, spec_pb2, transfer_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer import answers, architectures, forward
from shardyard_trainer.door import FolderInvalid, open_folder
from shardyard_trainer.tasks.modules import POOLINGS
from shardyard_trainer.warm import WarmModel, shared_cache

MAX_INSTANCE_BYTES = 64 * 1024
DEFAULT_EMBED_LENGTH = 128


class Refused(Exception):
    """The question cannot be answered; carries all violations."""

    def __init__(self, violations: Sequence[worker_pb2.Violation]) -> None:
        super().__init__("; ".join(violation.message for violation in violations))
        self.violations = list(violations)


def predict(request: bytes) -> bytes:
    """PredictCall → PredictReply."""
    call = worker_pb2.PredictCall.FromString(request)
    try:
        response = _predict(call)
    except Refused as refused:
        return worker_pb2.PredictReply(violations=refused.violations).SerializeToString()
    return worker_pb2.PredictReply(response=response).SerializeToString()


def embed(request: bytes) -> bytes:
    """EmbedCall → EmbedReply."""
    call = worker_pb2.EmbedCall.FromString(request)
    try:
        response = _embed(call)
    except Refused as refused:
        return worker_pb2.EmbedReply(violations=refused.violations).SerializeToString()
    return worker_pb2.EmbedReply(response=response).SerializeToString()


def _predict(call: worker_pb2.PredictCall) -> model_service_pb2.PredictResponse:
    texts, violations = read_instances(call.request.instances)
    model = _model(call.folder, call.files)
    task = model.folder.task
    violations += answers.wrong_parameters(call.request, task)
    if task in {"causal_lm", "masked_lm"}:
        violations += [
            violation(f"instances[{index}].pair", "TASK_MISMATCH", f"a {task} model takes single texts; send `text`")
            for index, (_, pair) in enumerate(texts)
            if pair is not None
        ]
    if violations:
        raise Refused(violations)
    encoded = answers.encode(model, texts)
    violations = answers.wrong_tokens(model, encoded)
    if violations:
        raise Refused(violations)
    sizes = answers.most_bytes(model, call.request, encoded)
    _refuse_large(sizes, call.max_response_bytes)
    predictions = answers.answer(model, call.request, encoded)
    response = model_service_pb2.PredictResponse(predictions=predictions)
    _refuse_large([prediction.ByteSize() + 5 for prediction in predictions], call.max_response_bytes)
    return response


def _embed(call: worker_pb2.EmbedCall) -> model_service_pb2.EmbedResponse:
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
    encoded = forward.encode(model, texts, length)
    whole = call.request.output == spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE
    numbers = [(len(each.ids) if whole else 1) * model.width for each in encoded]
    _refuse_large([4 * count + 24 for count in numbers], call.max_response_bytes)
    embeddings: list[model_service_pb2.Embedding] = [model_service_pb2.Embedding() for _ in encoded]
    if whole:
        for index, hidden_TD in forward.hidden_states(model, encoded):
            embeddings[index].shape.extend(hidden_TD.shape)
            embeddings[index].values.extend(hidden_TD.flatten().tolist())
    else:
        pooling = choose_pooling(model, call.request.pooling)
        vectors = forward.text_vectors(
            model, encoded, pooling=pooling, normalize=call.request.normalize or model.folder.normalize
        )
        for embedding, vector in zip(embeddings, vectors, strict=True):
            embedding.shape.append(model.width)
            embedding.values.extend(vector.tolist())
    return model_service_pb2.EmbedResponse(embeddings=embeddings)


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

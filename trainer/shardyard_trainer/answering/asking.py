"""What all questions to a model have in common: its folder, its instances, turns, and refusals.

All errors of a request are returned at once, as violations with paths relative to the request; nothing is computed
then. An answer that would be too large is refused before it is computed, with how many instances fit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.serving import Steps, Work
from shardyard_trainer.answering.warm import shared_cache
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.base import INSTANCES_AT_ONCE, Encoded, batches
from shardyard_trainer.models.door import FolderInvalid, open_folder
from shardyard_trainer.models.gguf_folder import dequantise, gguf_in
from shardyard_trainer.models.known_files import check_known
from shardyard_trainer.tasks.base import Parts, Predictor, violation
from shardyard_trainer.tasks.opening import Opened

MAX_INSTANCE_BYTES = 64 * 1024
MAX_IMAGE_BYTES = 4_000_000
"""A message has 4 MiB."""

PREDICT = "shardyard_trainer.answering.infer:predict"
_READ_AT_ONCE = 128 * 1024
"""Bytes of instances that are read in one turn."""

_KINDS = tuple(field.name for field in model_service_pb2.Instance.DESCRIPTOR.oneofs_by_name["input"].fields)

_T = TypeVar("_T")
Asking = Generator[Work | None, list[Any], _T]
Call = worker_pb2.PredictCall | worker_pb2.EmbedCall | worker_pb2.ExplainCall
Reply = worker_pb2.PredictReply | worker_pb2.EmbedReply | worker_pb2.ExplainReply


class Refused(Exception):
    """The request cannot be answered, for the reasons in `violations`."""

    def __init__(self, violations: Sequence[worker_pb2.Violation]) -> None:
        super().__init__("; ".join(violation.message for violation in violations))
        self.violations = list(violations)


def reply(asking: Asking[Any], kind: type[Reply]) -> Steps:
    """The response, or all violations of the request."""
    try:
        made = kind(response=(yield from asking))
    except Refused as refused:
        made = kind(violations=refused.violations)
    except SpecError as error:  # The model's tokenizer fails on a text.
        made = kind(violations=[violation("model", each.reason, each.message) for each in error.all()])
    return made.SerializeToString()


def predictor_of(opened: Opened, violations: Sequence[worker_pb2.Violation]) -> Predictor:
    """The predictor of a model. Raises Refused for a model without one, with the other violations of the request."""
    if opened.predictor is not None:
        return opened.predictor
    reshaped = opened.loaded.folder.reshaped
    what = f"a model whose head does not fit ({reshaped})" if reshaped else "a bare backbone without a head"
    message = f"it is {what}, which predicts nothing; use Embed, or fine-tune it"
    raise Refused([*violations, violation("model", "TASK_MISMATCH", message)])


def predictions(
    opened: Opened, predictor: Predictor, request: model_service_pb2.PredictRequest, encoded: Sequence[Encoded]
) -> Asking[list[model_service_pb2.Prediction]]:
    """The answers to instances that were read, computed together with those of other requests."""
    parameters = model_service_pb2.PredictRequest()
    parameters.CopyFrom(request)
    del parameters.instances[:]
    key = (PREDICT, id(opened), parameters.SerializeToString(deterministic=True))
    return (yield from in_slices(key, partial(predictor.answer, parameters), encoded))


def in_turns(
    instances: Sequence[model_service_pb2.Instance], read: Callable[[Sequence[model_service_pb2.Instance]], list[_T]]
) -> Asking[list[_T]]:
    """Instances as the model reads them; after `_READ_AT_ONCE` bytes other requests may have a turn."""
    encoded: list[_T] = []
    some: list[model_service_pb2.Instance] = []
    size = 0
    for instance in instances:
        some.append(instance)
        size += instance.ByteSize()
        if size > _READ_AT_ONCE or len(some) == INSTANCES_AT_ONCE:
            encoded += read(some)
            some, size = [], 0
            yield None
    return encoded + (read(some) if some else [])


def in_slices(
    key: Hashable, compute: Callable[[Sequence[Encoded], Sequence[int]], Parts], encoded: Sequence[Encoded]
) -> Asking[list[Any]]:
    """A result for each instance, in the order given; computed in slices of similar lengths."""
    results: list[Any] = [None] * len(encoded)
    for indices in list(batches(encoded)):
        found = yield Work(key, compute, [encoded[index] for index in indices], indices)
        for index, result in zip(indices, found, strict=True):
            results[index] = result
    return results


def check_instances(instances: Sequence[model_service_pb2.Instance]) -> list[worker_pb2.Violation]:
    """The errors of single instances that do not depend on the model."""
    violations = []
    for index, instance in enumerate(instances):
        field = instance.WhichOneof("input")
        where = f"instances[{index}]" + (f".{field}" if field else "")
        size = _size(getattr(instance, field)) if field else 0
        if field is None:
            violations.append(violation(where, "SPEC_INVALID", f"no input; set one of {', '.join(_KINDS)}"))
        elif size > (most := MAX_IMAGE_BYTES if field == "image" else MAX_INSTANCE_BYTES):
            what = "a picture" if field == "image" else "an instance"
            violations.append(violation(where, "SPEC_INVALID", f"{size:,} bytes; {what} has at most {most:,}"))
    if not instances:
        violations.append(violation("instances", "SPEC_INVALID", "no instances; send at least one"))
    return violations


def _size(given: Any) -> int:
    if isinstance(given, bytes):
        return len(given)
    return len(given.encode()) if isinstance(given, str) else int(given.ByteSize())


def model_of(call: Call) -> Opened:
    """The model of a call, loaded. Raises Refused."""
    folder = open_folder(Path(call.folder), runs=call.torch_hub)
    try:
        if call.cache_dir and (origin := gguf_in(folder)) is not None:
            check_known(origin, call.files)
            return shared_cache().get(dequantise(origin, Path(call.cache_dir)))
        return shared_cache().get(folder, call.files)
    except FolderInvalid as problem:
        raise Refused([violation("model", problem.reason, str(problem), **problem.metadata)]) from problem


def refuse_large(sizes: Sequence[int], limit: int) -> None:
    """Raises Refused RESPONSE_TOO_LARGE if answers of these sizes are over the limit together; 0: there is none."""
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

"""Builds requests from users' arguments, without a connection: shared by both clients."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

from shardyard._chats import Chat, conversation
from shardyard._messages import build
from shardyard._parse import Draft, Reader, draft_job
from shardyard._text import escaped, shown
from shardyard.errors import InvalidArgument, Violation, invalid, invalid_fields
from shardyard.spec_settings import (
    Checkpoints,
    EvaluationPolicy,
    ExportPolicy,
    Freeze,
    Lora,
    Optimization,
    Parallelism,
    Resources,
    Retry,
)
from shardyard.spec_sources import AnyModel, Data, Distillation, Resource, TrainedTokenizer
from shardyard.specs import JobSpec, Task
from shardyard.types import Image, Items, Plan, Question, Words
from shardyard.v1 import job_pb2, job_service_pb2, model_service_pb2, spec_pb2

MAX_REQUEST_BYTES = 3 * 2**20
MAX_BATCH = 1_000
# A message may have 50,000 fields and items: those of the instances, and some of its own.
MAX_PARTS = 45_000

MAX_IMAGE_BYTES = 4_000_000

Text = str | tuple[str, str] | Words | Items | Question | Mapping[str, Any] | Image | bytes | Path | Chat


class SpecFields(TypedDict, total=False):
    """The fields of a `JobSpec` but its task, as keywords."""

    model: AnyModel | None
    train_data: str | Path | Resource | Data | None
    eval_data: str | Path | Resource | Data | None
    tokenizer: str | Path | Resource | TrainedTokenizer | None
    optimization: Optimization | None
    parallelism: Parallelism | None
    resources: Resources | None
    checkpoints: Checkpoints | None
    evaluation: EvaluationPolicy | None
    retry: Retry | None
    max_run_time: timedelta | str | None
    lora: Lora | None
    freeze: Freeze | None
    distillation: Distillation | None
    export: ExportPolicy | None


@dataclass(frozen=True)
class JobOptions:
    """The fields of a job beside its spec."""

    job_id: str | None = None
    display_name: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    queue: str = ""
    priority: str | None = None
    plan: Plan | str = ""
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    external_uri: str = ""


Spec = Task | JobSpec | spec_pb2.JobSpec | Mapping[str, Any] | Draft


def make_draft(spec: Spec, fields: SpecFields, options: JobOptions, *, project: str) -> Draft:
    """The job as a message, and the files still to upload.

    A mapping is a spec file's content, `{job_id?, job: {…}}`; paths are relative to the current folder.
    Raises: InvalidArgument.
    """
    if isinstance(spec, Mapping):
        spec = draft_job(spec, base=Path.cwd(), project=project)
    if isinstance(spec, Draft):
        draft = spec
    elif isinstance(spec, spec_pb2.JobSpec):
        draft = Draft(job_pb2.Job(spec=spec))
    else:
        typed = dataclasses.replace(spec, **fields) if isinstance(spec, JobSpec) else JobSpec(spec, **fields)
        _check_task(typed.task)
        draft = draft_job({"job": {"spec": typed.to_dict()}}, base=Path.cwd(), project=project)
    reader = Reader(Path.cwd(), project)
    given = {
        item.name: value
        for item in dataclasses.fields(options)
        if item.name not in {"job_id", "plan"} and (value := getattr(options, item.name))
    }
    reader.fill(draft.job, given, "job")
    if reader.violations:
        raise invalid_fields(reader.violations)
    job_id = draft.job_id if options.job_id is None else options.job_id
    etag = options.plan.etag if isinstance(options.plan, Plan) else options.plan
    return dataclasses.replace(draft, job_id=job_id, plan_etag=etag)


def _check_task(task: object) -> None:
    if not isinstance(task, Task):
        raise invalid(
            "spec",
            f"{shown(task)} is not a task; give one such as TextClassification(), a JobSpec, or a spec file's content",
        )


def event_kinds(names: Sequence[str]) -> list[Any]:
    """The enum values of `progress`, `state`, …

    Raises: InvalidArgument for an unknown name.
    """
    values = job_service_pb2.EventKind.DESCRIPTOR.values_by_name
    found = []
    for name in names:
        value = values.get(f"EVENT_KIND_{escaped(str(name)).removesuffix('_changed').upper()}")
        if value is None or value.number == 0:
            known = ", ".join(key.removeprefix("EVENT_KIND_").lower() for key in list(values)[1:])
            raise invalid("kinds", f"`{name}` is none of {known}")
        found.append(value.number)
    return found


def instance(item: Text, index: int | None = None) -> model_service_pb2.Instance:
    """A text, a pair, words, items, a question, messages, or a picture (bytes, a Path, or Image), for the service.

    `index` is its place among several. Raises: InvalidArgument for anything else, and for a picture that cannot be read
    or is too large.
    """
    where = "instance" if index is None else f"instances[{index}]"
    if isinstance(item, str):
        return build(model_service_pb2.Instance, where, text=item)
    if isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(part, str) for part in item):
        pair = build(model_service_pb2.TextPair, f"{where}.pair", text=item[0], text_pair=item[1])
        return model_service_pb2.Instance(pair=pair)
    if isinstance(item, Words):
        words = build(model_service_pb2.Words, f"{where}.words", words=item.words)
        return model_service_pb2.Instance(words=words)
    if isinstance(item, Items):
        ids: Any = item.items
        if not isinstance(ids, str):
            ids = [str(each) if type(each) is int else each for each in ids]
        return model_service_pb2.Instance(items=build(model_service_pb2.Items, f"{where}.items", items=ids))
    if isinstance(item, Mapping) and item.keys() == {"question", "context"}:
        item = Question(item["question"], item["context"])
    if isinstance(item, Question):
        asked = build(model_service_pb2.Question, f"{where}.question", question=item.question, context=item.context)
        return model_service_pb2.Instance(question=asked)
    if isinstance(item, Image | bytes | Path):
        return model_service_pb2.Instance(image=_content(item, where))
    if _are_messages(item):
        return model_service_pb2.Instance(messages=conversation(item, (), where))
    if isinstance(item, Mapping) and item.keys() <= {"messages", "tools"} and _are_messages(item.get("messages")):
        return model_service_pb2.Instance(messages=conversation(item["messages"], item.get("tools") or (), where))
    kinds = "neither a text nor a pair of texts, nor Words, Items or a Question, nor a list of messages, nor a picture"
    raise invalid(where, f"{shown(item)} is {kinds}")


def _are_messages(item: object) -> TypeGuard[Chat]:
    return isinstance(item, tuple | list) and bool(item) and all(isinstance(part, Mapping) for part in item)


def _content(item: Image | bytes | Path, where: str) -> bytes:
    """The bytes of a picture's file."""
    source = item.source if isinstance(item, Image) else item
    if isinstance(source, bytes):
        content, what = source, "the picture"
    else:
        what = f"`{source}`"
        try:
            with Path(source).open("rb") as file:
                content = file.read(MAX_IMAGE_BYTES + 1)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise invalid(where, f"{what} cannot be read: {why}") from None
    if len(content) > MAX_IMAGE_BYTES:
        text = f"{what} has more than {MAX_IMAGE_BYTES:,} bytes, which one message takes; make the picture smaller"
        raise invalid(f"{where}.image", text)
    return content


def batches(items: Sequence[Text]) -> Iterator[tuple[int, list[model_service_pb2.Instance]]]:
    """(index of the first, instances), each under 3 MiB, 1,000 instances, and 45,000 words, items or parts of messages.

    Raises: InvalidArgument with the index of what is not an instance.
    """
    given: object = items
    if not isinstance(given, Iterable):
        raise invalid("instances", f"{shown(given)} is given, but a list of texts is needed")
    start, size, parts, batch = 0, 0, 0, list[model_service_pb2.Instance]()
    for index, item in enumerate(items):
        made = instance(item, index)
        length = made.ByteSize() + 5
        more = len(made.words.words) + len(made.items.items) + _parts(made.messages) + 4
        if batch and (size + length > MAX_REQUEST_BYTES or len(batch) == MAX_BATCH or parts + more > MAX_PARTS):
            yield start, batch
            start, size, parts, batch = index, 0, 0, []
        batch.append(made)
        size, parts = size + length, parts + more
    if batch:
        yield start, batch


def _parts(messages: model_service_pb2.Messages) -> int:
    """The fields and items of a conversation, as the service counts them, or a few more."""
    more = (
        (each.name, each.tool_call_id, each.reasoning_content, *(4 * tuple(each.tool_calls)))
        for each in messages.messages
    )
    return len(messages.tools) + sum(3 + sum(map(bool, each)) for each in more)


def shifted(error: InvalidArgument, start: int) -> InvalidArgument:
    """An error about a batch as one about all instances: their indices are the caller's."""

    def shift(text: str) -> str:
        return re.sub(r"\binstances\[(\d+)\]", lambda match: f"instances[{int(match[1]) + start}]", text)

    violations = [Violation(shift(v.field), shift(v.message), v.reason) for v in error.violations]
    return InvalidArgument(shift(error.message), reason=error.reason, metadata=error.metadata, violations=violations)


class PredictParameters(TypedDict, total=False):
    """Parameters of a prediction, each for the models of one task; None: chosen by the service."""

    threshold: float | None
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    num_beams: int | None
    length_penalty: float | None
    top_k: int | None
    exclude_seen: bool | None
    max_answer_length: int | None
    labels: Sequence[str] | None
    hypothesis_template: str | None
    multi_label: bool | None


def set_parameters(request: model_service_pb2.PredictRequest, parameters: PredictParameters, *, own: str = "") -> None:
    """Write them into the request's member that has them all; `own`, the one that the model takes, is tried first.

    Raises: InvalidArgument if they belong to more than one task, or are out of range; TypeError for an unknown name.
    """
    members = {
        member.name: set(member.message_type.fields_by_name)
        for member in request.DESCRIPTOR.oneofs_by_name["parameters"].fields
    }
    known = set[str]().union(*members.values())
    for name in parameters:
        if name not in known:
            raise TypeError(f"predict() has no parameter `{name}`; there are {', '.join(sorted(known))}")
    given = {name: value for name, value in parameters.items() if value is not None}
    if not given:
        return
    # Several members have a parameter of the same name.
    fitting = [member for member, names in members.items() if given.keys() <= names]
    chosen = own if own in fitting else next(iter(fitting), None)
    if chosen is None:
        several = " and ".join(member for member, names in members.items() if given.keys() & names)
        raise invalid("parameters", f"those of {several} do not go together", reason="TASK_MISMATCH")
    target = getattr(request, chosen)
    target.CopyFrom(build(type(target), chosen, **given))

"""What a spec names, found by walking it: a new task or source is seen without a word here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from shardyard.v1 import spec_pb2


def task_of(spec: spec_pb2.JobSpec) -> str:
    """The name of the spec's task, such as `text_classification`: the member of its innermost oneof; empty: none."""
    path, _ = leaf_of(spec)
    return path[-1] if path else ""


def leaf_of(spec: spec_pb2.JobSpec) -> tuple[tuple[str, ...], Any]:
    """The members that lead to the task's own message, and that message; no members and None if no task is given."""
    path: tuple[str, ...] = ()
    message: Any = spec
    choice = "task"
    while choice:
        member = message.WhichOneof(choice)
        if member is None:
            return (), None
        path, message = (*path, member), getattr(message, member)
        choice = choice_of(message.DESCRIPTOR)
    return path, message


def choice_of(message: Descriptor) -> str:
    """The oneof by which a family of tasks says which one it is; empty: the message is a task's own."""
    for choice in message.oneofs:
        # A field that may be unset is a oneof of its own, named after it.
        if not choice.name.startswith("_") and all(field.message_type for field in choice.fields):
            return str(choice.name)
    return ""


def tasks() -> tuple[str, ...]:
    """The names of all tasks, in the order of the contract."""
    return tuple(_leaves(spec_pb2.JobSpec.DESCRIPTOR, "task"))


def _leaves(message: Descriptor, choice: str) -> Iterator[str]:
    for field in message.oneofs_by_name[choice].fields:
        below = choice_of(field.message_type)
        if below:
            yield from _leaves(field.message_type, below)
        else:
            yield field.name


def find_uris(spec: Message, path: str) -> Iterator[tuple[str, str]]:
    """Every `uri` of a spec with its field path."""
    return _find_texts(spec, path, ("uri",))


def find_names(spec: Message, path: str) -> Iterator[tuple[str, str]]:
    """Every name of a model or data set in a spec, with its field path."""
    return _find_texts(spec, path, ("model", "dataset"))


def find_data(spec: spec_pb2.JobSpec) -> Iterator[spec_pb2.DataSource]:
    """Every data source of a spec."""
    return (each for each in _messages(spec) if isinstance(each, spec_pb2.DataSource))


def find_sources(spec: spec_pb2.JobSpec) -> Iterator[Message]:
    """Everything in a spec that names files: models, tokenizers, data."""
    kinds = (spec_pb2.ModelSource, spec_pb2.TokenizerSource, spec_pb2.DataSource)
    return (each for each in _messages(spec) if isinstance(each, kinds))


def find_hubs(spec: spec_pb2.JobSpec) -> Iterator[spec_pb2.HubModel]:
    """Every model of the Hub that a spec names."""
    return (each for each in _messages(spec) if isinstance(each, spec_pb2.HubModel))


def _find_texts(message: Message, path: str, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for field, value in message.ListFields():
        if field.name in names and field.type == FieldDescriptor.TYPE_STRING:
            yield f"{path}.{field.name}", value
        elif _is_ours(field):
            yield from _find_texts(value, f"{path}.{field.name}", names)


def _messages(message: Message) -> Iterator[Message]:
    for field, value in message.ListFields():
        if _is_ours(field):
            yield value
            yield from _messages(value)


def _is_ours(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return kind is not None and not field.is_repeated and kind.file.package == "shardyard.v1"

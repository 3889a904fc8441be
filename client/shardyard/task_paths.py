"""Which task a job's spec is for; the rule is here once, for the SDK, the coordinator and the trainer.

A task's name is the innermost member of the oneofs from `JobSpec.task` down: a message is a family of tasks if it has a
oneof whose members are all messages, else it is a task's own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from google.protobuf.descriptor import Descriptor

from shardyard.v1 import spec_pb2

_ROOT = "task"


class Leaf(NamedTuple):
    """How far a spec says what its task is.

    `members` lead to `message`, which is the task's own; unless `missing` is the oneof of it in which nothing is set.
    """

    members: tuple[str, ...]
    message: Any
    missing: str


def leaf_of(spec: spec_pb2.JobSpec) -> Leaf:
    """The task's own message, found by the oneofs on the way to it."""
    members: tuple[str, ...] = ()
    message: Any = spec
    choice = _ROOT
    while choice and (member := message.WhichOneof(choice)) is not None:
        members, message = (*members, member), getattr(message, member)
        choice = _choice_of(message.DESCRIPTOR)
    return Leaf(members, message, choice)


def task_paths() -> tuple[tuple[str, ...], ...]:
    """The members that lead to each task, such as `("pretraining", "causal_lm")`, in the order of the contract."""
    return tuple(_below(spec_pb2.JobSpec.DESCRIPTOR, _ROOT))


def _below(message: Descriptor, choice: str) -> Iterator[tuple[str, ...]]:
    for member in message.oneofs_by_name[choice].fields:
        below = _choice_of(member.message_type)
        paths = _below(member.message_type, below) if below else [()]
        yield from ((member.name, *path) for path in paths)


@functools.cache
def _choice_of(message: Descriptor) -> str:
    """The oneof that selects one task of a family; empty if the message is a task's own."""
    for choice in message.oneofs:
        # A field with presence is a synthetic oneof, named after the field.
        if not choice.name.startswith("_") and all(member.message_type for member in choice.fields):
            return str(choice.name)
    return ""

"""Finds everything that a spec names, in one walk: a new task or source needs no change here."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from shardyard.remote_uris import is_remote
from shardyard.task_paths import leaf_of, task_paths
from shardyard.v1 import spec_pb2


@dataclass(frozen=True)
class WalkedSpec:
    """A spec and everything it names, in the order of its fields: made once, and passed on instead of the spec.

    `uris` (of files on the server), `remotes` (of objects) and `names` (of models and data sets) come with their field
    paths; `sources` are all models, tokenizers and data; `hubs` are models of the Hub, and `private` those of them that
    need a token, with their field paths; `targets` are addresses that are written. The spec must not change afterwards.
    """

    spec: spec_pb2.JobSpec
    uris: list[tuple[str, str]] = field(default_factory=list)
    remotes: list[tuple[str, str]] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)
    sources: list[Message] = field(default_factory=list)
    hubs: list[spec_pb2.HubModel] = field(default_factory=list)
    private: list[tuple[str, spec_pb2.HubModel]] = field(default_factory=list)
    targets: list[tuple[str, str]] = field(default_factory=list)

    @functools.cached_property
    def uses(self) -> tuple[str, ...]:
        """The names, sorted, once each."""
        return tuple(sorted({name for _, name in self.names}))


def walk(spec: spec_pb2.JobSpec) -> WalkedSpec:
    """What the spec names; field paths begin with `job.spec`, as calls have it."""
    found = WalkedSpec(spec)
    _collect(spec, "job.spec", found)
    return found


def with_pins(spec: spec_pb2.JobSpec, uris: Mapping[str, str], hubs: Mapping[str, spec_pb2.HubModel]) -> WalkedSpec:
    """The spec with other URIs and models of the Hub at the field paths that `walk` gives."""
    pinned = spec_pb2.JobSpec()
    pinned.CopyFrom(spec)
    _replace(pinned, "job.spec", uris, hubs)
    return walk(pinned)


def _replace(message: Message, path: str, uris: Mapping[str, str], hubs: Mapping[str, spec_pb2.HubModel]) -> None:
    for each, value in message.ListFields():
        here = f"{path}.{each.name}"
        if here in uris:
            setattr(message, each.name, uris[here])
        elif here in hubs:
            value.CopyFrom(hubs[here])
        elif not each.is_repeated and isinstance(value, Message):
            _replace(value, here, uris, hubs)


def _collect(message: Message, path: str, found: WalkedSpec) -> None:
    for each, value in message.ListFields():
        meaning = _meaning(each)
        if meaning is _Meaning.NOTHING:
            continue
        here = f"{path}.{each.name}"
        if meaning is _Meaning.URI:
            (found.remotes if is_remote(value) else found.uris).append((here, value))
        elif meaning is _Meaning.TARGET:
            found.targets.append((here, value))
        elif meaning is _Meaning.NAME:
            found.names.append((here, value))
        elif meaning is _Meaning.HUB:
            found.hubs.append(value)
            found.private.extend([(here, value)] if value.token else [])
        elif meaning is _Meaning.REPOSITORY:
            # A folder, or the name of a repository, which is pinned by its commit.
            found.uris.extend([(here, value)] if value.startswith("/") else [])
        else:
            if meaning is _Meaning.SOURCE:
                found.sources.append(value)
            _collect(value, here, found)


class _Meaning(Enum):
    """The role of a field in the walk."""

    NOTHING = auto()
    URI = auto()
    TARGET = auto()
    NAME = auto()
    HUB = auto()
    REPOSITORY = auto()
    SOURCE = auto()
    MESSAGE = auto()


@functools.cache
def _meaning(of: FieldDescriptor) -> _Meaning:
    if of.is_repeated:
        return _Meaning.NOTHING
    if of.type == FieldDescriptor.TYPE_STRING:
        is_written = of.name == "uri" and of.containing_type == spec_pb2.ModelCopy.DESCRIPTOR
        return _Meaning.TARGET if is_written else _TEXTS.get(of.name, _Meaning.NOTHING)
    kind = of.message_type
    if kind is None or kind.file.package != spec_pb2.DESCRIPTOR.package:
        return _Meaning.NOTHING
    if kind in _SOURCES:
        return _SOURCES[kind]
    # Most messages of a spec lead to no source: they are not entered.
    leads_on = any(_meaning(below) is not _Meaning.NOTHING for below in kind.fields)
    return _Meaning.MESSAGE if leads_on else _Meaning.NOTHING


_TEXTS = {
    "uri": _Meaning.URI,
    "model": _Meaning.NAME,
    "dataset": _Meaning.NAME,
    "repo": _Meaning.REPOSITORY,
}
_SOURCES = {
    spec_pb2.HubModel.DESCRIPTOR: _Meaning.HUB,
    spec_pb2.ModelSource.DESCRIPTOR: _Meaning.SOURCE,
    spec_pb2.TokenizerSource.DESCRIPTOR: _Meaning.SOURCE,
    spec_pb2.DataSource.DESCRIPTOR: _Meaning.SOURCE,
}


def task_of(spec: spec_pb2.JobSpec) -> str:
    """The name of the spec's task, such as `text_classification`: the member of its innermost oneof; empty: none."""
    leaf = leaf_of(spec)
    return "" if leaf.missing else leaf.members[-1]


def tasks() -> tuple[str, ...]:
    """The names of all tasks, in the order of the contract."""
    return tuple(path[-1] for path in task_paths())

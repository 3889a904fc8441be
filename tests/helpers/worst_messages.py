"""The worst that fits into one message of each method, built from the descriptors: as bytes, as no client would.

Each has nearly the 4 MiB that the transport lets through, or the most that the rules allow: long texts, lists and maps
of the smallest items, lists in lists, submessages that come again and again, fields that nobody knows, and what is
right and merely large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

from helpers.service import PARENT
from helpers.uploads import header
from shardyard.v1 import dataset_service_pb2, job_service_pb2, model_service_pb2
from shardyard_coordinator.serve.app import descriptors

ROOM = 4 * 1024 * 1024 - 64 * 1024
FILLS = ("x", "/", "\u00a0", '"', "a = b AND ")
DEEPEST = 6
LEVELS = 45


@dataclass(frozen=True)
class Worst:
    """A method, what is large about its message, and the message."""

    method: MethodDescriptor
    what: str
    data: bytes

    @property
    def path(self) -> str:
        return f"/{self.method.containing_service.full_name}/{self.method.name}"


def worst_messages() -> Iterator[Worst]:
    """Of every method of every service."""
    for service in descriptors():
        for method in service.methods:
            for what, data in _of(method.input_type):
                yield Worst(method, what, data)
            for what, data in _large_and_right(method.input_type.full_name):
                yield Worst(method, what, data)


def _of(message: Descriptor) -> Iterator[tuple[str, bytes]]:
    yield "fields that nobody knows", b"\xf8\x3f\x01" * (ROOM // 3)
    yield "groups that nobody knows", b"\xfb\x3f\xfc\x3f" * (ROOM // 4)
    places = list(_places(message, (), frozenset()))
    texts = [place for place in places if place[-1].type == FieldDescriptor.TYPE_STRING]
    for fill in FILLS if texts else ():
        share = fill * (ROOM // len(texts) // len(fill.encode()))
        yield f"texts of {fill!r}", b"".join(_wrap(place, share.encode()) for place in texts)
    for place in places:
        last, name = place[-1], ".".join(field.name for field in place)
        if last.is_repeated:
            item = _item(last)
            yield f"{name}, many", _wrap(place[:-1], item * (ROOM // len(item)))
        elif last.message_type is not None:
            empty = _wrap(place, b"")
            yield f"{name}, again and again", empty * (ROOM // len(empty))
        if last.message_type is not None and last.message_type.full_name == "google.protobuf.Struct":
            yield f"{name}, lists in lists", _wrap(place, _lists(ROOM))
            yield f"{name}, some lists in lists", _wrap(place, _lists(130_000))


def _places(
    message: Descriptor, above: tuple[FieldDescriptor, ...], seen: frozenset[str]
) -> Iterator[tuple[FieldDescriptor, ...]]:
    """Texts, repeated fields and submessages, with the fields that lead to them."""
    if message.full_name in seen or len(above) >= DEEPEST:
        return
    for field in message.fields:
        here = (*above, field)
        if field.is_repeated or field.message_type is not None or field.type == FieldDescriptor.TYPE_STRING:
            yield here
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            yield from _places(field.message_type, here, seen | {message.full_name})


def _item(field: FieldDescriptor) -> bytes:
    """The smallest item of a repeated field."""
    if field.type in (FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        return _tag(field.number, 2) + b"\0"
    return _tag(field.number, 0) + b"\x63"  # An unknown enum value, a rank that does not exist.


def _lists(room: int) -> bytes:
    """Of a Struct: one key with lists in lists, and at the bottom as many empty values as there is room for."""
    data = b"\x0a\x00" * (room // 2)
    for _ in range(LEVELS - 10):
        data = b"\x32" + _length(data) + data  # Value.list_value
        data = b"\x0a" + _length(data) + data  # ListValue.values
    data = b"\x32" + _length(data) + data
    entry = b"\x0a\x01k\x12" + _length(data) + data
    return b"\x0a" + _length(entry) + entry


def _wrap(place: tuple[FieldDescriptor, ...], data: bytes) -> bytes:
    for field in reversed(place):
        data = _tag(field.number, 2) + _length(data) + data
    return data


def _tag(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _length(data: bytes) -> bytes:
    return _varint(len(data))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _large_and_right(name: str) -> Iterator[tuple[str, bytes]]:
    uploads: dict[str, Any] = {
        "shardyard.v1.CreateDatasetRequest": dataset_service_pb2.CreateDatasetRequest,
        "shardyard.v1.CreateModelRequest": model_service_pb2.CreateModelRequest,
    }
    asking: dict[str, Any] = {
        "shardyard.v1.PredictRequest": model_service_pb2.PredictRequest,
        "shardyard.v1.EmbedRequest": model_service_pb2.EmbedRequest,
    }
    if name in uploads:
        top = header("large", {f"folder/{at}.txt": b"x" for at in range(32_000)})
        yield "an honest header of 32,000 files", uploads[name](header=top).SerializeToString()
        for count in (100_000, 60_000):
            bad = header("bad", {f"{at}": b"" for at in range(count)})
            for file in bad.files:
                file.sha256 = "x"
            yield f"{count:,} bad hashes", uploads[name](header=bad).SerializeToString()
        for at, file in enumerate(bad.files):
            file.path = f"../{at}"
        yield f"{count:,} bad paths and hashes", uploads[name](header=bad).SerializeToString()
    if name in asking:
        text = model_service_pb2.Instance(text="word " * 78)
        asked = asking[name](model=f"{PARENT}/models/m", instances=[text] * 10_000)
        yield "10,000 texts", asked.SerializeToString()
    if name == "shardyard.v1.ExplainPredictionRequest":
        history = model_service_pb2.Items(items=["i" * 60] * 40_000)
        explained = model_service_pb2.ExplainPredictionRequest(model=f"{PARENT}/models/m", target="t" * 4096)
        explained.instance.items.CopyFrom(history)
        yield "a history of 40,000 items", explained.SerializeToString()
    if name in ("shardyard.v1.CreateJobRequest", "shardyard.v1.PlanJobRequest"):
        made = job_service_pb2.CreateJobRequest()
        made.job.spec.fine_tuning.text_classification.labels.extend(["x" * 20] * 10_000)
        yield "10,000 equal labels", made.SerializeToString()

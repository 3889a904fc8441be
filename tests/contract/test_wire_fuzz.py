"""Well-formed calls with any bytes: never UNKNOWN, never INTERNAL, and the service lives.

Messages are built from the descriptors of every method, health and reflection included; about half of them are then
damaged. One example sends a request to every method.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from helpers.service import PARENT, create, failure_of, serving
from helpers.uploads import send_dataset
from shardyard_coordinator.serve.app import descriptors
from shardyard_coordinator.serve.limits import Limits

EXAMPLES = 70
STREAM_S = 0.02
CALL_S = {"WaitJob": 0.5}
"""A call that waits for as long as it is asked to ends sooner than all others."""

METHODS: list[MethodDescriptor] = [method for service in descriptors() for method in service.methods]
STORY, CORPUS = f"{PARENT}/jobs/story", f"{PARENT}/datasets/corpus"
NAMES = [PARENT, STORY, CORPUS, f"{PARENT}/models/m", f"{STORY}/checkpoints/e1-s1", "projects/other"]
WORDS = [
    *NAMES, "story", "corpus", "queues/default", "state = RUNNING", "labels.a : b", "create_time desc", "/etc/passwd",
    "shardyard.v1.JobService", "google.protobuf.FieldOptions", "shardyard/v1/job.proto", "a.txt", "b/c",
    "6f1c1c4e-9d1b-4a53-9d3e-2f4c8f1f7a11", "..", "\x00", "\u202e", "ü" * 50, "x" * 5000, "%s", "'; DROP TABLE job; --",
    "2026-01-01T00:00:00Z", "end_time < 9999-12-31T23:59:59Z AND priority >= high", "eval/loss", "0" * 64,
]  # fmt: skip
# What names are called: mostly right, so that calls get past the first rule.
RIGHT = {
    "JobService": STORY, "LogService": STORY, "MetricService": STORY, "CheckpointService": f"{STORY}/checkpoints/e1-s1",
    "DatasetService": CORPUS, "ModelService": f"{PARENT}/models/m", "WebhookService": f"{PARENT}/webhooks/hook",
}  # fmt: skip


def seed(method: MethodDescriptor) -> Message:
    """A request that is right, for others to be merged into."""
    made: Any = message_factory.GetMessageClass(method.input_type)()
    if method.name in ("CreateJob", "PlanJob"):
        whole = create()
        whole.job.spec.train_data.dataset = CORPUS
        made.parent = PARENT
        made.job.CopyFrom(whole.job)
    elif "parent" in method.input_type.fields_by_name:
        of_story = method.name in ("ListAttempts", "ListCheckpoints")
        of_webhook = method.name == "ListDeliveries"
        made.parent = STORY if of_story else RIGHT["WebhookService"] if of_webhook else PARENT
    if method.name == "BatchCreateJobs":
        made.requests.add().job.CopyFrom(create().job)
    elif method.name == "UpdateJob":
        made.job.name = STORY
        made.update_mask.paths.append("labels")
    elif method.name == "BatchCancelJobs":
        made.names.append(STORY)
    elif method.name == "CreateWebhook":
        made.webhook_id, made.webhook.url = "hook", "https://127.0.0.1/"
    elif method.name == "UpdateWebhook":
        made.webhook.name = RIGHT["WebhookService"]
        made.update_mask.paths.append("kinds")
    for field in ("name", "model"):
        if field in method.input_type.fields_by_name and method.containing_service.name in RIGHT:
            setattr(made, field, RIGHT[method.containing_service.name])
    return made


BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}


def scalar(draw: Callable[[Any], Any], field: FieldDescriptor) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return draw(st.binary(max_size=64))
        return draw(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return draw(st.booleans())
    if kind == FieldDescriptor.CPPTYPE_DOUBLE:
        return draw(st.floats())
    if kind == FieldDescriptor.CPPTYPE_FLOAT:
        return struct.unpack("f", draw(st.binary(min_size=4, max_size=4)))[0]
    low, high = BOUNDS[kind]
    return draw(st.integers(0 if low == 0 else -3, 12) | st.integers(low, high))


def build(draw: Callable[[Any], Any], descriptor: Descriptor, depth: int) -> Message:
    """A message with some of its fields set, the less the deeper."""
    made = message_factory.GetMessageClass(descriptor)()
    fields = list(descriptor.fields)
    chosen = fields if len(fields) <= 4 else draw(st.lists(st.sampled_from(fields), max_size=8, unique_by=id))
    for field in chosen:
        if field.message_type is not None and depth <= 0:
            continue
        if field.is_repeated and field.message_type is not None and field.message_type.GetOptions().map_entry:
            fill_map(draw, made, field, depth)
        elif field.is_repeated:
            target = getattr(made, field.name)
            for _ in range(draw(st.integers(0, 3))):
                if field.message_type is not None:
                    target.append(build(draw, field.message_type, depth - 1))
                else:
                    target.append(scalar(draw, field))
        elif field.message_type is not None:
            getattr(made, field.name).CopyFrom(build(draw, field.message_type, depth - 1))
        else:
            setattr(made, field.name, scalar(draw, field))
    return made


def fill_map(draw: Callable[[Any], Any], made: Message, field: FieldDescriptor, depth: int) -> None:
    entry = field.message_type.fields_by_name
    target = getattr(made, field.name)
    for _ in range(draw(st.integers(0, 2))):
        key = scalar(draw, entry["key"])
        if entry["value"].message_type is not None:
            target[key].CopyFrom(build(draw, entry["value"].message_type, depth - 1))
        else:
            target[key] = scalar(draw, entry["value"])


def damage(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """Cuts, flips and inserts; or leaves it whole."""
    for _ in range(draw(st.sampled_from([0, 0, 1, 2, 4]))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "flip", "insert", "double"]))
        if kind == "cut":
            data = data[:at]
        elif kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(max_size=8)) + data[at:]
        else:
            data = data + data[at:]
    return data


def message(draw: Callable[[Any], Any], method: MethodDescriptor) -> bytes:
    """Something of the method's type, right but for a few fields, or anything; whole or damaged."""
    made = build(draw, method.input_type, 5)
    if draw(st.booleans()):
        right = seed(method)
        if draw(st.booleans()):
            right.MergeFrom(made)
            return right.SerializeToString()
        made.MergeFrom(right)
    return damage(draw, made.SerializeToString())


@st.composite
def rounds(draw: Any) -> list[list[bytes]]:
    """One call to every method: its messages, several if the client streams."""
    found = []
    for method in METHODS:
        count = draw(st.integers(0, 3)) if method.client_streaming else 1
        found.append([message(draw, method) for _ in range(count)])
    return found


async def send(channel: grpc.aio.Channel, method: MethodDescriptor, messages: list[bytes]) -> grpc.StatusCode:
    """The code of one call; a stream that does not end by itself is cancelled."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    make = kinds[method.client_streaming, method.server_streaming](path)
    call = make(iter(messages) if method.client_streaming else messages[0], timeout=CALL_S.get(method.name, 20))
    try:
        if method.server_streaming:
            async with asyncio.timeout(STREAM_S):
                async for _ in call:
                    pass
        else:
            await call
    except TimeoutError:
        call.cancel()
        return grpc.StatusCode.CANCELLED
    except grpc.aio.AioRpcError as error:
        if error.code() not in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED):
            failure_of(error)
        return error.code()
    return grpc.StatusCode.OK


def test_no_bytes_make_the_service_answer_unknown_or_internal(tmp_path: Path) -> None:
    """At least 2,000 requests: EXAMPLES rounds over all methods."""
    assert EXAMPLES * len(METHODS) >= 2000
    sent, codes = 0, set()
    runner = asyncio.Runner()
    service = serving(tmp_path, limits=Limits(upload_idle_s=1.0))

    async def start() -> Any:
        running = await service.__aenter__()
        await send_dataset(running, "corpus", {"a.txt": b"hello\n"})
        request = create("story")
        request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
        await running.jobs.CreateJob(request)
        return running

    running = runner.run(start())

    async def one(all_messages: list[list[bytes]]) -> list[grpc.StatusCode]:
        return await asyncio.gather(
            *(send(running.channel, method, each) for method, each in zip(METHODS, all_messages, strict=True))
        )

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(rounds())
    def fuzz(all_messages: list[list[bytes]]) -> None:
        nonlocal sent
        answered = runner.run(one(all_messages))
        sent += len(answered)
        codes.update(answered)
        for method, code in zip(METHODS, answered, strict=True):
            assert code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), (method.full_name, code)

    try:
        fuzz()
        assert sent >= 2000
        assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT} <= codes
        assert runner.run(one([[b""] for _ in METHODS]))
    finally:
        runner.run(service.__aexit__(None, None, None))
        runner.close()


def every_kind() -> Iterator[tuple[bool, bool]]:
    yield from {(method.client_streaming, method.server_streaming) for method in METHODS}


@pytest.mark.parametrize("kind", sorted(every_kind()))
def test_all_four_kinds_of_methods_are_among_them(kind: tuple[bool, bool]) -> None:
    assert kind in set(every_kind())

"""The worst message of every method delays no other call; what a message holds is counted before it is parsed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2

from helpers.service import PARENT, Service, create, failure_of, refused, serving
from helpers.worst_messages import Worst, worst_messages
from shardyard.v1 import dataset_service_pb2 as datasets
from shardyard.v1 import job_service_pb2 as jobs
from shardyard.v1 import model_service_pb2 as models
from shardyard.v1 import server_service_pb2, transfer_pb2
from shardyard_coordinator.serve.limits import Limits
from shardyard_coordinator.serve.wire import TooManyNodes, path_of, shape_of, weigh

MOST_S = 0.2
# A machine that others use too may be late now and then, also without a message; one that holds the loop is late every
# time, and then alone.
TRIES = 5
IDLE_S = 0.2
TIMES_IDLE = 4
STREAM_S = 0.3


def call(service: Service, worst: Worst) -> Any:
    channel, method = service.channel, worst.method
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    make = kinds[method.client_streaming, method.server_streaming](worst.path)
    return make(iter([worst.data]) if method.client_streaming else worst.data, timeout=60)


async def answered(service: Service, worst: Worst) -> grpc.StatusCode:
    """The code, with details that are ours; a stream that was taken is left."""
    asked = call(service, worst)
    try:
        async with asyncio.timeout(STREAM_S if worst.method.server_streaming else None):
            if worst.method.server_streaming:
                async for _ in asked:
                    pass
            else:
                await asked
    except TimeoutError:
        asked.cancel()
    except grpc.aio.AioRpcError as error:
        failure_of(error)
        return error.code()
    return grpc.StatusCode.OK


async def longest_s(service: Service, doing: Awaitable[Any]) -> float:
    """The longest that GetServerInfo took while something was being done."""
    task, longest = asyncio.ensure_future(doing), 0.0
    while not task.done():
        start = time.perf_counter()
        await service.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
        longest = max(longest, time.perf_counter() - start)
        await asyncio.sleep(0.001)
    task.result()
    return longest


async def is_late(service: Service, worst: Worst, codes: set[grpc.StatusCode]) -> bool:
    """Whether another call waits too long for its answer whenever the message comes, but not without it."""

    async def ask() -> None:
        codes.add(await answered(service, worst))

    for _ in range(TRIES):
        took_s = await longest_s(service, ask())
        if took_s <= MOST_S or took_s <= TIMES_IDLE * await longest_s(service, asyncio.sleep(IDLE_S)):
            return False
    return True


async def test_the_worst_message_of_every_method_delays_no_other_call(tmp_path: Path) -> None:
    late: list[str] = []
    codes: set[grpc.StatusCode] = set()
    async with serving(tmp_path) as service:
        for worst in worst_messages():
            if await is_late(service, worst, codes):
                late.append(f"{worst.path}, {worst.what}")
    assert late == []
    assert grpc.StatusCode.INVALID_ARGUMENT in codes
    assert not codes & {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}


async def test_the_field_that_holds_too_much_is_named(tmp_path: Path) -> None:
    request = create()
    request.job.spec.model.architecture.overrides["deep"] = [[None] * 30_000]
    async with serving(tmp_path) as service:
        failure = await refused(service.jobs.CreateJob(request))
        assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID")
        (field,) = failure.violations
        assert field.startswith("job.spec.model.architecture.overrides")
        assert "20,000" in failure.message and "leave out" in failure.message


async def test_the_largest_honest_messages_are_taken(tmp_path: Path) -> None:
    pair = models.Instance(pair=models.TextPair(text="one", text_pair="two"))
    async with serving(tmp_path) as service:
        asked = models.PredictRequest(model=f"{PARENT}/models/m", instances=[pair] * 10_000)
        assert (await refused(service.models.Predict(asked))).reason == "MODEL_NOT_FOUND"
        listed = jobs.ListJobsRequest(parent=PARENT, filter=" AND ".join(["state = RUNNING"] * 32))
        assert not (await service.jobs.ListJobs(listed)).jobs


async def test_the_first_hundred_violations_of_a_header_are_enough(tmp_path: Path) -> None:
    files = [transfer_pb2.UploadFile(path=f"{at}", sha256="x") for at in range(40_000)]
    files[0].sha256 = "0" * 64
    top = transfer_pb2.UploadHeader(
        parent=PARENT, resource_id="x", request_id="6f1c1c4e-9d1b-4a53-9d3e-2f4c8f1f7a11", files=files
    )
    async with serving(tmp_path) as service:
        failure = await refused(service.datasets.CreateDataset(iter([datasets.CreateDatasetRequest(header=top)])))
        assert failure.metadata["violations_total"] == "100"
        assert next(iter(failure.violations)) == "header.files[1].sha256"
        for file in files[:300]:
            file.sha256 = "0" * 64
        sent = datasets.CreateDatasetRequest(header=transfer_pb2.UploadHeader(parent=PARENT, files=files[:301]))
        failure = await refused(service.datasets.CreateDataset(iter([sent])))
        assert {"header.files[300].sha256", "header.resource_id"} <= set(failure.violations)


async def test_the_bound_is_a_limit_that_the_service_shows(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(max_message_nodes=1_500)) as service:
        info = await service.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
        assert info.limits["max_message_nodes"] == 1_500
        request = create()
        request.job.spec.model.architecture.overrides["wide"] = [None] * 1_500
        assert "1,500" in (await refused(service.jobs.CreateJob(request))).message


def nested() -> struct_pb2.Struct:
    made = struct_pb2.Struct()
    made.update({"a": [1, "zwölf", [None, {"b": True}]], "c": "text"})
    return made


CREATE = jobs.CreateJobRequest.DESCRIPTOR
STRUCT = struct_pb2.Struct.DESCRIPTOR
# A Struct of `nested`: an entry, a key and a value for each of 3 keys; 5 items of lists; and what 8 values hold.
COUNTS = {
    "nothing": (CREATE, b"", 0, 0),
    "a Struct": (STRUCT, nested().SerializeToString(), 22, 13),
    "an unknown field": (CREATE, b"\xf8\x3f\x01", 1, 0),
    "an unknown group with fields in it": (CREATE, b"\xfb\x3f\x0a\x02hi\xfc\x3f\x0a\x02hi", 4, 2),
    "a text of another type": (CREATE, b"\x08\x01", 1, 0),
    "a length beyond the end": (CREATE, b"\x0a\x7fabc", 1, 0),
    "a length that ends nowhere": (CREATE, b"\x0a\xff", 0, 0),
    "a number of eleven bytes": (CREATE, b"\xf8\x3f" + b"\xff" * 11, 0, 0),
    "an end without a group": (CREATE, b"\xfc\x3f", 1, 0),
}


@pytest.mark.parametrize("what", COUNTS)
def test_fields_and_texts_are_counted_at_all_levels(what: str) -> None:
    descriptor, data, nodes, text_bytes = COUNTS[what]
    assert weigh(data, shape_of(descriptor), 1000) == (nodes, text_bytes)


def test_the_count_stops_at_its_limit_and_knows_where() -> None:
    request = create()
    request.job.spec.model.architecture.overrides["a"] = [1, 2, 3]
    data = request.SerializeToString()
    nodes = weigh(data, shape_of(CREATE), 1000).nodes
    assert weigh(data, shape_of(CREATE), nodes).nodes == nodes
    with pytest.raises(TooManyNodes) as error:
        weigh(data, shape_of(CREATE), 1)
    assert path_of(CREATE, error.value.numbers).startswith("job")

"""Reflection shows what is served, in both versions, to the tools that people have."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, message_factory

from helpers.service import PARENT, Service, create, serving
from helpers.uploads import send_dataset
from shardyard_coordinator.serve import reflection
from shardyard_coordinator.serve.app import descriptors

BUF = Path(sys.executable).parent / "buf"
VERSIONS = ["grpc.reflection.v1", "grpc.reflection.v1alpha"]


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(tmp_path) as running:
        yield running


def classes(version: str) -> tuple[Any, Any]:
    (file,) = [each for each in reflection.FILES if each.package == version]
    names = ("ServerReflectionRequest", "ServerReflectionResponse")
    request, response = (message_factory.GetMessageClass(file.message_types_by_name[name]) for name in names)
    return request, response


async def ask(service: Service, version: str, **asked: Any) -> Any:
    request, response = classes(version)
    path = f"/{version}.ServerReflection/ServerReflectionInfo"
    call = service.channel.stream_stream(
        path, request_serializer=request.SerializeToString, response_deserializer=response.FromString
    )(iter([request(**asked)]))
    (answer,) = [each async for each in call]
    return answer


def files(answer: Any) -> dict[str, Any]:
    found = [
        descriptor_pb2.FileDescriptorProto.FromString(each)
        for each in answer.file_descriptor_response.file_descriptor_proto
    ]
    return {file.name: file for file in found}


@pytest.mark.parametrize("version", VERSIONS)
async def test_every_service_is_listed_and_every_file_comes_with_all_that_it_imports(
    service: Service, version: str
) -> None:
    listed = (await ask(service, version, list_services="")).list_services_response.service
    names = [each.name for each in listed]
    assert sorted(names) == names and set(names) == {each.full_name for each in descriptors()}
    for name in names:
        found = files(await ask(service, version, file_containing_symbol=name))
        assert any(f"{file.package}.{each.name}" == name for file in found.values() for each in file.service)
        assert {need for file in found.values() for need in file.dependency} <= set(found)


HIDDEN = [
    {"file_by_filename": "shardyard/worker/v1/worker.proto"},
    {"file_containing_symbol": "shardyard.worker.v1.PlanRequest"},
    {"file_containing_symbol": "google.rpc.Status"},
    {"file_containing_symbol": ""},
    {"file_containing_symbol": "." * 5000},
    {"file_by_filename": "../../etc/passwd"},
    {"all_extension_numbers_of_type": "shardyard.worker.v1.PlanRequest"},
    {"file_containing_extension": {"containing_type": "google.protobuf.FieldOptions", "extension_number": 1159}},
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("asked", HIDDEN, ids=str)
async def test_what_is_not_served_is_not_found(service: Service, version: str, asked: dict[str, Any]) -> None:
    answer = await ask(service, version, **asked)
    assert answer.error_response.error_code == 5 and answer.original_request == classes(version)[0](**asked)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_question_for_nothing_says_so(service: Service, version: str) -> None:
    assert (await ask(service, version)).error_response.error_code == 3
    answer = await ask(service, version, all_extension_numbers_of_type="shardyard.v1.Job")
    assert answer.all_extension_numbers_response.base_type_name == "shardyard.v1.Job"


@pytest.mark.parametrize("protocol", ["grpc-v1", "grpc-v1alpha"])
async def test_buf_curl_finds_its_way_by_either_version(service: Service, protocol: str) -> None:
    await send_dataset(service, "corpus", {"a.txt": b"hello\n"})
    request = create("story")
    request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
    await service.jobs.CreateJob(request)
    url = f"http://127.0.0.1:{service.port}/shardyard.v1.JobService/GetJob"
    flags = ["--protocol", "grpc", "--http2-prior-knowledge", "--reflect-protocol", protocol]
    done = await asyncio.to_thread(
        subprocess.run,
        [BUF, "curl", *flags, "-d", json.dumps({"name": f"{PARENT}/jobs/story"}), url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "STATE_QUEUED"

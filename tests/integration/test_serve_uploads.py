"""Uploads keep to what they announce, hold nothing before they send, and give up places that they do not use."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from helpers.scripted_compute import ScriptedCompute
from helpers.service import ANSWERS, PARENT, Service, refused, serving
from helpers.uploads import MIB, chunk, fetch, header, messages, model_messages, send_dataset, whole
from shardyard.v1 import dataset_service_pb2 as pb
from shardyard.v1 import model_service_pb2
from shardyard_coordinator.serve.limits import Limits


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(tmp_path) as running:
        yield running


XYZ = {"a": b"xyz", "b": b""}
# What is sent, the reason, the field, and what is kept of file a.
ROWS = {
    "no header": ([pb.CreateDatasetRequest(chunk=chunk(0, 0, b"x"))], "SPEC_INVALID", "header", None),
    "nothing at all": ([], "SPEC_INVALID", "header", None),
    "an empty message": ([pb.CreateDatasetRequest()], "SPEC_INVALID", "message", None),
    "two headers": (
        [pb.CreateDatasetRequest(header=header("up", XYZ)) for _ in range(2)],
        "UPLOAD_MISMATCH",
        "header",
        None,
    ),
    "a header between chunks": (
        [*messages(header("up", XYZ), chunk(0, 0, b"x")), pb.CreateDatasetRequest(header=header("up", XYZ))],
        "UPLOAD_MISMATCH",
        "header",
        1,
    ),
    "a chunk over 1 MiB": (
        list(messages(header("up", {"a": b"x" * 2 * MIB}), chunk(0, 0, b"x" * (MIB + 1)))),
        "CHUNK_TOO_LARGE",
        "chunk.data",
        None,
    ),
    "a wrong crc32c": (list(messages(header("up", XYZ), chunk(0, 0, b"xyz", 1))), "CRC_MISMATCH", None, None),
    "a gap": (list(messages(header("up", XYZ), chunk(0, 1, b"y"))), "UPLOAD_MISMATCH", "chunk.offset", None),
    "a gap after a part": (
        list(messages(header("up", XYZ), chunk(0, 0, b"x"), chunk(0, 2, b"z"))),
        "UPLOAD_MISMATCH",
        "chunk.offset",
        1,
    ),
    "an overlap": (
        list(messages(header("up", XYZ), chunk(0, 0, b"xy"), chunk(0, 1, b"yz"))),
        "UPLOAD_MISMATCH",
        "chunk.offset",
        2,
    ),
    "more than announced": (
        list(messages(header("up", XYZ), chunk(0, 0, b"xyz!"))),
        "UPLOAD_MISMATCH",
        "chunk.data",
        None,
    ),
    "bytes after the last announced one": (
        list(messages(header("up", XYZ), chunk(0, 0, b"xyz"), chunk(0, 3, b"!"))),
        "UPLOAD_MISMATCH",
        "chunk.data",
        3,
    ),
    "bytes of a file that was announced empty": (
        list(messages(header("up", XYZ), chunk(0, 0, b"xyz"), chunk(1, 0, b"!"))),
        "UPLOAD_MISMATCH",
        "chunk.data",
        3,
    ),
    "a chunk that is sent twice": (
        list(messages(header("up", XYZ), chunk(0, 0, b"xyz"), chunk(0, 0, b"xyz"))),
        "UPLOAD_MISMATCH",
        "chunk.offset",
        3,
    ),
    "a header again at the end": (
        [*messages(header("up", XYZ), chunk(0, 0, b"xyz")), pb.CreateDatasetRequest(header=header("up", XYZ))],
        "UPLOAD_MISMATCH",
        "header",
        3,
    ),
    "an end before the end": (
        list(messages(header("up", XYZ), chunk(0, 0, b"xy"))),
        "UPLOAD_MISMATCH",
        "files[0]",
        2,
    ),
    "a file that was not announced": (
        list(messages(header("up", XYZ), chunk(2, 0, b"x"))),
        "UPLOAD_MISMATCH",
        "chunk.file_index",
        None,
    ),
}


@pytest.mark.parametrize("row", ROWS)
async def test_a_wrong_upload_is_refused_and_nothing_of_what_is_wrong_is_kept(service: Service, row: str) -> None:
    sent, reason, field, kept = ROWS[row]
    failure = await refused(service.datasets.CreateDataset(iter(sent)))
    code = "DATA_LOSS" if reason == "CRC_MISMATCH" else "INVALID_ARGUMENT"
    assert (failure.code.name, failure.reason) == (code, reason)
    assert field is None or field in failure.violations
    if field == "chunk.offset":  # With the place to continue from.
        assert (failure.metadata["file"], failure.metadata["committed_bytes"]) == ("a", str(kept or 0))
    found = service.datasets.GetDataset(pb.GetDatasetRequest(name=f"{PARENT}/datasets/up"))
    if kept is None:
        assert (await refused(found)).reason == "DATASET_NOT_FOUND"
        assert list((service.parts.storage / "datasets").iterdir()) == []
        return
    half = await found
    assert half.state == pb.Dataset.STATE_UPLOADING and half.files[0].committed_bytes == kept
    (file,) = (service.parts.storage / "datasets").glob("*/a")
    assert file.read_bytes() == b"xyz"[:kept]
    # It continues from the part that is right.
    rest = [chunk(0, kept, b"xyz"[kept:])] if kept < 3 else []
    made = await service.datasets.CreateDataset(messages(sent[0].header, *rest))
    assert made.state == pb.Dataset.STATE_READY and await fetch(service, "up", "a") == b"xyz"


async def test_a_header_alone_reserves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(max_project_upload_bytes=10)) as service:
        waiting = service.datasets.CreateDataset()
        await waiting.write(pb.CreateDatasetRequest(header=header("idle", {"a": b"x" * 10, "sub/b": b""})))
        failure = await refused(service.datasets.CreateDataset(messages(header("begun", {"a": b"x" * 10}))))
        assert failure.reason == "UPLOAD_MISMATCH"
        made = await send_dataset(service, "other", {"a": b"x" * 10})
        assert made.state == pb.Dataset.STATE_READY
        assert [path.name for path in (service.parts.storage / "datasets").iterdir()] == [made.uid]
        waiting.cancel()


async def test_two_uploads_that_together_exceed_the_quota_are_stopped_where_it_ends(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(max_project_upload_bytes=15)) as service:
        slow, top = service.datasets.CreateDataset(), header("slow", {"a": b"x" * 10})
        await slow.write(pb.CreateDatasetRequest(header=top))
        await slow.write(pb.CreateDatasetRequest(chunk=chunk(0, 0, b"xxxx")))
        while not list((service.parts.storage / "datasets").glob("*/a")):
            await asyncio.sleep(0.01)
        await send_dataset(service, "fast", {"a": b"y" * 10})
        await slow.write(pb.CreateDatasetRequest(chunk=chunk(0, 4, b"xxxxxx")))
        await slow.done_writing()
        failure = await refused(slow)
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        held = sorted(path.read_bytes() for path in (service.parts.storage / "datasets").glob("*/a"))
        assert held == [b"", b"y" * 10]


async def test_unfinished_uploads_are_listed_if_asked_for_and_can_be_deleted(service: Service) -> None:
    await send_dataset(service, "whole", {"a": b"x"})
    await refused(service.datasets.CreateDataset(messages(header("half", {"a": b"xyz"}), chunk(0, 0, b"x"))))
    asked = pb.ListDatasetsRequest(parent=PARENT, show_uploading=True)
    listed = (await service.datasets.ListDatasets(asked)).datasets
    assert [(each.name.rpartition("/")[2], each.state) for each in listed] == [
        ("half", pb.Dataset.STATE_UPLOADING),
        ("whole", pb.Dataset.STATE_READY),
    ]
    plain = await service.datasets.ListDatasets(pb.ListDatasetsRequest(parent=PARENT))
    assert [each.name for each in plain.datasets] == [f"{PARENT}/datasets/whole"]
    await service.datasets.DeleteDataset(pb.DeleteDatasetRequest(name=listed[0].name))
    assert len((await service.datasets.ListDatasets(asked)).datasets) == 1
    models = model_service_pb2.ListModelsRequest(parent=PARENT, show_uploading=True)
    assert not (await service.models.ListModels(models)).models


async def test_the_files_of_a_project_are_bounded(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(max_project_files=3)) as service:
        await send_dataset(service, "two", {"a": b"x", "b": b""})
        failure = await refused(send_dataset(service, "more", {"a": b"x", "b": b""}))
        assert (failure.reason, list(failure.violations)) == ("QUOTA_EXCEEDED", ["header.files"])
        assert "room for 1" in failure.message
        await send_dataset(service, "one", {"a": b"x"})


async def test_idle_uploads_give_their_places_to_one_that_moves(tmp_path: Path) -> None:
    limits = Limits(max_uploads=8, upload_yield_s=0.05)
    async with serving(tmp_path, limits=limits) as service:
        idle = [service.datasets.CreateDataset() for _ in range(8)]
        for at, call in enumerate(idle):
            if at != 0:  # One has not even sent its header, and some send next to nothing.
                await call.write(pb.CreateDatasetRequest(header=header(f"idle{at}", {"a": b"xyz"})))
            if at > 4:
                await call.write(pb.CreateDatasetRequest(chunk=chunk(0, 0, b"x")))
        while len(list((service.parts.storage / "datasets").glob("*/a"))) < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        for at in range(3):
            assert (await send_dataset(service, f"moves{at}", {"a": b"hello"})).state == pb.Dataset.STATE_READY
        await asyncio.sleep(0)
        ended = [call for call in idle if call.done()]
        failure = await refused(ended[0])
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED") and failure.retry_after_s
        assert "same request_id" in failure.message and len(ended) < 8
        for call in idle:
            call.cancel()


async def test_uploads_that_move_keep_their_places(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(max_uploads=1, upload_yield_s=30)) as service:
        files = {"a": b"x" * 2 * MIB}
        first = service.datasets.CreateDataset()
        await first.write(pb.CreateDatasetRequest(header=header("first", files)))
        await first.write(pb.CreateDatasetRequest(chunk=whole(files)[0]))
        while not list((service.parts.storage / "datasets").glob("*/a")):
            await asyncio.sleep(0.01)
        failure = await refused(send_dataset(service, "second", {"a": b"x"}))
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
        await first.write(pb.CreateDatasetRequest(chunk=whole(files)[1]))
        await first.done_writing()
        assert (await first).state == pb.Dataset.STATE_READY


async def test_a_model_that_is_looked_into_leaves_its_place_to_others(tmp_path: Path) -> None:
    looking, done = asyncio.Event(), asyncio.Event()

    class Patient(ScriptedCompute):
        async def inspect(self, function: str, request: bytes, **options: Any) -> bytes:
            looking.set()
            await done.wait()
            return await super().inspect(function, request, **options)

    compute, limits = Patient(ANSWERS), Limits(max_uploads=1, upload_yield_s=60)
    async with serving(tmp_path, limits=limits, compute=compute) as service:
        model = asyncio.ensure_future(service.models.CreateModel(model_messages("bert")))
        await asyncio.wait_for(looking.wait(), 20)
        assert (await send_dataset(service, "corpus", {"a": b"x"})).state == pb.Dataset.STATE_READY
        done.set()
        assert (await model).state == model_service_pb2.Model.STATE_READY


async def test_what_is_uploaded_is_for_the_service_alone(service: Service) -> None:
    before = os.umask(0o022)
    try:
        made = await send_dataset(service, "corpus", {"deep/er/a.txt": b"hello\n", "deep/empty": b"", "top": b"x"})
    finally:
        os.umask(before)
    folder = service.parts.storage / "datasets" / made.uid
    modes = {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert set(modes.values()) == {0o700, 0o600}
    assert all(modes[path] == (0o700 if (folder / path).is_dir() else 0o600) for path in modes)

"""Uploads and downloads: resumed where they stopped, checked, and never left half done."""

from __future__ import annotations

import asyncio
import os
import resource
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from sqlalchemy import Connection, insert

from helpers.service import ANSWERS, PARENT, Service, refused, serving
from helpers.uploads import MIB, chunk, fetch, header, messages, model_messages, send_dataset, whole
from shardyard import AsyncClient, DataLoss
from shardyard.v1 import dataset_service_pb2 as pb
from shardyard.v1 import model_service_pb2, transfer_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.records import ResourceKind
from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.serve.limits import Limits
from shardyard_coordinator.store import resources, tables


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(tmp_path) as running:
        yield running


FILES = {"b/train.txt": b"ab" * (3 * MIB // 4), "a.txt": b"hello\n", "empty": b""}


async def test_what_goes_up_comes_down(service: Service) -> None:
    made = await send_dataset(service, "corpus", FILES)
    assert made.state == pb.Dataset.STATE_READY and [file.path for file in made.files] == sorted(FILES)
    assert made.size_bytes == sum(map(len, FILES.values()))
    for path, data in FILES.items():
        assert await fetch(service, "corpus", path) == data
    assert await fetch(service, "corpus", "b/train.txt", 1_000_000) == FILES["b/train.txt"][1_000_000:]
    listed = await service.datasets.ListDatasets(pb.ListDatasetsRequest(parent=PARENT))
    assert [each.name for each in listed.datasets] == [made.name] and not listed.datasets[0].files


async def test_an_upload_continues_where_it_stopped(service: Service) -> None:
    request_id = str(uuid.uuid4())
    top = header("corpus", FILES, request_id)
    failure = await refused(service.datasets.CreateDataset(messages(top, *whole(FILES)[:1])))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT and "files[0]" in failure.violations
    half = await service.datasets.GetDataset(pb.GetDatasetRequest(name=f"{PARENT}/datasets/corpus"))
    assert half.state == pb.Dataset.STATE_UPLOADING
    committed = {file.path: file.committed_bytes for file in half.files}
    assert committed == {"b/train.txt": MIB, "a.txt": 0, "empty": 0}
    assert not (await service.datasets.ListDatasets(pb.ListDatasetsRequest(parent=PARENT))).datasets
    made = await service.datasets.CreateDataset(messages(top, *whole(FILES)[1:]))
    assert made.uid == half.uid and made.state == pb.Dataset.STATE_READY
    again = await service.datasets.CreateDataset(messages(top))
    assert again == made
    assert await fetch(service, "corpus", "b/train.txt") == FILES["b/train.txt"]


async def test_a_file_with_another_sha256_is_sent_again(service: Service) -> None:
    files = {"a.txt": b"hello"}
    top = header("corpus", files)
    failure = await refused(service.datasets.CreateDataset(messages(top, chunk(0, 0, b"HELLO"))))
    assert (failure.code, failure.reason) == (grpc.StatusCode.DATA_LOSS, "CHECKSUM_MISMATCH")
    made = await service.datasets.CreateDataset(messages(top, chunk(0, 0, b"hello")))
    assert made.state == pb.Dataset.STATE_READY


async def test_a_second_upload_of_one_name_is_refused_while_the_first_lives(service: Service) -> None:
    files = {"a.txt": b"hello"}
    first = service.datasets.CreateDataset()
    top = header("corpus", files)
    await first.write(pb.CreateDatasetRequest(header=top))
    for _ in range(200):
        failure = await refused(service.datasets.CreateDataset(messages(top)))
        if failure.reason == "UPLOAD_IN_PROGRESS":
            break
    assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "UPLOAD_IN_PROGRESS")
    await first.write(pb.CreateDatasetRequest(chunk=chunk(0, 0, b"hello")))
    await first.done_writing()
    assert (await first).state == pb.Dataset.STATE_READY


PATHS = ["../../etc/passwd", "/etc/passwd", "a/../b", "a//b", "./a", "a/", "..", "a\\b", "a\x00b", "a\nb", "x" * 1025]


async def test_the_deepest_path_can_be_uploaded_and_removed(service: Service) -> None:
    path = "a/" * 511 + "a"
    made = await send_dataset(service, "deep", {path: b"x"})
    assert await fetch(service, "deep", path) == b"x"
    await service.datasets.DeleteDataset(pb.DeleteDatasetRequest(name=made.name))
    assert list((service.parts.storage / "datasets").iterdir()) == []


async def test_files_without_bytes_alone_are_a_data_set(service: Service) -> None:
    made = await send_dataset(service, "empty", {"a/b": b"", "c": b""})
    assert made.state == pb.Dataset.STATE_READY and await fetch(service, "empty", "a/b") == b""


async def test_one_download_of_very_many_files_looks_one_of_them_up(service: Service) -> None:
    await send_dataset(service, "few", {"a": b"x"})
    many = await send_dataset(service, "many", {"a": b"x"})
    rows = [
        {"resource_uid": many.uid, "path": f"b{at}", "size_bytes": 0, "sha256": "0" * 64, "committed_bytes": 0}
        for at in range(30_000)
    ]
    await service.store.write(lambda conn: conn.execute(insert(tables.resource_file), rows), SYSTEM)

    async def took_s(name: str) -> float:
        start = time.perf_counter()
        for _ in range(3):
            assert await fetch(service, name, "a") == b"x"
        return time.perf_counter() - start

    ratios = [await took_s("many") / await took_s("few") for _ in range(5)]
    assert min(ratios) < 3, ratios


DAMAGE = {
    "shorter": (lambda path: path.write_bytes(b"hel"), "3 bytes"),
    "longer": (lambda path: path.write_bytes(b"hello\nhello\n"), "12 bytes"),
    "gone": (lambda path: path.unlink(), "cannot be read"),
    "a link": (lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("offset", [0, 3])
async def test_a_damaged_file_is_not_downloaded_and_the_error_says_whose_copy_is_damaged(
    service: Service, damage: str, offset: int
) -> None:
    made = await send_dataset(service, "corpus", {"a.txt": b"hello\n"})
    edit, words = DAMAGE[damage]
    edit(service.parts.storage / "datasets" / made.uid / "a.txt")
    request = pb.DownloadDatasetRequest(name=made.name, path="a.txt", offset=offset)
    failure = await refused(service.datasets.DownloadDataset(request).read())
    assert (failure.code, failure.reason) == (grpc.StatusCode.DATA_LOSS, "FILE_DAMAGED")
    assert "the service's own copy of a.txt" in failure.message and words in failure.message
    assert failure.metadata == {"file": "a.txt", "resource": made.name}


@pytest.mark.parametrize("path", PATHS)
async def test_a_path_that_leaves_the_folder_is_refused(service: Service, path: str) -> None:
    failure = await refused(service.datasets.CreateDataset(messages(header("bad", {path: b"x"}))))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT and "header.files[0].path" in failure.violations
    storage = service.parts.storage / "datasets"
    assert list(storage.iterdir()) == []


async def test_a_header_whose_answer_would_be_too_large_is_refused(service: Service) -> None:
    top = header("many", {f"{'folder/' * 140}f{at}": b"" for at in range(3200)})
    failure = await refused(service.datasets.CreateDataset(messages(top)))
    assert "3 MiB" in failure.violations["header.files"]


async def test_sizes_beyond_every_integer_are_over_quota(service: Service) -> None:
    files = [transfer_pb2.UploadFile(path=path, size_bytes=2**63 - 1, sha256="0" * 64) for path in ("a", "b")]
    top = transfer_pb2.UploadHeader(parent=PARENT, resource_id="x", request_id=str(uuid.uuid4()), files=files)
    assert (await refused(service.datasets.CreateDataset(messages(top)))).reason == "QUOTA_EXCEEDED"


async def test_a_file_cannot_be_a_folder_too(service: Service) -> None:
    failure = await refused(service.datasets.CreateDataset(messages(header("bad", {"a": b"x", "a/b": b"y"}))))
    assert list(failure.violations) == ["header.files[0].path"]


async def test_quotas_hold(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(max_upload_bytes=10, max_project_upload_bytes=15)) as service:
        failure = await refused(send_dataset(service, "large", {"a": b"x" * 11}))
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        await send_dataset(service, "one", {"a": b"x" * 10})
        failure = await refused(send_dataset(service, "two", {"a": b"x" * 6}))
        assert failure.reason == "QUOTA_EXCEEDED" and "room for 5" in failure.message
        # Cut off: it may continue, so the arrived part is kept.
        await refused(service.datasets.CreateDataset(messages(header("begun", {"a": b"x" * 5}), chunk(0, 0, b"xxx"))))
        failure = await refused(send_dataset(service, "three", {"a": b"x" * 3}))
        assert failure.reason == "QUOTA_EXCEEDED" and "room for 2" in failure.message


async def test_a_finished_upload_is_answered_again_whatever_the_quota_has_left(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(max_project_upload_bytes=15)) as service:
        request_id = str(uuid.uuid4())
        made = await send_dataset(service, "one", {"a": b"x" * 10}, request_id)
        assert await send_dataset(service, "one", {"a": b"x" * 10}, request_id) == made


async def test_what_is_being_uploaded_cannot_be_deleted(service: Service) -> None:
    name, files = f"{PARENT}/datasets/corpus", {"a": b"x" * MIB, "b": b"y"}
    first, *rest = whole(files)
    call = service.datasets.CreateDataset()
    await call.write(pb.CreateDatasetRequest(header=header("corpus", files)))
    await call.write(pb.CreateDatasetRequest(chunk=first))
    while not list((service.parts.storage / "datasets").glob("*/a")):
        await asyncio.sleep(0.01)
    failure = await refused(service.datasets.DeleteDataset(pb.DeleteDatasetRequest(name=name)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "UPLOAD_IN_PROGRESS")
    for each in rest:
        await call.write(pb.CreateDatasetRequest(chunk=each))
    await call.done_writing()
    assert (await call).state == pb.Dataset.STATE_READY


async def test_a_broken_off_upload_can_be_deleted(service: Service) -> None:
    await refused(service.datasets.CreateDataset(messages(header("corpus", FILES), *whole(FILES)[:1])))
    await service.datasets.DeleteDataset(pb.DeleteDatasetRequest(name=f"{PARENT}/datasets/corpus"))
    assert list((service.parts.storage / "datasets").iterdir()) == []
    assert (await send_dataset(service, "corpus", FILES)).state == pb.Dataset.STATE_READY


async def test_an_upload_that_a_sweep_removes_is_refused_with_the_reason(service: Service) -> None:
    call = service.datasets.CreateDataset()
    await call.write(pb.CreateDatasetRequest(header=header("corpus", {"a": b"xy"})))
    await call.write(pb.CreateDatasetRequest(chunk=chunk(0, 0, b"x")))
    while not (folders := list((service.parts.storage / "datasets").glob("*/a"))):
        await asyncio.sleep(0.01)
    uid = folders[0].parent.name

    def sweep(conn: Connection) -> None:
        resources.begin_delete(conn, ResourceKind.DATASET, "default", "corpus", actor=SYSTEM, now_us=1)
        resources.finish_delete(conn, uid)

    await service.store.write(sweep, SYSTEM)
    await call.write(pb.CreateDatasetRequest(chunk=chunk(0, 1, b"y")))
    await call.done_writing()
    assert (await refused(call)).reason == "DATASET_NOT_FOUND"


async def test_a_full_storage_is_reported_and_the_upload_continues_when_there_is_space(service: Service) -> None:
    files, request_id = {"a": bytes(range(256)) * (6 * MIB // 256)}, str(uuid.uuid4())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB + 1000, hard))
    try:
        failure = await refused(send_dataset(service, "corpus", files, request_id))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_FULL")
    half = await service.datasets.GetDataset(pb.GetDatasetRequest(name=f"{PARENT}/datasets/corpus"))
    done = half.files[0].committed_bytes
    assert done == 4 * MIB
    top = header("corpus", files, request_id)
    made = await service.datasets.CreateDataset(messages(top, *whole(files)[done // MIB :]))
    assert made.state == pb.Dataset.STATE_READY


async def test_a_taken_name_is_refused(service: Service) -> None:
    await send_dataset(service, "corpus", {"a": b"x"})
    failure = await refused(send_dataset(service, "corpus", {"a": b"y"}))
    assert (failure.code, failure.reason) == (grpc.StatusCode.ALREADY_EXISTS, "DATASET_EXISTS")


async def test_an_upload_that_falls_silent_ends_and_can_continue(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(upload_idle_s=0.1)) as service:
        call = service.datasets.CreateDataset()
        await call.write(pb.CreateDatasetRequest(header=header("corpus", {"a": b"x"})))
        failure = await refused(call)
        assert failure.reason == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize(
    ("path", "offset", "code", "reason"),
    [
        ("a.txt", 7, "OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE"),
        ("a.txt", -1, "INVALID_ARGUMENT", "SPEC_INVALID"),
        ("b.txt", 0, "NOT_FOUND", "FILE_NOT_FOUND"),
        ("../store.db", 0, "INVALID_ARGUMENT", "SPEC_INVALID"),
        ("", 0, "INVALID_ARGUMENT", "SPEC_INVALID"),
    ],
)
async def test_a_wrong_download_is_refused(service: Service, path: str, offset: int, code: str, reason: str) -> None:
    await send_dataset(service, "corpus", {"a.txt": b"hello\n"})
    request = pb.DownloadDatasetRequest(name=f"{PARENT}/datasets/corpus", path=path, offset=offset)
    failure = await refused(service.datasets.DownloadDataset(request).read())
    assert (failure.code.name, failure.reason) == (code, reason)
    assert await fetch(service, "corpus", "a.txt", 6) == b""


async def test_a_deleted_data_set_is_gone_from_the_disk(service: Service) -> None:
    made = await send_dataset(service, "corpus", {"a.txt": b"hello\n"})
    await service.datasets.DeleteDataset(pb.DeleteDatasetRequest(name=made.name))
    assert (await refused(service.datasets.GetDataset(pb.GetDatasetRequest(name=made.name)))).reason == (
        "DATASET_NOT_FOUND"
    )
    assert list((service.parts.storage / "datasets").iterdir()) == []


async def test_a_model_is_looked_into_before_it_counts(service: Service) -> None:
    made = await service.models.CreateModel(model_messages("bert"))
    assert made.state == model_service_pb2.Model.STATE_READY and made.model_type == "bert" and made.num_parameters == 10
    assert Path(made.path, "config.json").read_bytes() == b"{}"
    answer = await service.models.Predict(
        model_service_pb2.PredictRequest(model=made.name, instances=[model_service_pb2.Instance(text="hello")])
    )
    assert [each.generated_text for each in answer.predictions] == ["hello"]
    vectors = await service.models.Embed(
        model_service_pb2.EmbedRequest(model=made.name, instances=[model_service_pb2.Instance(text="hello")])
    )
    assert list(vectors.embeddings[0].values) == [5.0]


async def test_a_model_that_does_not_load_leaves_nothing(tmp_path: Path) -> None:
    def inspect(_request: bytes) -> bytes:
        wrong = worker_pb2.Violation(field="config.json", reason="MODEL_INVALID", message="is not a config; send one")
        return worker_pb2.InspectModelResult(violations=[wrong]).SerializeToString()

    answers = {**ANSWERS, "shardyard_trainer.answering.inspect:inspect_model": inspect}
    async with serving(tmp_path, answers=answers) as service:
        failure = await refused(service.models.CreateModel(model_messages("bert")))
        assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MODEL_INVALID")
        assert list((service.parts.storage / "models").iterdir()) == []
        name = f"{PARENT}/models/bert"
        gone = await refused(service.models.GetModel(model_service_pb2.GetModelRequest(name=name)))
        assert gone.reason == "MODEL_NOT_FOUND"


async def test_what_a_library_says_of_this_machine_does_not_reach_the_caller(tmp_path: Path) -> None:
    said = (
        "cannot load <Reader object at 0x7f3a5c0d1e40>: /venv/lib/python3.11/site-packages/safetensors/x.py failed; "
        "run pip install safetensors==9; send the weights again"
    )

    def inspect(_request: bytes) -> bytes:
        wrong = worker_pb2.Violation(field="files", reason="MODEL_INVALID", message=said, metadata={"cause": said})
        return worker_pb2.InspectModelResult(violations=[wrong]).SerializeToString()

    async with serving(
        tmp_path, answers={**ANSWERS, "shardyard_trainer.answering.inspect:inspect_model": inspect}
    ) as service:
        failure = await refused(service.models.CreateModel(model_messages("bert")))
        assert failure.violations["files"] == "cannot load <Reader object>: a library failed; send the weights again"
        told = failure.message + str(failure.metadata)
        assert not any(each in told for each in ("0x7f", "site-packages", "pip install"))


async def test_a_model_waits_for_a_worker_that_can_look_into_it(service: Service) -> None:
    service.compute.available = False
    sent = list(model_messages("bert"))
    failure = await refused(service.models.CreateModel(iter(sent)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "INSPECTION_UNAVAILABLE")
    assert failure.retry_after_s
    waiting = await refused(
        service.models.Predict(
            model_service_pb2.PredictRequest(
                model=f"{PARENT}/models/bert", instances=[model_service_pb2.Instance(text="x")]
            )
        )
    )
    assert (waiting.code, waiting.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_READY")
    service.compute.available = True
    made = await service.models.CreateModel(iter(sent[:1]))
    assert made.state == model_service_pb2.Model.STATE_READY


async def test_the_sdk_names_the_services_copy_and_lists_what_is_not_finished(service: Service, tmp_path: Path) -> None:
    source = tmp_path / "reviews.csv"
    source.write_bytes(b"text,label\n" * 200_000)
    async with AsyncClient(f"127.0.0.1:{service.port}") as client:
        data_set = await client.upload_dataset(source)
        uid = data_set.message.uid
        assert (await data_set.download(tmp_path / "whole") / "reviews.csv").read_bytes() == source.read_bytes()
        os.truncate(service.parts.storage / "datasets" / uid / "reviews.csv", 5)
        with pytest.raises(DataLoss, match=r"the service.s own copy of reviews\.csv") as error:
            await data_set.download(tmp_path / "short")
        assert error.value.reason == "FILE_DAMAGED"
        await refused(service.datasets.CreateDataset(messages(header("half", {"a": b"xyz"}), chunk(0, 0, b"x"))))
        assert [each.id async for each in client.datasets()] == [data_set.id]
        states = {each.id: each.info.state async for each in client.datasets(show_uploading=True)}
        assert states == {"half": "uploading", data_set.id: "ready"}


async def test_a_file_that_the_disk_fails_to_read_is_the_storages_fault(service: Service, tmp_path: Path) -> None:
    await send_dataset(service, "corpus", {"folder/mem": b""})
    (folder,) = (tmp_path / "storage" / "datasets").glob("*/folder")
    (folder / "mem").unlink()
    folder.rmdir()
    folder.symlink_to("/proc/self")  # Whose `mem` is empty by its size, and cannot be read at its beginning.
    failure = await refused(fetch(service, "corpus", "folder/mem"))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")


async def test_a_folder_in_the_place_of_a_file_is_damage_and_takes_no_descriptor(
    service: Service, tmp_path: Path
) -> None:
    await send_dataset(service, "corpus", {"a.txt": b"hello"})
    (file,) = (tmp_path / "storage" / "datasets").glob("*/a.txt")
    file.unlink()
    file.mkdir()
    held = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        failure = await refused(fetch(service, "corpus", "a.txt"))
        assert (failure.code, failure.reason) == (grpc.StatusCode.DATA_LOSS, "FILE_DAMAGED")
    assert len(list(Path("/proc/self/fd").iterdir())) < held + 10

"""The SDK against the real service, its store and storage; only the cluster is scripted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from helpers.service import Service, serving
from shardyard import (
    AlreadyExists,
    Architecture,
    AsyncClient,
    CausalLm,
    Client,
    FailedPrecondition,
    InvalidArgument,
    JobCancelled,
    JobSpec,
    Optimization,
    OutOfRange,
    TrainedTokenizer,
)
from shardyard._files import CHUNK_BYTES, chunks, package
from shardyard._reach import Reach
from shardyard._sync.connection import Connection
from shardyard.v1 import dataset_service_pb2, transfer_pb2


def client_of(service: Service) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{service.port}")


def a_spec(folder: Path) -> JobSpec:
    (folder / "corpus.txt").write_text("some words\n" * 100)
    return JobSpec(
        CausalLm(sequence_length=64),
        model=Architecture("gpt2", {"n_layer": 2}),
        tokenizer=TrainedTokenizer("characters"),
        train_data=folder / "corpus.txt",
        optimization=Optimization(max_steps=4),
    )


async def test_a_job_is_submitted_listed_cancelled_and_deleted(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, client_of(service) as client:
        job = await client.submit(a_spec(tmp_path), job_id="mine", labels={"team": "nlp"}, priority="high")
        assert (job.id, job.state, job.info.priority) == ("mine", "queued", "high")
        assert job.info.spec is not None and job.info.spec["optimization"] == {"max_steps": 4}
        assert [found.id async for found in client.jobs(filter="labels.team = nlp AND state = queued")] == ["mine"]
        with pytest.raises(AlreadyExists):
            await client.submit(a_spec(tmp_path), job_id="mine")
        with pytest.raises(FailedPrecondition) as caught:
            await job.delete()
        assert caught.value.reason == "INVALID_STATE"
        assert (await job.cancel()).state == "cancelled"
        with pytest.raises(JobCancelled):
            await job.wait()
        states = [event.state async for event in job.watch(kinds=["state"])]
        assert states == ["queued", "cancelled"]
        await job.delete()
        assert [found.id async for found in client.jobs()] == []


async def test_a_cursor_beyond_the_end_is_out_of_range(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, client_of(service) as client:
        job = await client.submit(a_spec(tmp_path))
        with pytest.raises(OutOfRange) as caught:
            async for _ in job.watch(after=99):
                pass
        assert caught.value.reason == "CURSOR_AHEAD"


async def test_a_watcher_that_waits_sees_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, client_of(service) as client:
        job = await client.submit(a_spec(tmp_path))

        async def watched() -> list[str | None]:
            return [event.state async for event in job.watch()]

        watcher = asyncio.create_task(watched())
        await asyncio.sleep(0)
        await job.cancel()
        assert (await watcher)[-1] == "cancelled"


async def test_all_violations_come_with_their_fields(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, client_of(service) as client:
        spec = JobSpec(CausalLm(), model="hub:a/b", optimization=Optimization(max_steps=0, learning_rate=-1))
        with pytest.raises(InvalidArgument) as caught:
            await client.submit(spec, job_id="A-job")
    fields = {violation.field for violation in caught.value.violations}
    assert {"job_id", "job.spec.optimization.max_steps", "job.spec.optimization.learning_rate"} <= fields


async def test_data_and_models_go_up_and_come_down_whole(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "a.txt").write_bytes(b"x" * (CHUNK_BYTES + 5))
    (data / "sub" / "empty.txt").write_bytes(b"")
    async with serving(tmp_path / "service") as service, client_of(service) as client:
        data_set = await client.upload_dataset(data)
        assert (await client.upload_dataset(data)).name == data_set.name
        assert [found.id async for found in client.datasets()] == [data_set.id]
        folder = await data_set.download(tmp_path / "back")
        model = await client.upload_model(data)
        assert model.info.model_type == "bert"
        assert (await model.predict(["one", "two"]))[1].text == "two"
        assert (await model.embed(["one", "three"]))[1].values == (5.0,)
        (share,) = (await model.explain("three", max_steps=64)).attributions
        assert (share.text, share.end, share.score) == ("three", 5, 1.0)
        await model.delete()
    assert (folder / "a.txt").read_bytes() == (data / "a.txt").read_bytes()
    assert (folder / "sub" / "empty.txt").exists()


async def test_an_upload_that_broke_off_continues_from_what_arrived(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"y" * (3 * CHUNK_BYTES))
    async with serving(tmp_path / "service") as service, client_of(service) as client:
        await asyncio.to_thread(send_one_chunk_only, f"127.0.0.1:{service.port}", path)
        name = f"projects/default/datasets/{package(path, 'datasets').resource_id}"
        request = dataset_service_pb2.GetDatasetRequest(name=name)
        assert (await service.datasets.GetDataset(request)).files[0].committed_bytes > 0
        data_set = await client.upload_dataset(path)
        assert data_set.info.state == "ready"
        back = await data_set.download(tmp_path / "back")
    assert (back / "a.txt").read_bytes() == path.read_bytes()


def send_one_chunk_only(address: str, path: Path) -> None:
    """What a process does that dies during its upload."""
    from shardyard._sync.transfer import _header

    content = package(path, "datasets")
    connection = Connection(Reach(address, "default"), timeout=30, reconnect_for=0)
    first = next(iter(chunks(content.files[0], 0)))
    offset, data, crc32c = first
    made = dataset_service_pb2.CreateDatasetRequest
    messages = [
        made(header=_header(connection.parent, content)),
        made(chunk=transfer_pb2.Chunk(file_index=0, offset=offset, data=data, crc32c=crc32c)),
    ]
    with pytest.raises(grpc.RpcError):
        connection.upload(connection.datasets.CreateDataset, iter(messages))
    connection.close()


async def test_the_sync_client_does_the_same(tmp_path: Path) -> None:
    def use(address: str) -> list[str | None]:
        with Client(address) as client:
            assert client.server_info().cluster is not None
            job = client.submit(a_spec(tmp_path))
            job.cancel()
            return [event.state for event in job.watch(kinds=["state"])]

    async with serving(tmp_path) as service:
        states = await asyncio.to_thread(use, f"127.0.0.1:{service.port}")
    assert states == ["queued", "cancelled"]

"""Absent is not empty: a storage that is taken away is missed, at the start and under everything that writes to it."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

import shardyard
from helpers.processes import ends, running
from helpers.served import attempts_told, served
from helpers.service import Service, refused, serving
from helpers.small_specs import sentences
from helpers.tiny_folders import save_folder
from helpers.uploads import send_dataset
from shardyard_coordinator.launch.claim import CLAIM

UNAVAILABLE = "STORAGE_UNAVAILABLE"


@pytest.fixture
def used(tmp_path: Path) -> tuple[Path, Path]:
    """The state and the storage of a service that has a data set, and was stopped."""
    state, storage = tmp_path / "state", tmp_path / "mount"
    with running(state, SHARDYARD_STORAGE_ROOT=str(storage)) as (_, address):
        upload(address, tmp_path)
    return state, storage


def upload(address: str, folder: Path) -> None:
    source = folder / "corpus.txt"
    source.write_text("one\ntwo\n")
    with shardyard.Client(address) as client:
        client.upload_dataset(source)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("left", ["nothing", "a bare folder", "a folder with lost+found"])
def test_a_storage_whose_mount_is_missing_is_never_replaced(used: tuple[Path, Path], left: str) -> None:
    state, storage = used
    away = storage.rename(storage.with_name("away"))
    if left != "nothing":
        storage.mkdir()
    if left == "a folder with lost+found":
        (storage / "lost+found").mkdir()
    before = tree(storage) if storage.exists() else None
    said = ends(state, SHARDYARD_STORAGE_ROOT=str(storage))
    assert said.returncode == 78 and str(storage) in said.stderr and "mount it and start again" in said.stderr
    assert (tree(storage) if storage.exists() else None) == before, "nothing is made below a mount point"
    if storage.exists():
        for path in storage.iterdir():
            path.rmdir()
        storage.rmdir()
    away.rename(storage)
    with running(state, SHARDYARD_STORAGE_ROOT=str(storage)) as (_, address), shardyard.Client(address) as client:
        (dataset,) = client.datasets()
        assert (dataset.download(storage.with_name("back")) / "corpus.txt").read_text() == "one\ntwo\n"


def test_a_storage_that_is_permanently_lost_can_be_replaced_as_the_message_says(used: tuple[Path, Path]) -> None:
    state, storage = used
    storage.rename(storage.with_name("lost"))
    said = ends(state, SHARDYARD_STORAGE_ROOT=str(storage)).stderr
    store_id = said.split(" into ")[0].rsplit(" ", 1)[1]
    storage.mkdir()
    (storage / CLAIM).write_text(store_id)
    with running(state, SHARDYARD_STORAGE_ROOT=str(storage)):
        assert (storage / "jobs").is_dir()


def test_a_storage_of_a_version_that_wrote_no_claim_is_known_by_its_folders(used: tuple[Path, Path]) -> None:
    state, storage = used
    claim = (storage / CLAIM).read_text()
    (storage / CLAIM).unlink()
    with running(state, SHARDYARD_STORAGE_ROOT=str(storage)):
        assert (storage / CLAIM).read_text() == claim
    other = ends(state.with_name("other"), SHARDYARD_STORAGE_ROOT=str(storage))
    assert other.returncode == 78 and "--storage-root" in other.stderr


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(tmp_path) as service:
        yield service


async def test_an_upload_waits_while_the_storage_is_away_and_continues_when_it_is_back(service: Service) -> None:
    storage = service.parts.storage
    away = storage.rename(storage.with_name("away"))
    for bare in (False, True):
        if bare:
            storage.mkdir()
        failure = await refused(send_dataset(service, "corpus", {"a": b"abc"}))
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, UNAVAILABLE)
        assert failure.retry_after_s and "operator" in failure.message
        assert not storage.exists() or not any(storage.iterdir())
    storage.rmdir()
    away.rename(storage)
    assert (await send_dataset(service, "corpus", {"a": b"abc"})).size_bytes == 3


async def test_an_upload_that_had_no_folder_for_a_read_only_disk_continues_when_it_can_be_written(
    service: Service,
) -> None:
    folder, request_id = service.parts.storage / "datasets", str(uuid.uuid4())
    away = folder.rename(folder.with_name("away"))
    folder.write_text("in the way")  # Root may write although the mode forbids it.
    for _ in range(2):
        failure = await refused(send_dataset(service, "corpus", {"a": b"abc"}, request_id))
        assert failure.reason == "STORAGE_NOT_WRITABLE", failure.message
    folder.unlink()
    away.rename(folder)
    assert (await send_dataset(service, "corpus", {"a": b"abc"}, request_id)).size_bytes == 3


def test_models_and_data_on_a_storage_that_is_away_are_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(sentences(100)) + "\n")
    model = save_folder(tmp_path / "gpt2", "GPT2LMHeadModel")
    storage = tmp_path / "storage"
    with (
        served(tmp_path / "served", "local", "--cpus", "1", "--storage-root", str(storage)) as service,
        shardyard.Client(service.address) as client,
    ):
        kept, data = client.upload_model(model), client.upload_dataset(tmp_path / "corpus.txt")
        spec = shardyard.JobSpec(
            shardyard.CausalLm(sequence_length=16),
            model=kept,
            train_data=data,
            optimization=shardyard.Optimization(max_steps=2, global_batch_size=2),
        )
        asks = (
            lambda: kept.predict(["hello"], max_new_tokens=1),
            lambda: kept.embed(["hello"]),
            lambda: client.plan(spec),
        )
        away = storage.rename(tmp_path / "away")
        for ask in asks:
            with pytest.raises(shardyard.Unavailable) as refused:
                ask()
            assert refused.value.reason == UNAVAILABLE and "not mounted" in str(refused.value)
            assert str(tmp_path) not in str(refused.value), "where the disks of the service are is nothing to a caller"
        assert not storage.exists(), "nothing is made below a mount point"
        away.rename(storage)
        for ask in asks:
            assert ask()


def test_a_job_whose_storage_is_unmounted_ends_for_that_and_writes_nothing_below(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(sentences(300)) + "\n")
    storage = tmp_path / "mount"
    spec = shardyard.JobSpec(
        shardyard.CausalLm(sequence_length=32),
        model=shardyard.Architecture("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 16}),
        tokenizer=shardyard.TrainedTokenizer("characters"),
        train_data=tmp_path / "corpus.txt",
        optimization=shardyard.Optimization(max_steps=100_000, global_batch_size=2),
        checkpoints=shardyard.Checkpoints(every=20),
        evaluation=shardyard.EvaluationPolicy(every=100_000),
    )
    with (
        served(tmp_path, "local", "--storage-root", str(storage)) as service,
        shardyard.Client(service.address, reconnect_for=1.0) as client,
    ):
        job = client.submit(spec)
        for event in job.watch(kinds=["checkpoint"]):
            if isinstance(event.data, shardyard.types.CheckpointChanged) and event.data.step >= 20:
                break
        away = storage.rename(tmp_path / "away")
        storage.mkdir()  # What a mount leaves.
        first = next(told for told in attempts_told(job) if told.failure is not None)
        assert first.failure is not None and first.failure.reason == UNAVAILABLE
        assert "the storage root <storage> has no file `store-id`: it is not mounted" in first.failure.message
        assert str(storage) not in first.failure.message
        with pytest.raises(shardyard.ShardyardError, match="storage"):
            client.submit(dataclasses.replace(spec, checkpoints=shardyard.Checkpoints(every=30)))
        assert tree(storage) == []
        storage.rmdir()
        away.rename(storage)
        job.refresh()
        if job.state == "paused":
            job.resume()
        assert next(told.resumed_from_step for told in attempts_told(job) if told.resumed_from_step) >= 20

"""A joined cluster that never comes back: reported at once, waited for in vain, ended by a person."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import shardyard
from helpers.served import Served, served, state_dir, wait_for_step
from helpers.small_specs import sentences
from shardyard_coordinator.launch.ray_head import EmbeddedHead


@pytest.fixture
def others() -> Iterator[EmbeddedHead]:
    """A Ray that the service only joins."""
    folder = state_dir()
    head = EmbeddedHead(folder, cpus=1)
    asyncio.run(head.ensure())
    yield head
    asyncio.run(head.stop())
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def service(others: EmbeddedHead) -> Iterator[Served]:
    assert others.record is not None
    folder = state_dir()
    environment = {name: value for name, value in others.environment().items() if name.startswith("RAY_")}
    with served(folder, "ray", "--ray-address", others.record.address, environment=environment) as running:
        (running.folder / "corpus.txt").write_text("\n".join(sentences(200)) + "\n")
        yield running
    shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_that_is_gone_for_good_is_said_and_its_job_is_ended_by_a_person(
    others: EmbeddedHead, service: Served
) -> None:
    assert others.record is not None
    address = others.record.address
    with shardyard.Client(service.address) as client:
        job = client.submit(long_job(service.folder), job_id="story")
        wait_for_step(job, 2)
        refused = service.run("shardyard", "cancel", "--lost", "story")
        assert refused.returncode == 1 and "its gang can be reached, so it is not lost" in refused.stderr
        end_for_good(others)
        cluster = client.server_info().cluster
        assert cluster is not None and cluster.state == "unreachable"
        assert "not answer" in cluster.message
        said = condition_of(job)
    assert said.startswith("attempt 1 on ") and "has not answered since" in said
    assert f"the cluster at {address} does not answer" in said and "`shardyard cancel --lost story`" in said
    doctor = service.run("shardyard", "doctor")
    assert doctor.returncode == 1 and "broken  cluster: ray unreachable" in doctor.stdout

    stop = service.run("shardyard", "stop", "--cancel-jobs", timeout_s=45)
    assert stop.returncode == 0, stop.stderr
    first, *_, last = stop.stdout.splitlines()
    assert first == "story is being cancelled; its gang does not answer, so the next start asks it again"
    assert last.endswith("end its job at the next start: shardyard cancel --lost story")
    assert service.process is not None and service.process.wait(10) == 0

    service.start()
    with shardyard.Client(service.address) as client:
        assert f"Ray at {address} cannot be reached; start it there" in words_of_the_cluster(client)
        job = client.job("story")
        assert job.refresh().state == "cancelling" and "has not answered since" in condition_of(job)
        ended = service.run("shardyard", "cancel", "--lost", "story")
        assert (ended.returncode, ended.stdout) == (0, "story is cancelled\n")
        *_, last_event = job.watch()
        assert "cancelling → cancelled: attempt 1 was declared lost by local" in str(last_event)
    log = (service.folder / "serve.log").read_text()
    assert f"1 attempt left to the cluster at {address}; `shardyard serve` takes up again" in log
    assert "projects/default/jobs/story: attempt 1 was declared lost by local" in log


def long_job(folder: Path) -> shardyard.JobSpec:
    return shardyard.JobSpec(
        shardyard.CausalLm(sequence_length=32),
        model=shardyard.Architecture("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 32}),
        tokenizer=shardyard.TrainedTokenizer("characters"),
        train_data=folder / "corpus.txt",
        optimization=shardyard.Optimization(max_steps=1_000_000, global_batch_size=2),
    )


def end_for_good(head: EmbeddedHead) -> None:
    """As a machine that is switched off: nothing of it says a word."""
    assert head.record is not None
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == head.record.pid:
                process.kill()


def condition_of(job: shardyard.Job) -> str:
    """What is said of its gang, once it is."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for condition in job.refresh().conditions:
            if condition.type == "unreachable":
                return condition.message
        time.sleep(0.1)
    raise AssertionError("nothing is said of a gang that does not answer")


def words_of_the_cluster(client: shardyard.Client) -> str:
    """What the service says of it, once it has tried to reach it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        cluster = client.server_info().cluster
        if cluster is not None and "cannot be reached" in cluster.message:
            return cluster.message
        time.sleep(0.2)
    raise AssertionError("nothing is said of a cluster that does not answer")

"""The whole service on its embedded Ray: what is killed comes back; nothing of a job is lost, doubled or changed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import shardyard
from helpers.confined import is_confined, is_warm
from helpers.launches import runs
from helpers.served import BIN, Served, interrupt, pids_of, rank_pids, served, state_dir, wait_for_step
from helpers.small_specs import sentences
from shardyard_coordinator.launch.confine import landlock_version

STEPS = 300
WATCHED_S = 240.0


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    folder = state_dir()
    with served(folder, "ray") as running:
        (running.folder / "corpus.txt").write_text("\n".join(sentences(400)) + "\n")
        yield running
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def client(service: Served) -> Iterator[shardyard.Client]:
    with shardyard.Client(service.address) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(service: Served) -> list[tuple[int, float]]:
    with shardyard.Client(service.address) as client:
        job = submit(client, service, "undisturbed")
        assert job.wait(timeout=WATCHED_S).state == "succeeded"
        return losses(job)


def submit(client: shardyard.Client, service: Served, job_id: str) -> shardyard.Job:
    """Two workers at ZeRO-1 with dropout: a resume that is not exact shows in the losses."""
    spec = shardyard.JobSpec(
        shardyard.CausalLm(sequence_length=64),
        model=shardyard.Architecture("gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 64}, dropout=0.1),
        tokenizer=shardyard.TrainedTokenizer("characters"),
        train_data=service.folder / "corpus.txt",
        optimization=shardyard.Optimization(max_steps=STEPS, global_batch_size=8, learning_rate=1e-3, seed=5),
        resources=shardyard.Resources(workers=2),
        checkpoints=shardyard.Checkpoints(every=50),
        evaluation=shardyard.EvaluationPolicy(every=100),
    )
    return client.submit(spec, job_id=job_id)


def losses(job: shardyard.Job) -> list[tuple[int, float]]:
    """(step, loss) of every step; the highest attempt wins a step."""
    return [(point.step, point.value) for point in job.metrics("loss", max_points=STEPS)["loss"].points]


@pytest.mark.skipif(landlock_version() < 2, reason="the kernel's Landlock has no rules for ranks")
def test_ranks_are_confined_and_know_nothing_of_ray(service: Served, client: shardyard.Client) -> None:
    job = submit(client, service, "confined")
    wait_for_step(job, 1)
    ranks = [psutil.Process(pid) for pid in rank_pids(service.state, job.uid).values()]
    assert len(ranks) == 2 and all(is_confined(rank) for rank in ranks)
    assert all(is_warm(rank) for rank in ranks)
    assert not [name for rank in ranks for name in rank.environ() if name.startswith("RAY_")]
    opened = {file.path for rank in ranks for file in rank.open_files()}
    assert not [path for path in opened if "/ray/" in path.removeprefix(str(service.state))]
    assert all(rank.rlimit(psutil.RLIMIT_CORE) == (0, 0) for rank in ranks)
    job.cancel()
    assert job.wait(timeout=WATCHED_S, check=False).state == "cancelled"
    done = service.run(str(BIN / "shardyard"), "doctor")
    assert "ranks read the same" in " ".join(done.stdout.split())


class Watcher:
    """Collects a job's events in the background, as one stream."""

    def __init__(self, service: Served, job_id: str) -> None:
        self.sequences: list[int] = []
        self.states: list[str] = []
        self._thread = threading.Thread(target=self._watch, args=(service.address, job_id), daemon=True)
        self._thread.start()

    def _watch(self, address: str, job_id: str) -> None:
        with shardyard.Client(address) as client:
            for event in client.job(job_id).watch():
                self.sequences.append(event.sequence)
                if event.state:
                    self.states.append(event.state)

    def ended(self) -> list[int]:
        """The sequences seen, once the stream has ended by itself."""
        self._thread.join(WATCHED_S)
        assert not self._thread.is_alive()
        return self.sequences


def assert_gapless(watcher: Watcher, job: shardyard.Job) -> None:
    assert watcher.ended() == list(range(1, job.refresh().last_event_sequence + 1))


def test_a_killed_worker_costs_nothing_but_the_steps_since_its_checkpoint(
    service: Served, client: shardyard.Client, undisturbed: list[tuple[int, float]]
) -> None:
    job = submit(client, service, "worker-killed")
    watcher = Watcher(service, job.id)
    wait_for_step(job, 120)
    interrupt(rank_pids(service.state, job.uid)[1])
    assert job.wait(timeout=WATCHED_S).state == "succeeded"
    first, second = job.attempts()
    assert first.failure is not None
    assert (first.failure.reason, first.failure.rank) == ("WORKER_LOST", 1)
    assert second.resumed_from_step >= 100
    assert losses(job) == undisturbed
    assert "recovering" in watcher.states or watcher.ended()
    assert_gapless(watcher, job)


def test_a_killed_coordinator_stops_no_training_and_loses_no_event(
    service: Served, client: shardyard.Client, undisturbed: list[tuple[int, float]]
) -> None:
    job = submit(client, service, "coordinator-killed")
    watcher = Watcher(service, job.id)
    wait_for_step(job, 60)
    ranks = rank_pids(service.state, job.uid)
    service.kill()
    service.start()
    assert job.wait(timeout=WATCHED_S).state == "succeeded"
    assert job.refresh().attempt_count == 1
    assert len(ranks) == 2
    assert losses(job) == undisturbed
    assert_gapless(watcher, job)


def test_nothing_listens_beyond_loopback_while_a_gang_trains(service: Served, client: shardyard.Client) -> None:
    job = submit(client, service, "sockets")
    wait_for_step(job, 20)
    pids = pids_of(service.state) | set(rank_pids(service.state, job.uid).values())
    listening = [
        connection
        for connection in psutil.net_connections(kind="inet")
        if connection.pid in pids and connection.status in {psutil.CONN_LISTEN, psutil.CONN_NONE}
    ]
    job.cancel()
    assert job.wait(timeout=60, check=False).state == "cancelled"
    assert len(listening) >= 5
    assert {connection.laddr.ip for connection in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_killed_gcs_takes_the_gang_but_neither_the_service_nor_the_job(
    service: Served, client: shardyard.Client, undisturbed: list[tuple[int, float]]
) -> None:
    job = submit(client, service, "gcs-killed")
    watcher = Watcher(service, job.id)
    wait_for_step(job, 60)
    (gcs,) = [pid for pid in pids_of(service.state) if _name(pid) == "gcs_server"]
    interrupt(gcs)
    assert job.wait(timeout=WATCHED_S).state == "succeeded"
    assert service.process is not None
    assert service.process.poll() is None
    assert job.attempts()[0].failure is not None
    assert job.refresh().attempt_count == 2
    assert losses(job) == undisturbed
    assert_gapless(watcher, job)


@pytest.mark.prove
def test_when_everything_is_killed_at_once_the_next_start_continues_from_the_checkpoint(
    service: Served, client: shardyard.Client, undisturbed: list[tuple[int, float]]
) -> None:
    job = submit(client, service, "all-killed")
    watcher = Watcher(service, job.id)
    wait_for_step(job, 120)
    assert service.process is not None
    ranks = set(rank_pids(service.state, job.uid).values())
    everything = pids_of(service.state) | ranks
    assert len(ranks) == 2 and {"raylet", "gcs_server"} <= {_name(pid) for pid in everything}
    # Stopped first: none of them sees another one end.
    for way in (signal.SIGSTOP, signal.SIGKILL):
        for pid in everything:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, way)
    service.process.wait()
    service.start()
    assert job.wait(timeout=WATCHED_S).state == "succeeded"
    first, second = job.attempts()
    assert first.failure is not None and first.failure.reason == "RAY_LOST"
    assert second.resumed_from_step >= 100
    assert losses(job) == undisturbed
    assert_gapless(watcher, job)
    assert not [pid for pid in everything if runs(pid)]


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()

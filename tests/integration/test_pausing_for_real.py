"""Real jobs are paused and resumed, by a person and because a person has to act: nothing of them is different."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import shardyard
from helpers.served import Served, rank_pids, served, wait_for_step
from helpers.small_specs import sentences
from helpers.tiny_folders import save_folder


def a_training(folder: Path, *, steps: int = 800, **changes: object) -> shardyard.JobSpec:
    (folder / "corpus.txt").write_text("\n".join(sentences(300)) + "\n")
    spec = shardyard.JobSpec(
        shardyard.CausalLm(sequence_length=64),
        model=shardyard.Architecture("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 32}),
        tokenizer=shardyard.TrainedTokenizer("characters"),
        train_data=folder / "corpus.txt",
        optimization=shardyard.Optimization(max_steps=steps, global_batch_size=4),
        checkpoints=shardyard.Checkpoints(every=1000),
        evaluation=shardyard.EvaluationPolicy(every=1000),
    )
    return replace(spec, **changes)


def test_a_pause_and_a_killed_service_change_no_loss(tmp_path: Path) -> None:
    spec = a_training(tmp_path)
    with served(tmp_path, "local") as service, shardyard.Client(service.address) as client:
        job = client.submit(spec, job_id="mine")
        wait_for_step(job, 30)
        assert job.pause().state == "pausing"
        asked = service.run("shardyard", "pause", "mine")
        assert asked.stdout.startswith("mine is paus"), asked.stderr
        _until(job, "paused")
        cluster = client.server_info().cluster
        assert cluster is not None and cluster.free_slots == cluster.slots
        paused_at = job.checkpoints()[0].step
        assert 30 <= paused_at < 800
        service.kill()
        service.start()
        assert job.refresh().state == "paused"
        assert "cancel it first" in service.run("shardyard", "delete", "mine").stderr
        assert "mine is queued" in service.run("shardyard", "resume", "mine").stdout
        assert job.wait(timeout=120).state == "succeeded"
        assert [attempt.resumed_from_step for attempt in job.attempts()] == [0, paused_at]
        assert job.info.usage is not None and job.info.usage.recomputed_steps == 0
        undisturbed = client.submit(spec)
        undisturbed.wait(timeout=120)
        assert _losses(job) == _losses(undisturbed)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with served(folder, "local", "--data-root", str(folder)) as running:
        yield running


def test_a_service_that_is_killed_while_a_job_pauses_leaves_it_paused(service: Served) -> None:
    with shardyard.Client(service.address) as client:
        job = client.submit(a_training(service.folder, checkpoints=shardyard.Checkpoints(every=20)))
        wait_for_step(job, 25)
        job.pause()
        service.kill()
        service.start()
        _until(job, "paused")
        assert job.resume().state == "queued"
        assert job.wait(timeout=120).state == "succeeded"
        assert job.attempts()[1].resumed_from_step >= 20


def test_a_rank_that_was_stopped_is_seen_in_the_job_and_the_job_continues_when_it_is_continued(service: Served) -> None:
    with shardyard.Client(service.address) as client:
        job = client.submit(a_training(service.folder))
        wait_for_step(job, 5)
        pid = rank_pids(service.state, job.uid)[0]
        os.kill(pid, signal.SIGSTOP)
        try:
            held = next(each.data for each in job.watch() if isinstance(each.data, shardyard.types.Condition))
            assert (held.type, held.active) == ("stalled", True) and f"kill -CONT {pid}" in held.message
            assert f"kill -CONT {pid}" in service.run("shardyard", "get", job.id).stdout
        finally:
            os.kill(pid, signal.SIGCONT)
        assert job.wait(timeout=120).state == "succeeded"
        assert not job.info.conditions and len(job.attempts()) == 1


def test_an_export_that_the_storage_did_not_take_is_made_again_without_training(service: Served) -> None:
    models, aside = service.state / "storage" / "models", service.state / "aside"
    with shardyard.Client(service.address) as client:
        job = client.submit(a_training(service.folder, steps=300, retry=shardyard.Retry(max=0)))
        wait_for_step(job, 3)
        models.rename(aside)
        models.write_text("in the way")
        _until(job, "paused")
        failure = job.refresh().failure
        models.unlink()
        aside.rename(models)
        assert failure is not None and failure.reason == "EXPORT_FAILED"
        assert f"shardyard resume {job.id}" in failure.next_step
        job.resume()
        assert job.wait(timeout=120).state == "succeeded"
        points = job.metrics("loss", all_attempts=True)["loss"].points
        assert [attempt.resumed_from_step for attempt in job.attempts()] == [0, 300]
        assert {point.attempt for point in points} == {1}
        assert job.model().predict(["a"])


def test_data_that_was_changed_in_a_pause_is_refused_until_it_is_put_back(service: Served) -> None:
    spec = a_training(service.folder)
    data = service.folder / "mine.txt"
    text = (service.folder / "corpus.txt").read_text()
    data.write_text(text)
    with shardyard.Client(service.address) as client:
        job = client.submit(replace(spec, train_data=f"server:{data}"))
        wait_for_step(job, 30)
        job.pause()
        cursor = _until(job, "paused")
        data.write_text(text.replace("a", "b"))
        job.resume()
        cursor = _until(job, "paused", cursor)
        failure = job.refresh().failure
        assert failure is not None and failure.reason == "DATA_CHANGED"
        assert f"mine.txt (spec.train_data) has other content ({len(text):,} bytes; it had" in failure.message
        assert "bring back what was there" in failure.next_step and "shardyard resume" in failure.next_step
        data.write_text(text)
        job.resume()
        assert job.wait(timeout=120).state == "succeeded"
        assert job.attempts()[-1].resumed_from_step >= 30


def test_a_feature_extraction_continues_after_the_files_that_it_has_made(service: Served) -> None:
    save_folder(service.folder / "bert", "BertModel")
    rows = [f"the dog is {'very ' * (index % 20)}good" for index in range(40_000)]
    (service.folder / "texts.csv").write_text("\n".join(["text", *rows]) + "\n")
    task = shardyard.FeatureExtraction(service.folder / "texts.csv", output="last_hidden_state")
    with shardyard.Client(service.address) as client:
        job = client.submit(shardyard.JobSpec(task, model=service.folder / "bert"))
        wait_for_step(job, 2)
        job.pause()
        _until(job, "paused")
        made = job.attempts()[0].last_step
        assert job.resume().state == "queued"
        assert job.wait(timeout=120).state == "succeeded"
        assert job.attempts()[1].resumed_from_step >= made >= 2
        target = service.folder / "out"
        job.output_dataset().download(target)
    assert pq.read_table(target).column("row").to_pylist() == list(range(len(rows)))


def _until(job: shardyard.Job, state: str, after: int = 0) -> int:
    """Watches until the job is in a state; the cursor of that event."""
    for event in job.watch(kinds=["state"], after=after):
        if event.state == state:
            return event.sequence
    raise AssertionError(f"{job.id} ended as {job.refresh().state}")


def _losses(job: shardyard.Job) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in job.metrics("loss")["loss"].points]

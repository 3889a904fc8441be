"""Data that is no longer what a job was submitted with ends the job before its first step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.small_specs import locations
from shardyard.v1 import plan_pb2, spec_pb2
from shardyard_trainer.failures import RunFailed
from shardyard_trainer.planning.identity import check_same_data, data_fingerprint


def accepted(folder: Path) -> tuple[spec_pb2.JobSpec, plan_pb2.JobPlan]:
    for name in ("train.csv", "eval.csv"):
        (folder / name).write_text("text,label\nfine,1\n")
    spec = spec_pb2.JobSpec(
        train_data=spec_pb2.DataSource(uri=str(folder / "train.csv")),
        eval_data=spec_pb2.DataSource(uri=str(folder / "eval.csv")),
    )
    return spec, plan_pb2.JobPlan(data_fingerprint=data_fingerprint(spec, locations(folder)))


def test_the_same_bytes_are_the_same_data_whenever_they_were_written(tmp_path: Path) -> None:
    spec, plan = accepted(tmp_path)
    os.utime(tmp_path / "train.csv", (1, 1))
    check_same_data(spec, locations(tmp_path), plan)
    assert data_fingerprint(spec, locations(tmp_path)) == plan.data_fingerprint


@pytest.mark.parametrize("name", ["train.csv", "eval.csv"])
def test_other_bytes_are_data_changed(tmp_path: Path, name: str) -> None:
    spec, plan = accepted(tmp_path)
    (tmp_path / name).write_text("text,label\nfine,2\n")
    with pytest.raises(RunFailed) as failed:
        check_same_data(spec, locations(tmp_path), plan)
    assert failed.value.cause == "DATA_CHANGED"
    assert failed.value.metadata["fingerprint"] not in ("", plan.data_fingerprint)


def test_a_file_that_went_is_data_not_found(tmp_path: Path) -> None:
    spec, plan = accepted(tmp_path)
    (tmp_path / "eval.csv").unlink()
    with pytest.raises(RunFailed) as failed:
        check_same_data(spec, locations(tmp_path), plan)
    assert failed.value.cause == "DATA_NOT_FOUND"


def test_a_plan_without_a_fingerprint_is_compared_with_nothing(tmp_path: Path) -> None:
    spec, _ = accepted(tmp_path)
    (tmp_path / "train.csv").unlink()
    plan = plan_pb2.JobPlan()
    check_same_data(spec, locations(tmp_path), plan)
    assert plan.data_fingerprint == ""


def test_a_later_attempt_says_which_files_are_not_the_same_any_more(tmp_path: Path) -> None:
    data, job_dir = tmp_path / "data", tmp_path / "job"
    for folder in (data, job_dir):
        folder.mkdir()
    for name in "abcd":
        (data / f"{name}.csv").write_text("text,label\nfine,1\n")
    spec = spec_pb2.JobSpec(train_data=spec_pb2.DataSource(uri=str(data)))
    plan = plan_pb2.JobPlan(data_fingerprint=data_fingerprint(spec, locations(tmp_path)))
    (data / "a.csv").write_text("text,label\nfine,2\n")
    assert _changed(spec, plan, tmp_path, job_dir).endswith("when the job was submitted")
    (data / "a.csv").write_text("text,label\nfine,1\n")
    for _ in range(2):
        check_same_data(spec, locations(tmp_path), plan, job_dir=str(job_dir))
    (data / "a.csv").write_text("text,label\nfine,2\n")
    (data / "b.csv").write_text("text,label\nfine,1\nawful,0\n")
    (data / "c.csv").rename(data / "e.csv")
    assert _changed(spec, plan, tmp_path, job_dir).partition(": ")[2] == (
        "a.csv (spec.train_data) has other content (18 bytes; it had 18); "
        "b.csv (spec.train_data) has other content (26 bytes; it had 18); "
        "c.csv (spec.train_data) is gone; e.csv (spec.train_data) is new"
    )
    for name in ("f", "g"):
        (data / f"{name}.csv").write_text("text,label\nfine,1\n")
    assert _changed(spec, plan, tmp_path, job_dir).endswith("f.csv (spec.train_data) is new; and 1 more")
    (job_dir / "data-files.json").write_text("not a list")
    assert _changed(spec, plan, tmp_path, job_dir).endswith("when the job was submitted")


def _changed(spec: spec_pb2.JobSpec, plan: plan_pb2.JobPlan, folder: Path, job_dir: Path) -> str:
    with pytest.raises(RunFailed) as failed:
        check_same_data(spec, locations(folder), plan, job_dir=str(job_dir))
    assert failed.value.cause == "DATA_CHANGED" and "submit the job again" in failed.value.next_step
    return failed.value.message

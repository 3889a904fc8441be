"""Causes and their verdicts, and what a scanned storage says."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from helpers.manifests import write_manifest
from shardyard.v1 import job_pb2
from shardyard_coordinator.control.ending import cause_of
from shardyard_coordinator.control.manifests import find_checkpoints
from shardyard_coordinator.control.retention import remove_checkpoint
from shardyard_coordinator.domain.advice import ADVICE
from shardyard_coordinator.domain.causes import VERDICTS, Cause


def test_every_cause_has_a_verdict_and_an_advice() -> None:
    assert set(VERDICTS) == set(ADVICE) == set(Cause)


def test_an_unrecognised_cause_is_unknown() -> None:
    assert cause_of(job_pb2.FailureReport(reason="NEW_THING")) is Cause.UNKNOWN
    assert cause_of(job_pb2.FailureReport(reason="WORKER_LOST")) is Cause.WORKER_LOST


@pytest.mark.parametrize("cause", list(Cause))
def test_back_off_is_bounded_and_never_negative(cause: Cause) -> None:
    rng = random.Random(1)
    assert all(0 <= VERDICTS[cause].backoff(n, rng) <= 300 for n in range(1, 40))


def test_a_lost_worker_is_tried_for_ever_while_checkpoints_are_made_and_five_times_without() -> None:
    lost = VERDICTS[Cause.WORKER_LOST]
    assert lost.may_retry(1000, made_progress=True)
    assert [lost.may_retry(n, made_progress=False) for n in (1, 5, 6)] == [True, True, False]


def test_whole_checkpoints_of_earlier_attempts_are_found(tmp_path: Path) -> None:
    write_manifest(tmp_path, "j", step=10)
    write_manifest(tmp_path, "j", step=20, epoch=2)
    write_manifest(tmp_path, "j", step=30, epoch=3)
    found = find_checkpoints(tmp_path, "j", below_epoch=3)
    assert [(each.epoch, each.step, each.size_bytes, each.workers) for each in found] == [(1, 10, 7, 2), (2, 20, 7, 2)]


@pytest.mark.parametrize("changes", [{"size_bytes": 8}, {"zero_stage": 3}, {"sha256": ""}, {"world_size": 3}])
def test_a_changed_manifest_is_not_a_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_manifest(tmp_path, "j", step=10, **changes)
    assert find_checkpoints(tmp_path, "j", below_epoch=9) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"sha256": 1}'])
def test_bytes_that_are_not_a_manifest_are_skipped(tmp_path: Path, content: bytes) -> None:
    write_manifest(tmp_path, "j", step=10).write_bytes(content)
    assert find_checkpoints(tmp_path, "j", below_epoch=9) == []


def test_a_checkpoint_is_removed_manifest_first_and_again_without_error(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "j", step=10)
    remove_checkpoint(path.parent)
    remove_checkpoint(path.parent)
    assert not path.parent.exists()


def test_a_whole_manifest_in_another_jobs_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    write_manifest(tmp_path, "other", step=10)
    assert find_checkpoints(tmp_path, "j", below_epoch=9) == []

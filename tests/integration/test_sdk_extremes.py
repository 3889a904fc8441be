"""Whatever values a service sends, the SDK reads them and the command line shows them: one odd row hides no other."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message

import shardyard
from helpers.extreme_messages import extreme
from helpers.script import Script
from helpers.scripted_service import a_job, serving
from shardyard import _lines, types
from shardyard._convert import read, read_event, read_prediction
from shardyard._convert import to_plain as spec_to_plain
from shardyard.cli.app import run
from shardyard.cli.plain import event_to_plain, to_plain
from shardyard.cli.plan_view import print_plan
from shardyard.v1 import (
    checkpoint_service_pb2,
    dataset_service_pb2,
    job_pb2,
    log_service_pb2,
    metric_service_pb2,
    model_service_pb2,
    plan_pb2,
    server_service_pb2,
)

SEEDS = 60
KINDS: list[tuple[type[Message], Callable[[Any], Any]]] = [
    (job_pb2.Job, lambda message: read(types.JobInfo, message)),
    (plan_pb2.JobPlan, lambda message: read(types.Plan, message)),
    (job_pb2.Attempt, lambda message: read(types.Attempt, message)),
    (checkpoint_service_pb2.Checkpoint, lambda message: read(types.Checkpoint, message)),
    (model_service_pb2.Model, lambda message: read(types.ModelInfo, message)),
    (dataset_service_pb2.Dataset, lambda message: read(types.DatasetInfo, message)),
    (server_service_pb2.ServerInfo, lambda message: read(types.ServerInfo, message)),
    (log_service_pb2.LogLine, lambda message: read(types.LogLine, message)),
    (metric_service_pb2.MetricSeries, lambda message: read(types.MetricSeries, message)),
    (model_service_pb2.Prediction, read_prediction),
    (model_service_pb2.Embedding, lambda message: read(types.Embedding, message)),
]


@pytest.mark.parametrize(("kind", "reader"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
def test_every_message_is_read_and_written_as_json(kind: type[Message], reader: Callable[[Any], Any]) -> None:
    for seed in range(SEEDS):
        message = extreme(kind, random.Random(seed))
        plain = to_plain(reader(message))
        assert json.loads(json.dumps(plain, allow_nan=False)) is not None
        assert spec_to_plain(message) is not None


def test_every_event_is_a_line_and_json() -> None:
    for seed in range(10 * SEEDS):
        event = read_event(extreme(job_pb2.JobEvent, random.Random(seed)))
        assert _lines.event_line(event)
        json.dumps(event_to_plain(event), allow_nan=False)


def test_every_plan_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(SEEDS):
        print_plan(read(types.Plan, extreme(plan_pb2.JobPlan, random.Random(seed))))
        assert "\x1b" not in capsys.readouterr().out


def odd_jobs() -> list[job_pb2.Job]:
    """Extreme jobs, with names that a list can have, and one like any other."""
    found = []
    for seed in range(30):
        job = extreme(job_pb2.Job, random.Random(seed))
        job.name = f"projects/default/jobs/odd-{seed}"
        found.append(job)
    return [*found, a_job()]


def test_lists_gets_and_watches_work_over_odd_rows(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = odd_jobs()
    events = []
    for sequence in range(1, 60):
        event = extreme(job_pb2.JobEvent, random.Random(sequence))
        event.sequence = sequence
        for ending in ("state", "deleted"):
            event.ClearField(ending)
        events.append(event)
    events[-1].state.to = job_pb2.STATE_SUCCEEDED
    with serving(Script(jobs=jobs, events=events)) as address:
        for extra in ([], ["--json"]):
            assert run(["jobs", "--address", address, *extra]) == 0
            shown = capsys.readouterr().out
            assert "odd-29" in shown and a_job().name.rsplit("/", 1)[-1] in shown
    for job in jobs:
        job.state = job_pb2.STATE_SUCCEEDED
        with serving(Script(job=job, events=events)) as address:
            assert run(["get", job.name, "--address", address]) == 0
        assert "\x1b" not in capsys.readouterr().out
    with serving(Script(job=jobs[0], events=events)) as address:
        assert run(["watch", jobs[0].name, "--address", address]) == 0
        with shardyard.Client(address) as client:
            assert [event.sequence for event in client.job(jobs[0].name).watch()] == list(range(1, 60))

"""The command line as people and programs use it: a process, its output, its exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from helpers.command import COMMAND, shardyard
from helpers.script import Failure, Script
from helpers.scripted_service import a_job, a_story, serving
from shardyard.cli.app import run
from shardyard.v1 import job_pb2, log_service_pb2, metric_service_pb2, model_service_pb2

SPEC = """\
job_id: mine
job:
  spec:
    fine_tuning:
      text_classification: {pooling: mean}
    model: hub:owner/bert
    train_data: {uri: reviews.csv, columns: {text: review}}
    optimization:
      epochs: 2
"""


def a_spec(folder: Path, text: str = SPEC) -> Path:
    (folder / "reviews.csv").write_text("review,label\ngood,1\n")
    path = folder / "spec.yaml"
    path.write_text(text)
    return path


def test_a_spec_file_is_submitted_and_followed_to_its_end(tmp_path: Path) -> None:
    script = Script(events=a_story(), state_after_create=job_pb2.STATE_SUCCEEDED)
    with serving(script) as address:
        done = shardyard(address, "submit", str(a_spec(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert "submitted mine" in done.stdout
    assert "step 3/6" in done.stdout
    assert "mine succeeded" in done.stdout
    spec = script.asked("CreateJob")[0].job.spec
    assert spec.train_data.dataset.startswith("projects/default/datasets/d-")
    assert spec.train_data.columns["text"] == "review"


def test_detach_returns_at_once_and_says_how_to_look(tmp_path: Path) -> None:
    script = Script(events=a_story())
    with serving(script) as address:
        done = shardyard(address, "submit", str(a_spec(tmp_path)), "--detach", "--set", "spec.optimization.epochs=3")
    assert (done.returncode, done.stdout.splitlines()[-1].strip()) == (0, "shardyard watch mine")
    assert script.asked("CreateJob")[0].job.spec.optimization.epochs == 3
    assert script.asked("WatchJob") == []


def test_flags_alone_make_a_job(tmp_path: Path) -> None:
    script = Script()
    (tmp_path / "reviews.csv").write_text("review,sentiment\ngood,1\n")
    with serving(script) as address:
        done = shardyard(
            address, "submit", "--detach", "--task", "text-classification", "--model", "hub:owner/bert",
            "--train", str(tmp_path / "reviews.csv"), "--text", "review", "--label", "sentiment", "--epochs", "2",
            "--workers", "2", "--lr", "1e-4", "--pooling", "mean", "--max-length", "64", "--priority", "high",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = script.asked("CreateJob")[0].job
    assert job.priority == job_pb2.PRIORITY_HIGH
    assert job.spec.fine_tuning.text_classification.pooling == 1
    assert (job.spec.fine_tuning.text_classification.max_length, job.spec.resources.workers) == (64, 2)
    assert dict(job.spec.train_data.columns) == {"text": "review", "label": "sentiment"}


def test_each_flag_of_a_column_goes_where_the_contract_has_it(tmp_path: Path) -> None:
    script, model = Script(), ("--detach", "--model", "hub:owner/bert")
    classify = ("--task", "text-classification", "--train", "server:/d", "--text", "comment", "--text-pair", "reply")
    extract = ("--task", "feature-extraction", "--data", "server:/d", "--text", "comment", "--text-pair", "reply")
    with serving(script) as address:
        for flags in ((*classify, "--label-column", "toxic", "--label-column", "insult"), extract):
            done = shardyard(address, "submit", *model, *flags)
            assert done.returncode == 0, done.stderr
    first, second = (request.job.spec for request in script.asked("CreateJob"))
    assert list(first.fine_tuning.text_classification.label_columns) == ["toxic", "insult"]
    assert dict(first.train_data.columns) == {"text": "comment", "text_pair": "reply"}
    assert dict(second.feature_extraction.data.columns) == {"text": "comment", "text_pair": "reply"}


def test_flags_override_a_file_and_keep_its_other_fields(tmp_path: Path) -> None:
    script = Script()
    (tmp_path / "other.csv").write_text("review,label\nbad,0\n")
    with serving(script) as address:
        done = shardyard(
            address, "submit", str(a_spec(tmp_path)), "--detach", "--train", str(tmp_path / "other.csv"), "--lr", "0"
        )
    assert done.returncode == 0, done.stderr
    spec = script.asked("CreateJob")[0].job.spec
    assert spec.train_data.columns["text"] == "review"
    assert spec.optimization.HasField("learning_rate") and spec.optimization.learning_rate == 0
    assert [header.files[0].path for header in script.headers.values()] == ["other.csv"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a spec file, or flags"),
        (("nope.yaml",), "cannot be read"),
        (("--task", "x"), "is none of text-classification"),
        (("--pooling", "mean"), "give --task as well"),
        (("--task", "causal-lm", "--train", "nope.txt"), "no such file or folder"),
        (("--nope",), "No such option"),
        (("--task", "causal-lm", "--set", "x"), "write a path and a value"),
    ],
)
def test_wrong_usage_ends_with_2_and_sends_nothing(arguments: tuple[str, ...], words: str) -> None:
    done = shardyard("127.0.0.1:1", "submit", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = a_spec(tmp_path, SPEC.replace("epochs: 2", "epoch: 2"))
    done = shardyard("127.0.0.1:1", "submit", str(path))
    assert done.returncode == 2
    assert "job.spec.optimization.epoch: unknown field `epoch`; did you mean `epochs`? (spec.yaml:9)" in done.stderr


def test_what_the_service_refuses_is_named_with_its_line_too(tmp_path: Path) -> None:
    refused = Failure(
        grpc.StatusCode.INVALID_ARGUMENT,
        "SPEC_INVALID",
        violations=[("job.spec.optimization.epochs", "`2` is too many", "SPEC_INVALID")],
    )
    with serving(Script(failures={"CreateJob": [refused]})) as address:
        done = shardyard(address, "submit", str(a_spec(tmp_path)), "--detach")
    assert done.returncode == 1
    assert "job.spec.optimization.epochs: `2` is too many (spec.yaml:9)" in done.stderr


def test_a_job_that_fails_ends_the_watch_with_1() -> None:
    job = a_job(state=job_pb2.STATE_FAILED)
    job.failure.reason, job.failure.message, job.failure.log_tail = "DATA_CHANGED", "It changed.", "last\x1b[31m words"
    events = a_story()[:3]
    events.append(job_pb2.JobEvent(sequence=4, state=job_pb2.StateChanged(to=job_pb2.STATE_FAILED)))
    with serving(Script(job=job, events=events)) as address:
        done = shardyard(address, "watch", "story")
    assert done.returncode == 1
    assert "DATA_CHANGED: It changed." in done.stdout
    assert "last\\x1b[31m words" in done.stdout and "\x1b" not in done.stdout


def test_watch_prints_json_lines_for_programs() -> None:
    script = Script(job=a_job(state=job_pb2.STATE_SUCCEEDED), events=a_story())
    with serving(script) as address:
        done = shardyard(address, "watch", "story", "--json", "--after", "3")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["sequence"] for line in lines] == list(range(4, 12))
    assert lines[0]["progress"]["step"] == 1


@pytest.mark.parametrize(("project", "name"), [("default", "story"), ("nlp", "projects/nlp/jobs/story")])
def test_ctrl_c_leaves_the_job_alone_and_says_how_to_watch_again(project: str, name: str) -> None:
    script = Script(job=a_job(f"projects/{project}/jobs/story"), events=a_story()[:7], hold=True)
    with serving(script) as address:
        # A shell starts what runs in the background with SIGINT ignored, and whatever that starts, too.
        heeds = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {COMMAND[-1]}"
        process = subprocess.Popen(
            [*COMMAND[:-1], heeds, "watch", "story", "--project", project, "--address", address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        seen = ""
        while "step 4/6" not in seen:
            seen += process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=10)
        assert process.returncode == 130
        # What was printed last may be printed again, never left out.
        again = re.search(rf"shardyard (watch {name} --after [67] --address {address})\n", out)
        assert again, out
        assert "Traceback" not in error
        assert script.asked("CancelJob") == []
        script.hold, script.events, script.job.state = False, a_story(), job_pb2.STATE_SUCCEEDED
        script.job.model, script.job.output_dataset = f"projects/{project}/models/m", f"projects/{project}/datasets/d"
        script.ready, script.inputs = {"m"}, ("text", "pair")
        done = shardyard("127.0.0.1:1", *again[1].split())
    assert done.returncode == 0, done.stderr
    model, data_set = ("m", "dataset:d") if project == "default" else (script.job.model, script.job.output_dataset)
    assert [line.strip() for line in done.stdout.splitlines()[-3:]] == [
        f"shardyard predict {model} 'some text' --address {address}",
        f"shardyard download {model} ./m --address {address}",
        f"shardyard download {data_set} ./d --address {address}",
    ]


def test_a_job_is_paused_and_resumed_and_the_next_command_is_printed() -> None:
    with serving(Script(job=a_job())) as address:
        paused = shardyard(address, "pause", "story")
        resumed = shardyard(address, "resume", "story")
        as_json = shardyard(address, "pause", "story", "--json")
    assert paused.stdout.splitlines() == ["story is pausing", "  shardyard resume story"]
    assert resumed.stdout.splitlines()[0] == "story is queued" and "shardyard watch story" in resumed.stdout
    assert json.loads(as_json.stdout)["state"] == "pausing"


def test_a_gang_is_declared_lost_by_a_flag() -> None:
    script = Script(job=a_job())
    with serving(script) as address:
        assert shardyard(address, "cancel", "story", "--lost").returncode == 0
        assert shardyard(address, "cancel", "story").returncode == 0
    assert [request.lost for request in script.asked("CancelJob")] == [True, False]


def test_watch_continues_through_a_pause_and_says_how_to_resume() -> None:
    failure = job_pb2.FailureReport(reason="STORAGE_NOT_WRITABLE", message="no mount", next_step="mount it")
    change = job_pb2.StateChanged(to=job_pb2.STATE_PAUSED, failure=failure)
    story = a_story()
    story[3].state.CopyFrom(change)
    script = Script(job=a_job(state=job_pb2.STATE_SUCCEEDED), events=story)
    with serving(script) as address:
        done = shardyard("127.0.0.1:1", "watch", "story", "--address", address)
    lines = done.stdout.splitlines()
    at = next(index for index, line in enumerate(lines) if "paused" in line)
    assert "STORAGE_NOT_WRITABLE" in lines[at]
    assert lines[at + 1] == f"  paused; to continue: shardyard resume story --address {address}"
    assert "story succeeded" in done.stdout


def test_on_a_terminal_the_view_shows_state_step_loss_and_curve() -> None:
    script = Script(job=a_job(state=job_pb2.STATE_SUCCEEDED), events=a_story(30))
    with serving(script) as address:
        shown = on_a_terminal([*COMMAND, "watch", "story", "--address", address])
    assert "step 30/30" in shown
    assert "tokens/s" in shown
    assert "█" in shown
    assert "story succeeded" in shown


def test_a_run_that_diverged_is_shown_to_its_end_and_is_json() -> None:
    job = a_job(state=job_pb2.STATE_FAILED)
    job.failure.reason, job.failure.next_step = "LOSS_DIVERGED", "Try a lower learning rate."
    events = a_story(6)
    for event in events:
        if event.HasField("progress") and event.progress.step > 3:
            event.progress.loss = float("nan")
    with serving(Script(job=job, events=events)) as address:
        shown = on_a_terminal([*COMMAND, "watch", "story", "--address", address])
        printed = shardyard(address, "watch", "story", "--json").stdout
    assert "LOSS_DIVERGED" in shown and "Try a lower learning rate." in shown
    assert "Traceback" not in shown
    lines = [json.loads(line, parse_constant=pytest.fail) for line in printed.splitlines()]
    losses = [line["progress"]["loss"] for line in lines if "progress" in line]
    assert losses[3:] == [None] * 3 and None not in losses[:3]


def on_a_terminal(command: list[str]) -> str:
    """What a command shows on a pseudo-terminal until it ends."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown, deadline = b"", time.monotonic() + 20
    while time.monotonic() < deadline:
        if not select.select([leader], [], [], 0.2)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            shown += os.read(leader, 65536)
        except OSError:  # The other end is closed.
            break
    process.wait(10)
    os.close(leader)
    return shown.decode(errors="replace")


def test_lists_are_tables_for_people_and_json_for_programs() -> None:
    jobs = [a_job(f"projects/default/jobs/j{number}") for number in range(3)]
    jobs[0].create_time.FromJsonString("2020-06-15T12:00:00Z")
    with serving(Script(jobs=jobs)) as address:
        table = shardyard(address, "jobs", "--filter", "state = RUNNING").stdout
        data = json.loads(shardyard(address, "jobs", "--json", "--limit", "2").stdout)
    assert [line.split()[0] for line in table.splitlines()] == ["JOB", "j0", "j1", "j2"]
    assert "2020-06-15 " in table.splitlines()[1]
    assert [job["name"].rsplit("/", 1)[1] for job in data] == ["j0", "j1"]
    assert data[0]["state"] == "running"


def test_every_other_command_answers_in_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(instance: model_service_pb2.Instance) -> model_service_pb2.Prediction:
        made = model_service_pb2.Prediction()
        made.classification.label = "good"
        made.classification.scores.add(label="good", score=0.75)
        return made

    series = metric_service_pb2.MetricSeries(metric="loss", total_points=2)
    for step in (1, 2):
        series.points.add(step=step, value=1 / step)
    line = log_service_pb2.LogLine(attempt=1, rank=0, text="hello", level=2, stream=1)
    script = Script(
        job=a_job(), ready={"m"}, predict=answer, series=[series], log_lines=[line], files={"config.json": b"{}"}
    )
    path = a_spec(tmp_path)
    rows: list[tuple[tuple[str, ...], str]] = [
        (("get", "story"), "running"),
        (("logs", "story"), "hello"),
        (("metrics", "story", "loss"), "loss"),
        (("plan", str(path)), "22,700,000"),
        (("models",), "m"),
        (("models", "m"), "config.json"),
        (("datasets",), "m"),
        (("datasets", "--uploading"), "STATE"),
        (("models", "--uploading"), "STATE"),
        (("predict", "m", "so cute"), "good 0.750"),
        (("embed", "m", "so cute"), "[2]"),
        (("upload", str(path)), "projects/default/datasets/d-"),
        (("download", "m", str(tmp_path / "out")), str(tmp_path / "out")),
        (("cancel", "story"), "cancelling"),
        (("delete", "story"), "deleted projects/default/jobs/story"),
    ]
    with serving(script) as address:
        for arguments, words in rows:
            assert run([*arguments, "--address", address]) == 0, arguments
            assert words in capsys.readouterr().out, arguments
            assert run([*arguments, "--address", address, "--json"]) == 0, arguments
            json.loads(capsys.readouterr().out)

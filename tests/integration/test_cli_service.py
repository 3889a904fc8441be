"""`serve` and `stop`: a service of one's own, started and ended from the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from helpers.script import Failure, Script
from helpers.scripted_service import a_job, serving
from shardyard.cli.stopping import start_ticks
from shardyard.v1 import job_pb2

COMMAND = [sys.executable, "-c", "from shardyard.cli import main; main()"]


@contextmanager
def served(state: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service without Ray on a free port: its process and address."""
    alone = ("--listen", "127.0.0.1:0", "--launcher", "local", "--state-dir", str(state), "--cpus", "1")
    process = subprocess.Popen(
        [*COMMAND, "serve", *alone, *flags],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        greeting = process.stdout.readline()
        found = re.search(r"serves on (\S+?);", greeting)
        assert found, greeting
        yield process, found[1]
    finally:
        process.kill()
        process.wait(10)


def shardyard(*arguments: str, address: str = "127.0.0.1:1") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SHARDYARD_ADDRESS": address}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False
    )


def test_a_service_is_started_looked_at_and_stopped(tmp_path: Path) -> None:
    with served(tmp_path / "state") as (process, address):
        looked = shardyard("doctor", "--json", address=address)
        stopped = shardyard("stop", "--state-dir", str(tmp_path / "state"), "--json")
        assert process.wait(20) == 0
    assert looked.returncode == 0
    assert any(found["subject"] == "cluster" and found["verdict"] == "works" for found in json.loads(looked.stdout))
    assert (stopped.returncode, json.loads(stopped.stdout)["service"]) == (0, True)
    assert not (tmp_path / "state" / "coordinator.json").exists()


def test_live_jobs_of_any_project_are_not_ended_unless_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("some words to learn\n" * 50)
    submit = (
        "submit", "--detach", "--project", "nlp", "--job-id", "mine", "--task", "causal-lm", "--architecture", "gpt2",
        "--max-steps", "9000", "--train", str(tmp_path / "corpus.txt"), "--sequence-length", "16",
        "--set", "spec.tokenizer.train.algorithm=characters",
        "--set", "spec.model.architecture.overrides={n_layer: 1, n_head: 2, n_embd: 16, n_positions: 16}",
    )  # fmt: skip
    with served(tmp_path / "state", "--project", "default", "--project", "nlp") as (process, address):
        assert shardyard(*submit, address=address).returncode == 0
        unsaid = shardyard("stop", "--state-dir", str(tmp_path / "state"))
        assert (unsaid.returncode, process.poll()) == (1, None)
        assert "--cancel-jobs" in unsaid.stderr and "(projects/nlp/jobs/mine)" in unsaid.stderr
        said = shardyard("stop", "--state-dir", str(tmp_path / "state"), "--keep-jobs")
        assert process.wait(30) == 0
    assert said.returncode == 0, said.stderr
    assert "the service has stopped" in said.stdout


CAUGHT = [
    (job_pb2.STATE_CANCELLING, "story is being cancelled; the next start finishes that"),
    (job_pb2.STATE_PAUSED, "story stays paused"),
    (job_pb2.STATE_PAUSING, "story stays paused"),
]


@pytest.mark.parametrize(("state", "words"), CAUGHT)
@pytest.mark.parametrize("flags", [(), ("--keep-jobs",)])
def test_the_outcome_of_a_job_that_does_not_continue_is_reported_truly(
    tmp_path: Path, state: int, words: str, flags: tuple[str, ...]
) -> None:
    with serving(Script(jobs=[a_job(state=state)])) as address, a_process_at(tmp_path, address):
        said = shardyard("stop", "--state-dir", str(tmp_path), *flags)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines() == [words, "the service has stopped"]


SILENT = job_pb2.Condition(type=job_pb2.Condition.TYPE_UNREACHABLE, active=True)
KEPT = [
    ("ray", {"state": job_pb2.STATE_QUEUED}, "waits for the next start"),
    ("local", {"state": job_pb2.STATE_PREPARING, "attempt_count": 1}, "starts over at the next start"),
    ("local", {"state": job_pb2.STATE_QUEUED, "attempt_count": 2}, "starts over at the next start"),
    ("local", {"state": job_pb2.STATE_RUNNING, "attempt_count": 1, "latest_checkpoint": "x"}, "from its last checkp"),
    ("ray", {"state": job_pb2.STATE_RUNNING, "attempt_count": 1, "latest_checkpoint": "x"}, "keeps running"),
    ("ray", {"state": job_pb2.STATE_RUNNING, "attempt_count": 1, "conditions": [SILENT]}, "does not answer; the next"),
]


@pytest.mark.parametrize(("launcher", "changes", "words"), KEPT)
def test_what_becomes_of_a_job_that_is_kept_is_said_as_it_is(
    tmp_path: Path, launcher: str, changes: dict[str, Any], words: str
) -> None:
    job = a_job()
    job.MergeFrom(job_pb2.Job(**changes))
    with serving(Script(jobs=[job], launcher=launcher)) as address, a_process_at(tmp_path, address):
        said = shardyard("stop", "--state-dir", str(tmp_path), "--keep-jobs")
    assert said.returncode == 0, said.stderr
    assert words in said.stdout.splitlines()[0]


def test_a_gang_that_cannot_be_reached_does_not_keep_the_service_from_stopping(tmp_path: Path) -> None:
    job = a_job(state=job_pb2.STATE_RUNNING)
    job.conditions.add(type=job_pb2.Condition.TYPE_UNREACHABLE, active=True)
    with serving(Script(jobs=[job], job=job)) as address, a_process_at(tmp_path, address):
        said = shardyard("stop", "--state-dir", str(tmp_path), "--cancel-jobs")
    assert said.returncode == 0, said.stderr
    first, *_, last = said.stdout.splitlines()
    assert first == "story is being cancelled; its gang does not answer, so the next start asks it again"
    assert last.endswith("if it is permanently gone, end its job at the next start: shardyard cancel --lost story")


def test_a_job_that_ended_before_it_could_be_cancelled_is_not_said_to_be_cancelled(tmp_path: Path) -> None:
    listed, ended = a_job(state=job_pb2.STATE_FINALIZING), a_job(state=job_pb2.STATE_SUCCEEDED)
    refused = Failure(grpc.StatusCode.FAILED_PRECONDITION, "INVALID_STATE")
    script = Script(jobs=[listed], job=ended, failures={"CancelJob": [refused]})
    with serving(script) as address, a_process_at(tmp_path, address):
        said = shardyard("stop", "--state-dir", str(tmp_path), "--cancel-jobs")
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[0] == "story had succeeded before it could be cancelled"


@contextmanager
def a_process_at(state: Path, address: str) -> Iterator[None]:
    """A process that passes for the service of a state directory."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    record = {"pid": process.pid, "start_ticks": start_ticks(process.pid), "address": address}
    (state / "coordinator.json").write_text(json.dumps(record))
    threading.Thread(target=process.wait, daemon=True).start()  # Else what was ended stays a zombie.
    try:
        yield
    finally:
        process.kill()


def test_jobs_of_a_service_that_was_killed_are_not_said_to_be_cancelled(tmp_path: Path) -> None:
    with served(tmp_path / "state") as (process, _):
        process.kill()
        process.wait(10)
        said = shardyard("stop", "--state-dir", str(tmp_path / "state"), "--cancel-jobs")
    assert said.returncode == 0, said.stderr
    assert "nothing was cancelled" in said.stdout and "the service has stopped" not in said.stdout


def test_ctrl_c_ends_a_service_that_has_nothing_to_do(tmp_path: Path) -> None:
    with served(tmp_path / "state") as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--listen", "0.0.0.0:7400"), "not a loopback address"),
        (("--launcher", "slurm"), "launcher"),
        (("--data-root", "relative"), "not an absolute path"),
        (("--torch-hub-repo", "owner/name:main"), "digits"),
        (("--torch-hub-repo", "/srv/hub"), "data root"),
        (("--project", "A B"), "projects"),
        (("--cpus", "0"), "cpus"),
        (("--store", "mysql://me@host/db"), "postgresql://USER@HOST:PORT/DATABASE"),
        (("--store", "postgresql://me:hush@host/db"), "`ps`"),
        (("--standby",), "needs a store that both reach"),
    ],
)
def test_a_setting_that_cannot_be_is_a_usage_error(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = shardyard("serve", "--state-dir", str(tmp_path), *arguments)
    assert done.returncode == 2
    assert words in done.stderr and "hush" not in done.stderr


def test_without_the_service_installed_serve_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['shardyard_coordinator'] = None\n"
        "from shardyard.cli.app import run; sys.exit(run(['serve']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'shardyard[all]'" in done.stderr


@pytest.mark.parametrize("flag", ["--state-dir", "--storage-root"])
def test_a_file_in_the_place_of_a_folder_is_named_with_the_next_step(tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").write_text("a file")
    folders = {"--state-dir": tmp_path / "state", "--storage-root": tmp_path / "storage", flag: tmp_path / "file"}
    flags = [str(part) for pair in folders.items() for part in pair]
    said = shardyard("serve", "--listen", "127.0.0.1:0", "--launcher", "local", *flags)
    assert said.returncode == 69
    assert f"{tmp_path / 'file'}: it is in the place of a folder; move it away" in said.stderr

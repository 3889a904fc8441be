"""How the command line reaches a service, and what it says if that does not answer, or nobody reads."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess

import grpc
import pytest

from helpers.command import COMMAND, shardyard
from helpers.script import Failure, Script
from helpers.scripted_service import a_job, serving


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "https_proxy", "grpc_proxy", "all_proxy"])
def test_a_service_on_this_machine_is_reached_past_any_proxy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(Script(jobs=[a_job()])) as address:
        done = shardyard(address, "jobs")
    assert (done.returncode, done.stderr) == (0, "")
    assert "story" in done.stdout


@pytest.mark.parametrize("rows", [1, 3000])
def test_a_reader_that_leaves_early_sees_no_traceback(rows: int) -> None:
    jobs = [a_job() for _ in range(rows)]
    with serving(Script(jobs=jobs, page_size=1000)) as address:
        environment = {**os.environ, "SHARDYARD_ADDRESS": address}
        # `true` reads nothing at all: what the command prints has nowhere to go.
        for reader in ("head -1", "true"):
            line = f"{shlex.join([*COMMAND, 'jobs', '--limit', '3000'])} | {reader}"
            done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment, check=False)
            assert done.stderr == "", reader


def test_the_reason_for_not_answering_yet_is_given_at_once() -> None:
    away = Failure(grpc.StatusCode.UNAVAILABLE, "INSPECTION_UNAVAILABLE", "no process is free", retry_after_s=0.2)
    with serving(Script(job=a_job(), failures={"GetJob": [away] * 7})) as address:
        done = shardyard(address, "get", "story")
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["INSPECTION_UNAVAILABLE: no process is free (trying again for up to 60 s)"]


def test_an_error_is_json_for_programs() -> None:
    with serving(Script(job=a_job())) as address:
        done = shardyard(address, "get", "nope", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["reason"] == "JOB_NOT_FOUND"


def test_a_service_that_hangs_is_not_called_absent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:  # Connections are accepted and never answered.
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        asked = shardyard(address, "jobs")
        looked = shardyard(address, "doctor", "--json")
    assert asked.returncode == 1
    assert f"what listens at {address} does not answer" in asked.stderr and "kill -9" in asked.stderr
    [found] = [each for each in json.loads(looked.stdout) if each["subject"] == "service"]
    assert looked.returncode == 1 and found["verdict"] == "broken" and "does not answer" in found["message"]

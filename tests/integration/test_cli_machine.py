"""What the command line says of the machine that it runs on: its service, its processes, its disk."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from helpers.command import COMMAND, shardyard
from helpers.script import Script
from helpers.scripted_service import a_job, serving


def test_a_missing_service_is_reported_in_one_line_that_says_what_to_start() -> None:
    done = shardyard("127.0.0.1:1", "jobs")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "shardyard serve" in done.stderr


def test_doctor_looks_at_machine_and_service(tmp_path: Path) -> None:
    with serving(Script()) as address:
        done = shardyard(address, "doctor", "--state-dir", str(tmp_path))
        findings = json.loads(shardyard(address, "doctor", "--json").stdout)
    assert done.returncode == 0, done.stdout
    assert "connected" in done.stdout
    assert {finding["subject"] for finding in findings} >= {"Python", "CPU", "loopback", "service", "cluster"}


def test_health_is_what_the_service_says_of_itself() -> None:
    own = HealthServicer()
    server = grpc.server(ThreadPoolExecutor(1))
    add_HealthServicer_to_server(own, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        own.set("", HealthCheckResponse.NOT_SERVING)
        starting = shardyard(address, "health")
        own.set("", HealthCheckResponse.SERVING)
        served = shardyard(address, "health", "--json")
    finally:
        server.stop(0).wait()
    assert starting.returncode == 1 and starting.stdout.startswith("not serving")
    assert served.returncode == 0 and json.loads(served.stdout) == {"serving": True}
    gone = shardyard(address, "health", "--timeout", "2")
    assert (gone.returncode, gone.stdout) == (1, "") and "shardyard serve" in gone.stderr


def test_stop_without_a_service_says_so(tmp_path: Path) -> None:
    done = shardyard("127.0.0.1:1", "stop", "--state-dir", str(tmp_path))
    assert (done.returncode, done.stdout.strip()) == (0, f"nothing runs for {tmp_path}")


@pytest.mark.parametrize("name", ["sleep", "shardyard-sleep"])
def test_stop_never_ends_a_process_that_is_not_the_service(tmp_path: Path, name: str) -> None:
    with subprocess.Popen([name, "60"], executable="sleep") as other:
        record = {"pid": other.pid, "start_ticks": 1, "address": "127.0.0.1:1"}
        (tmp_path / "coordinator.json").write_text(json.dumps(record))
        done = shardyard("127.0.0.1:1", "stop", "--state-dir", str(tmp_path))
        assert (done.returncode, other.poll()) == (0, None)
        other.kill()


def test_without_the_extra_the_command_says_what_to_install() -> None:
    code = (
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'typer' else found(name, *rest)\n"
        "from shardyard.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'shardyard[cli]'" in done.stderr


def test_what_this_machines_disk_refuses_is_said_in_words_and_in_json(tmp_path: Path) -> None:
    script = Script(jobs=[a_job()], ready={"m"}, files={"config.json": b"{}"})
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    folder = str(tmp_path / "file" / "m")
    with serving(script) as address:
        looped = shardyard(address, "download", "m", str(tmp_path / "loop" / "m"))
        assert looped.returncode == 1 and "leads back to itself" in looped.stderr and "Traceback" not in looped.stderr
        plain = shardyard(address, "download", "m", folder)
        assert plain.returncode == 1 and "Errno" not in plain.stderr
        assert "error: LOCAL_FILE: " in plain.stderr and "choose another place" in plain.stderr
        told = json.loads(shardyard(address, "download", "m", folder, "--json").stdout)["error"]
        assert told["reason"] == "LOCAL_FILE" and str(tmp_path / "file") in told["message"]
        with Path("/dev/full").open("w") as full:
            line = [*COMMAND, "jobs", "--address", address]
            done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: LOCAL_FILE: the output cannot be written: No space left on device; free some space on its "
        "disk, or choose a place on another one\n"
    )

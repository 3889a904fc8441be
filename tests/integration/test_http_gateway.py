"""JSON over HTTP reaches every call of a real service, with its rules and errors, and holds up nobody."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import pytest
from google.protobuf import json_format
from transformers import BertModel

from helpers.served import BIN, free_port
from helpers.tiny_folders import bert_config, bert_tokenizer
from helpers.web import JSON, Answer, Web, answering
from shardyard.v1 import job_service_pb2
from shardyard_coordinator.web.calls import services


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("http")
    (folder / "data").mkdir()
    BertModel(bert_config()).save_pretrained(folder / "data" / "bert")
    bert_tokenizer().save_pretrained(folder / "data" / "bert")
    with (folder / "data" / "train.csv").open("w", newline="") as file:
        rows = [("good nice", "yes"), ("bad poor", "no")] * 20
        csv.writer(file).writerows([("text", "label"), *rows])
    with answering(folder / "service", "--data-root", str(folder / "data")) as running:
        yield running


def test_a_job_from_its_data_to_an_answer(web: Web) -> None:
    data = web.service.folder.parent / "data"
    spec = {
        "fineTuning": {"textClassification": {"maxLength": 16}},
        "model": {"uri": str(data / "bert")},
        "trainData": {"uri": str(data / "train.csv")},
        "optimization": {"maxSteps": "3", "globalBatchSize": "8"},
    }
    planned = web.call("JobService/PlanJob", {"parent": "projects/default", "job": {"spec": spec}})
    assert planned["totalSteps"] == "3" and planned["labels"] == ["no", "yes"]
    job = web.call("JobService/CreateJob", {"parent": "projects/default", "jobId": "web", "job": {"spec": spec}})
    assert job["name"] == "projects/default/jobs/web"
    while job["state"] not in {"STATE_SUCCEEDED", "STATE_FAILED"}:
        job = web.call("JobService/WaitJob", {"name": job["name"], "timeout": "30s"})
    assert job["state"] == "STATE_SUCCEEDED"
    events = [
        event for batch in web.stream("JobService/WatchJob", {"name": job["name"]}) for event in batch.get("events", [])
    ]
    assert [event["sequence"] for event in events] == [str(at + 1) for at in range(len(events))]
    asked = {"model": "projects/default/models/web", "instances": [{"text": "good nice"}]}
    (answer,) = web.call("ModelService/Predict", asked)["predictions"]
    assert answer["classification"]["label"] in {"no", "yes"}
    with_grpc = web.service.run(str(BIN / "shardyard"), "predict", "web", "good nice", "--json")
    assert json.loads(with_grpc.stdout)[0]["logits"] == pytest.approx(answer["logits"], abs=1e-5)


def test_an_upload_is_a_stream_of_requests(web: Web) -> None:
    content = b"text,label\ngood,yes\nbad,no\n"
    header = {
        "parent": "projects/default",
        "resourceId": "by-http",
        "requestId": str(uuid.uuid4()),
        "files": [
            {"path": "rows.csv", "sizeBytes": str(len(content)), "sha256": hashlib.sha256(content).hexdigest()},
        ],
    }
    chunk = {"data": base64.b64encode(content).decode(), "crc32c": google_crc32c.value(content)}
    (made,) = web.stream("DatasetService/CreateDataset", {"header": header}, {"chunk": chunk})
    assert made["name"] == "projects/default/datasets/by-http"


def test_errors_have_the_code_the_reason_and_every_broken_rule_in_words(web: Web) -> None:
    gone = web.ask("/shardyard.v1.JobService/GetJob", {"name": "projects/default/jobs/none"})
    assert (gone.status, gone.body["code"], gone.reason) == (404, "not_found", "JOB_NOT_FOUND")
    broken = web.ask("/shardyard.v1.JobService/CreateJob", {"parent": "projects/default", "job": {"spec": {}}})
    assert (broken.status, broken.reason) == (400, "SPEC_INVALID")
    (rules,) = [each["debug"] for each in broken.body["details"] if each["type"] == "google.rpc.BadRequest"]
    assert {each["field"] for each in rules["fieldViolations"]} >= {"job.spec.model"}


BAD_BODIES = {
    "an unknown field": (b'{"nam": "projects/default/jobs/x"}', 'no field named "nam"'),
    "not JSON": (b"{", "as JSON"),
    "not an object": (b"[]", "as JSON"),
    "not UTF-8": (b'{"name": "\xff"}', "as JSON"),
    "a field twice": (b'{"name": "a", "name": "b"}', "as JSON"),
    "another type": (b'{"name": 7}', "as JSON"),
    "too deep": (b'{"name":' * 5000, "as JSON"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_body_that_is_no_request_is_refused_with_what_is_wrong(web: Web, name: str) -> None:
    body, words = BAD_BODIES[name]
    answer = web.ask("/shardyard.v1.JobService/GetJob", body)
    assert (answer.status, answer.body["code"]) == (400, "invalid_argument")
    assert words in answer.body["message"]


FOREIGN = {
    "a page": ({"origin": "https://pages.example"}, 403, "pages.example"),
    "a page of this machine": ({"origin": "http://localhost:8000"}, 403, "localhost:8000"),
    "a name that was made to mean this machine": ({"host": "pages.example"}, 403, "pages.example"),
    "a form": ({"content-type": "application/x-www-form-urlencoded"}, 415, "application/json"),
    "plain text": ({"content-type": "text/plain"}, 415, "application/json"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_page_in_a_browser_could_send_is_not_answered(web: Web, name: str) -> None:
    headers, status, words = FOREIGN[name]
    answer = web.ask("/shardyard.v1.JobService/ListJobs", {"parent": "projects/default"}, headers=JSON | headers)
    assert answer.status == status and words in answer.body["message"]


def test_paths_and_ways_that_are_none_are_said(web: Web) -> None:
    unknown = web.ask("/shardyard.v1.JobService/Nothing")
    assert unknown.status == 404 and "/openapi.json" in unknown.body["message"]
    read = web.ask("/shardyard.v1.JobService/ListJobs", method="GET")
    assert read.status == 405 and "POST" in read.body["message"]
    stream = web.ask("/shardyard.v1.JobService/WatchJob", {"name": "projects/default/jobs/none"})
    assert stream.status == 415 and "application/connect+json" in stream.body["message"]


def test_every_method_is_described_and_every_description_is_a_method(web: Web) -> None:
    described = web.ask("/openapi.json", method="GET").body
    methods = {f"/{service.full_name}/{method.name}" for service in services() for method in service.methods}
    assert set(described["paths"]) == methods
    text = json.dumps(described)
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert named <= set(described["components"]["schemas"])


def test_its_health_is_that_of_the_service(web: Web) -> None:
    assert web.ask("/healthz", method="GET") == Answer(200, {"status": "SERVING"})


def test_a_client_that_stops_halfway_and_a_large_body_hold_up_nobody(web: Web) -> None:
    host, _, port = web.address.rpartition(":")
    with socket.create_connection((host, int(port))) as slow:
        head = "POST /shardyard.v1.JobService/GetJob HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        slow.sendall(f"{head}content-length: 1000\r\n\r\n{{".encode())
        instances = [{"text": "a"}] * 200_000
        large = web.ask(
            "/shardyard.v1.ModelService/Predict", {"model": "projects/default/models/m", "instances": instances}
        )
        assert large.status == 400 and "instances" in large.body["message"]
        assert web.ask("/healthz", method="GET").status == 200
    over = web.ask("/shardyard.v1.ModelService/Predict", b" " * 7_000_000)
    assert over.body["code"] == "resource_exhausted"
    bomb = gzip.compress(b" " * 100_000_000)
    packed = web.ask("/shardyard.v1.ModelService/Predict", bomb, headers=JSON | {"content-encoding": "gzip"})
    assert packed.body["code"] == "resource_exhausted"


FORMS = {
    "with a charset": {"content-type": "application/json; charset=utf-8"},
    "in capitals": {"content-type": "Application/JSON"},
    "compressed": {"content-type": "application/json", "content-encoding": "gzip"},
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_clients_send_are_read(web: Web, name: str) -> None:
    body = b'{"parent": "projects/default"}'
    headers = FORMS[name]
    sent = gzip.compress(body) if "content-encoding" in headers else body
    assert web.ask("/shardyard.v1.JobService/ListJobs", sent, headers=headers).status == 200


def test_a_whole_number_is_exact(web: Web) -> None:
    name, large = "projects/default/jobs/web", 2**53 + 1
    for written in (large, str(large)):
        body = {"name": name, "afterSequence": written, "minInterval": "1s"}
        asked = json_format.Parse(json.dumps(body), job_service_pb2.WatchJobRequest())
        assert asked.after_sequence == large
        with pytest.raises(AssertionError, match="CURSOR_AHEAD"):
            web.stream("JobService/WatchJob", body)


def test_an_old_client_without_a_host_is_answered(web: Web) -> None:
    host, _, port = web.address.rpartition(":")
    with socket.create_connection((host, int(port))) as probe:
        probe.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert probe.recv(100).startswith(b"HTTP/1.1 200")


def test_a_gateway_that_is_killed_comes_back_on_its_port(web: Web) -> None:
    old = web.process()
    os.kill(old.pid, signal.SIGKILL)
    old.wait()
    listed = web.service.run(str(BIN / "shardyard"), "jobs")
    assert listed.returncode == 0, "the service itself continues"
    deadline = time.monotonic() + 60
    while True:
        try:
            assert web.ask("/healthz", method="GET").status == 200
            break
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_an_address_that_is_taken_is_said_and_ends_the_start(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [BIN / "shardyard", "serve", "--launcher", "local", "--listen", f"127.0.0.1:{free_port()}"]
        done = subprocess.run(
            [*command, "--http", address, "--state-dir", tmp_path / "state"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 69 and f"cannot answer HTTP on {address}" in done.stderr and "--http" in done.stderr


def test_without_tls_or_insecure_only_this_machine_is_listened_to(tmp_path: Path) -> None:
    command = [BIN / "shardyard", "serve", "--http", "0.0.0.0:7480", "--state-dir", tmp_path / "state"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0 and "not a loopback address" in done.stderr


def test_a_caller_is_recognised_by_the_token_of_its_header(tmp_path: Path) -> None:
    path, request = "/shardyard.v1.JobService/ListJobs", {"parent": "projects/default"}
    with answering(tmp_path / "service", "--auth") as guarded:
        refused = guarded.ask(path, request)
        assert (refused.status, refused.reason) == (401, "CREDENTIALS_MISSING")
        wrong = guarded.ask(path, request, headers={**JSON, "authorization": f"Bearer sy_{'a' * 12}_{'b' * 43}"})
        assert (wrong.status, wrong.reason) == (401, "CREDENTIALS_INVALID")
        token = (guarded.service.state / "admin-token").read_text().strip()
        answer = guarded.ask(path, request, headers={**JSON, "authorization": f"Bearer {token}"})
        assert (answer.status, answer.body) == (200, {})

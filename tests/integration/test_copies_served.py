"""A model is copied to an object store by a real service, and trained on from there. The store is moto's server."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import shardyard
from helpers.fences import fences
from helpers.real_s3 import BUCKET, REGION, real_s3
from helpers.repository import ROOT
from helpers.served import Served, served
from helpers.tiny_folders import save_folder

JOB_S = 240.0
SECRET_KEY = "wJalrXUtnFEMIK7MDENGbPxRfiCYzEXAMPLEKEY"
KEY_ID = "AKIDEXAMPLE0123456789"
MANIFEST = "shardyard-manifest.json"


@dataclass(frozen=True)
class Place:
    """A service with one model, and the object store that it reads and writes."""

    service: Served
    store: Any
    folder: Path
    id: str

    def client(self, project: str = "default") -> shardyard.Client:
        return shardyard.Client(self.service.address, project=project)

    def put(self, key: str, data: str | bytes) -> None:
        self.store.put_object(Bucket=BUCKET, Key=key, Body=data)

    def objects(self, prefix: str) -> dict[str, bytes]:
        """The bytes of all objects below a prefix, by the names of their files."""
        found = self.store.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ())
        read = {each["Key"]: self.store.get_object(Bucket=BUCKET, Key=each["Key"])["Body"].read() for each in found}
        return {key.removeprefix(prefix): data for key, data in read.items()}

    def run(self, *arguments: str) -> str:
        done = self.service.run("shardyard", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)


def reviews() -> str:
    out = io.StringIO()
    csv.writer(out).writerows([("text", "label"), *[(f"the dog is {each}", each) for each in ("good", "bad") * 24]])
    return out.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("copies")
    secrets = folder / "secrets"  # Beside the service's folder, which a test searches.
    secrets.mkdir()
    for name, key in (("lake", SECRET_KEY), ("other", "another-key")):
        (secrets / name).write_text(f"aws_access_key_id = {KEY_ID}\naws_secret_access_key = {key}\n")
    bert = save_folder(folder / "bert", "BertModel")
    with real_s3() as (endpoint, store):
        options = [
            *("--remote-root", f"s3://{BUCKET}/models=secret://lake"),
            *("--remote-root", f"s3://{BUCKET}/data=secret://lake"),
            *("--remote-export-root", f"s3://{BUCKET}/models=secret://lake"),
            *("--remote-export-root", f"s3://{BUCKET}/theirs=secret://other"),
            *("--remote-export-root", "s3://nowhere/models=secret://lake"),
            *("--remote-export-root", f"s3://{BUCKET}/gone=secret://gone"),
            *("--secret", "lake=default", "--secret", "other=other", "--secret", "gone=default"),
            *("--s3-endpoint", endpoint, "--s3-region", REGION, "--secrets-dir", str(secrets), "--project", "other"),
        ]
        with served(folder / "service", "local", *options) as service:
            with shardyard.Client(service.address) as client:
                model = client.upload_model(bert)
            place = Place(service, store, bert, model.id)
            place.put("data/train.csv", reviews())
            yield place


def copied(place: Place, to: str) -> shardyard.JobInfo:
    """The job of a copy when it has ended."""
    with place.client() as client:
        return client.model(place.id).copy(to).wait(timeout=JOB_S, check=False)


def test_a_model_is_copied_trained_on_from_there_and_answers(place: Place) -> None:
    to = f"s3://{BUCKET}/models/mine"
    said = place.run("copy", place.id, to)
    assert "submitted model-copy-" in said and f"{place.id} is at {to}" in said
    objects = place.objects("models/mine/")
    files = {path.name: path.read_bytes() for path in place.folder.iterdir()}
    manifest = json.loads(objects.pop(MANIFEST))
    assert objects == files
    assert manifest["model"] == f"projects/default/models/{place.id}"
    assert {each["path"]: each["size_bytes"] for each in manifest["files"]} == {
        name: len(data) for name, data in files.items()
    }
    spec = shardyard.JobSpec(
        shardyard.TextClassification(max_length=16),
        model=to,
        train_data=f"s3://{BUCKET}/data/train.csv",
        optimization=shardyard.Optimization(max_steps=2, global_batch_size=8),
    )
    with place.client() as client:
        job = client.submit(spec, job_id="from-the-copy")
        assert job.wait(timeout=JOB_S).state == "succeeded"
        (prediction,) = job.model().predict(["the dog is good"])
        assert prediction.label in {"good", "bad"}
        # What was trained goes back, too, and what it was read from is not part of it.
        assert job.model().copy(f"s3://{BUCKET}/models/trained").wait(timeout=JOB_S).state == "succeeded"
    assert "shardyard.json" in place.objects("models/trained/")


def test_the_command_of_the_page_copies(place: Place) -> None:
    (fence,) = [each for each in fences(ROOT / "docs" / "object-stores.md", ROOT) if "shardyard copy" in each.text]
    first, second = (line.split()[1:] for line in fence.text.splitlines())
    place.run(*(place.id if word == "sst2" else word for word in first))
    assert MANIFEST in place.objects("models/sst2/")
    refused = place.service.run("shardyard", *(place.id if word == "sst2" else word for word in second))
    assert refused.returncode and "no further format" in " ".join((refused.stdout + refused.stderr).split())


def test_the_same_copy_again_finds_itself_done(place: Place) -> None:
    to = f"s3://{BUCKET}/models/again"
    assert copied(place, to).state == "succeeded"
    before = place.store.list_objects_v2(Bucket=BUCKET, Prefix="models/again/")["Contents"]
    assert copied(place, to).state == "succeeded"
    assert place.store.list_objects_v2(Bucket=BUCKET, Prefix="models/again/")["Contents"] == before


@pytest.mark.parametrize(
    ("to", "reason", "words"),
    [
        (f"s3://{BUCKET}/other", "ADDRESS_NOT_ALLOWED", ["projects/default", "--remote-export-root"]),
        (f"s3://{BUCKET}/data/mine", "ADDRESS_NOT_ALLOWED", ["may write"]),  # It may be read.
        (f"s3://{BUCKET}/theirs/mine", "ADDRESS_NOT_ALLOWED", ["may write"]),
        (f"s3://{BUCKET}/models2", "ADDRESS_NOT_ALLOWED", ["may write"]),
        (f"s3://{BUCKET}/models/../data", "ADDRESS_NOT_ALLOWED", ["no empty, . or .. parts"]),
        (f"s3://{KEY_ID}:{SECRET_KEY}@{BUCKET}/models", "ADDRESS_NOT_ALLOWED", ["do not belong into an address"]),
        ("/models/mine", "ADDRESS_NOT_ALLOWED", ["s3://bucket/prefix"]),
        ("https://lake.s3.amazonaws.com/models", "ADDRESS_NOT_ALLOWED", ["s3://bucket/prefix"]),
        (f"s3://{BUCKET}/models/mine@sha256:{'0' * 64}", "SPEC_INVALID", ["digest", "leave it out"]),
    ],
)
def test_an_address_that_may_not_be_written_is_refused_before_a_job_is_made(
    place: Place, to: str, reason: str, words: list[str]
) -> None:
    with place.client() as client, pytest.raises(shardyard.ShardyardError) as refused:
        client.model(place.id).copy(to)
    assert refused.value.reason == reason, refused.value
    (violation,) = refused.value.violations
    assert violation.field == "uri" and all(word in violation.message for word in words), violation
    assert SECRET_KEY not in str(refused.value) and KEY_ID not in str(refused.value)


def test_a_format_that_the_model_does_not_have_is_refused_with_those_that_it_has(place: Place) -> None:
    with place.client() as client, pytest.raises(shardyard.InvalidArgument) as refused:
        client.model(place.id).copy(f"s3://{BUCKET}/models/onnx", format="onnx")
    (violation,) = refused.value.violations
    assert violation.field == "format" and "no further format" in violation.message


@pytest.mark.parametrize(
    ("to", "reason", "words"),
    [
        ("s3://nowhere/models/mine", "OBJECT_NOT_FOUND", "no such bucket"),
        (f"s3://{BUCKET}/gone/mine", "SECRET_UNUSABLE", "the secret gone cannot be read"),
        (f"s3://{BUCKET}/models/taken", "OBJECT_EXISTS", f"`s3://{BUCKET}/models/taken/config.json`"),
    ],
)
def test_a_copy_that_cannot_be_made_fails_and_says_what_to_do(place: Place, to: str, reason: str, words: str) -> None:
    place.put("models/taken/config.json", "theirs")
    ended = copied(place, to)
    assert ended.state == "failed" and ended.failure is not None
    assert ended.failure.reason == reason and words in ended.failure.message, ended.failure
    assert ended.failure.next_step
    assert place.objects("models/taken/") == {"config.json": b"theirs"}


def test_a_spec_file_is_the_same_and_settings_of_a_training_are_refused(place: Place) -> None:
    path = place.service.folder / "copy.yaml"
    text = (ROOT / "examples" / "copy.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("s3://lake/models/sst2", f"s3://{BUCKET}/models/by-file"), encoding="utf-8")
    model = f"model:{place.id}"
    place.run("plan", str(path), "--model", model)
    bad = place.service.run("shardyard", "plan", str(path), "--model", model, "--epochs", "1", "--workers", "2")
    said = " ".join((bad.stdout + bad.stderr).split())
    assert bad.returncode and "copy trains nothing" in said and "2 workers" in said, said
    place.run("submit", str(path), "--model", model)
    with place.client() as client:
        ended = client.job("copy").wait(timeout=JOB_S)
    assert ended.progress is not None and ended.progress.total_steps == 1
    assert MANIFEST in place.objects("models/by-file/")


def test_a_copy_continues_after_the_service_was_killed(place: Place) -> None:
    with place.client() as client:
        job = client.model(place.id).copy(f"s3://{BUCKET}/models/killed", job_id="killed")
    place.service.kill()
    place.service.start()
    with place.client() as client:
        assert client.job(job.name).wait(timeout=JOB_S).state == "succeeded"
    assert set(place.objects("models/killed/")) == {MANIFEST, *(path.name for path in place.folder.iterdir())}


def test_no_file_of_the_service_has_the_value_of_a_secret(place: Place) -> None:
    found = [path for path in place.service.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(found) > 50
    for path in found:
        data = path.read_bytes()
        assert SECRET_KEY.encode() not in data and KEY_ID.encode() not in data, path

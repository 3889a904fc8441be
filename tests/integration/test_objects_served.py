"""Data, models and tokenizers on an object store, and a private model of the Hub, through a real service.

The store is moto's server. Nothing that the service keeps, logs or answers has the value of a secret.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import shardyard
from helpers.fences import fences
from helpers.loopback_hub import COMMIT, MODEL, LoopbackHub, loopback_hub
from helpers.real_s3 import BUCKET, REGION, real_s3
from helpers.repository import ROOT
from helpers.served import Served, served
from helpers.tiny_folders import save_folder

JOB_S = 240.0
HUB_TOKEN = "hub-token-5fd924625f6ab16a19cc"
SECRET_KEY = "wJalrXUtnFEMIK7MDENGbPxRfiCYzEXAMPLEKEY"
KEY_ID = "AKIDEXAMPLE0123456789"
SECRETS = (HUB_TOKEN, SECRET_KEY, KEY_ID)


@dataclass(frozen=True)
class Place:
    """A service, the object store that it reads, and the Hub."""

    service: Served
    store: Any
    hub: LoopbackHub

    def client(self, project: str = "default") -> shardyard.Client:
        return shardyard.Client(self.service.address, project=project)

    def put(self, key: str, data: str | bytes) -> None:
        self.store.put_object(Bucket=BUCKET, Key=key, Body=data)


def reviews(word: str) -> str:
    rows = [(f"the {word} dog is {label}", label) for label in ("good", "bad") * 24]
    out = io.StringIO()
    csv.writer(out).writerows([("text", "label"), *rows])
    return out.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("objects")
    secrets = folder / "secrets"  # Beside the service's folder, which a test searches.
    secrets.mkdir()
    (secrets / "lake").write_text(f"[default]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET_KEY}\n")
    (secrets / "hub").write_text(f"{HUB_TOKEN}\n")
    (secrets / "half").write_text("aws_access_key_id = only-one\n")
    bert = save_folder(folder / "bert", "BertModel")
    with real_s3() as (endpoint, store), loopback_hub(bert) as hub:
        hub.needs_token = HUB_TOKEN
        options = [
            *("--remote-root", f"s3://{BUCKET}/data=secret://lake", "--remote-root", f"s3://{BUCKET}/open"),
            *("--remote-root", f"s3://{BUCKET}/half=secret://half", "--remote-root", "s3://nowhere/data"),
            *("--remote-root", f"s3://{BUCKET}/gone=secret://gone"),
            *("--s3-endpoint", endpoint, "--s3-region", REGION, "--secrets-dir", str(secrets)),
            *("--secret", "lake=default", "--secret", "hub=default", "--secret", "half=default"),
            *("--secret", "gone=default", "--project", "other"),
        ]
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        with served(folder / "service", "local", *options, environment=environment) as service:
            found = Place(service, store, hub)
            for part in ("train", "test"):
                found.put(f"data/reviews/{part}.csv", reviews(part))
            found.put("data/reviews2/train.csv", "not,these\n1,2\n")
            found.put("data/reviews/", b"")
            for file in sorted(bert.iterdir()):
                # Everybody may read these; the others only who signs.
                store.put_object(Bucket=BUCKET, Key=f"open/bert/{file.name}", Body=file.read_bytes(), ACL="public-read")
            yield found


def spec(model: Any, data: Any, **settings: Any) -> shardyard.JobSpec:
    return shardyard.JobSpec(
        shardyard.TextClassification(max_length=16),
        model=model,
        train_data=data,
        optimization=shardyard.Optimization(max_steps=2, global_batch_size=8),
        **settings,
    )


def refusal(place: Place, model: Any, data: Any, *, project: str = "default") -> shardyard.ShardyardError:
    with place.client(project) as client, pytest.raises(shardyard.ShardyardError) as refused:
        client.plan(spec(model, data))
    return refused.value


def test_a_job_trains_on_objects_and_a_model_of_the_store_and_answers(place: Place) -> None:
    data = f"s3://{BUCKET}/data/reviews/train.csv"
    wanted = spec(f"s3://{BUCKET}/open/bert", data, eval_data=f"s3://{BUCKET}/data/reviews/test.csv")
    with place.client() as client:
        plan = client.plan(wanted)
        resolved = plan.resolved_spec
        assert re.fullmatch(re.escape(data) + "@sha256:[0-9a-f]{64}", resolved["train_data"]["uri"])
        assert re.fullmatch(rf"s3://{BUCKET}/open/bert/@sha256:[0-9a-f]{{64}}", resolved["model"]["uri"])
        job = client.submit(wanted, job_id="on-objects", plan=plan)
        assert job.wait(timeout=JOB_S).state == "succeeded"
        (prediction,) = job.model().predict(["the train dog is good"])
        assert prediction.label in {"good", "bad"}


def test_objects_that_change_after_the_plan_are_another_plan_and_the_pinned_ones_stay(place: Place) -> None:
    place.put("data/changing/train.csv", reviews("first"))
    uri = f"s3://{BUCKET}/data/changing"
    with place.client() as client:
        plan = client.plan(spec(f"s3://{BUCKET}/open/bert", uri))
        pinned = plan.resolved_spec["train_data"]["uri"]
        assert pinned.startswith(f"{uri}/@sha256:")
        place.put("data/changing/train.csv", reviews("second"))
        with pytest.raises(shardyard.ShardyardError) as stale:
            client.submit(spec(f"s3://{BUCKET}/open/bert", uri), plan=plan)
        assert stale.value.reason == "PLAN_STALE"
        again = client.plan(spec(f"s3://{BUCKET}/open/bert", pinned))
        assert again.etag == plan.etag and again.resolved_spec["train_data"]["uri"] == pinned
        place.store.delete_object(Bucket=BUCKET, Key="data/changing/train.csv")
        assert client.plan(spec(f"s3://{BUCKET}/open/bert", pinned)).etag == plan.etag


@pytest.mark.parametrize(
    ("uri", "reason", "words"),
    [
        (f"s3://{BUCKET}/data/none", "OBJECT_NOT_FOUND", ["data/none", "no such object", "spelling"]),
        (f"s3://{BUCKET}/data/review", "OBJECT_NOT_FOUND", ["no such object"]),
        ("s3://nowhere/data", "OBJECT_NOT_FOUND", ["no such bucket"]),
        (f"s3://{BUCKET}/other", "ADDRESS_NOT_ALLOWED", ["projects/default", "--remote-root"]),
        (f"s3://{BUCKET}/data2", "ADDRESS_NOT_ALLOWED", ["--remote-root"]),
        ("s3://elsewhere/data", "ADDRESS_NOT_ALLOWED", ["--remote-root"]),
        (f"s3://{BUCKET}/data/../private", "ADDRESS_NOT_ALLOWED", ["no empty, . or .. parts"]),
        (f"s3a://{BUCKET}/data", "ADDRESS_NOT_ALLOWED", ["s3:// in lower case"]),
        (f"s3://{KEY_ID}:{SECRET_KEY}@{BUCKET}/data", "ADDRESS_NOT_ALLOWED", ["do not belong into an address"]),
        (f"s3://{BUCKET}/half/x", "SECRET_UNUSABLE", ["half", "aws_secret_access_key"]),
        (f"s3://{BUCKET}/gone/x", "SECRET_UNUSABLE", ["gone", "cannot be read"]),
    ],
)
def test_a_refusal_names_the_field_the_address_and_the_next_step(
    place: Place, uri: str, reason: str, words: list[str]
) -> None:
    error = refusal(place, f"s3://{BUCKET}/open/bert", uri)
    assert error.reason == reason, error
    (violation,) = error.violations
    assert violation.field == "job.spec.train_data.uri"
    assert all(word in violation.message for word in words), violation.message
    assert SECRET_KEY not in str(error) and KEY_ID not in str(error)


@pytest.mark.parametrize("file", ["objects.yaml", "private.yaml"])
def test_the_spec_of_the_page_is_planned(place: Place, file: str) -> None:
    (fence,) = [each for each in fences(ROOT / "docs" / "object-stores.md", ROOT) if each.file == file]
    path = place.service.folder / file
    path.write_text(fence.text, encoding="utf-8")
    done = place.service.run("shardyard", "plan", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_a_project_may_not_use_looks_like_what_is_not_there(place: Place) -> None:
    denied = refusal(place, f"s3://{BUCKET}/open/bert", f"s3://{BUCKET}/data/reviews", project="other")
    absent = refusal(place, f"s3://{BUCKET}/open/bert", f"s3://{BUCKET}/absent/reviews", project="other")
    assert str(denied).replace("data/", "absent/") == str(absent)
    # Knowing the digest of a copy that is here is no right to read it.
    with place.client() as client:
        pinned = client.plan(spec(f"s3://{BUCKET}/open/bert", f"s3://{BUCKET}/data/reviews")).resolved_spec
    stolen = refusal(place, f"s3://{BUCKET}/open/bert", pinned["train_data"]["uri"], project="other")
    assert stolen.reason == "ADDRESS_NOT_ALLOWED"


def test_a_private_model_of_the_hub_is_read_with_the_secret_that_its_spec_names(place: Place) -> None:
    data = f"s3://{BUCKET}/data/reviews/train.csv"
    private = shardyard.Pretrained(f"hub:{MODEL}", token="secret://hub")
    without = refusal(place, f"hub:{MODEL}", data)
    assert without.reason == "MODEL_NOT_FOUND" and "secret://NAME" in str(without)
    for token in ("secret://nosuch", "secret://gone2"):
        error = refusal(place, shardyard.Pretrained(f"hub:{MODEL}", token=token), data)
        assert error.reason == "ACCESS_DENIED" and error.violations[0].field == "job.spec.model.hub.token"
    raw = refusal(place, shardyard.Pretrained(f"hub:{MODEL}", token=HUB_TOKEN), data)
    assert "secret://NAME" in str(raw) and HUB_TOKEN not in str(raw)
    with place.client() as client:
        plan = client.plan(spec(private, data))
        assert plan.resolved_spec["model"]["hub"] == {"id": MODEL, "revision": COMMIT, "token": "secret://hub"}
        job = client.submit(spec(private, data), job_id="private")
        assert job.wait(timeout=JOB_S).state == "succeeded"
    assert HUB_TOKEN in place.hub.tokens
    pinned = shardyard.Pretrained(f"hub:{MODEL}@{COMMIT}", token="secret://hub")
    assert refusal(place, pinned, f"s3://{BUCKET}/open/x", project="other").reason == "ACCESS_DENIED"
    # Nor is the private model's cache that of the public ones.
    assert refusal(place, f"hub:{MODEL}@{COMMIT}", data).reason == "MODEL_NOT_FOUND"


def test_no_file_log_event_or_answer_has_the_value_of_a_secret(place: Place) -> None:
    found = [path for path in place.service.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(found) > 50
    for path in found:
        data = path.read_bytes()
        assert not any(value.encode() in data for value in SECRETS), path
    with place.client() as client:
        for job_id in ("on-objects", "private"):
            texts = [repr(client.job(job_id)), *map(repr, client.job(job_id).watch())]
            assert len(texts) > 5 and not any(value in text for value in SECRETS for text in texts)
    environments = [
        path.read_bytes() for path in Path("/proc").glob("[0-9]*/environ") if _is_ours(path, place.service.state)
    ]
    assert environments and not any(value.encode() in data for value in SECRETS for data in environments)


def _is_ours(path: Path, state: Path) -> bool:
    try:
        return str(state).encode() in path.read_bytes()
    except OSError:
        return False

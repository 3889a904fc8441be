"""One fine-tuning through every door of a protected service, as each door's users do it: sent, followed, asked."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import google_crc32c

import shardyard
from helpers.protected import PROJECT, SUBMITTER, Protected
from helpers.repository import ROOT
from helpers.served import BIN

TEXTS = ("a good film", "bad")
EPOCHS = 2


@dataclass(frozen=True)
class Story:
    """What a door showed of one job: the numbers of its events, and (label, score) of each text."""

    job_id: str
    sequences: list[int]
    has_succeeded: bool
    answers: list[tuple[str, float]]


@dataclass(frozen=True)
class Refusal:
    """How a door says that something is wrong."""

    exit_code: int
    text: str


class Failed(Exception):
    """A door's program ended with an error."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal


@dataclass(frozen=True)
class Visit:
    """Who comes to the service through a door, and with which variables; `key` makes names and files unique."""

    place: Protected
    key: str
    who: str = SUBMITTER
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def file(self) -> Path:
        """The reviews, with bytes of their own: each door really uploads them."""
        path = self.place.data / f"{self.key}.csv"
        number = int(hashlib.sha256(self.key.encode()).hexdigest()[:3], 16)
        path.write_text((self.place.data / "reviews.csv").read_text() + "\n" * number)
        return path

    def run(self, *command: str, text: str = "") -> str:
        """What a program prints. Raises: Failed."""
        done = self.place.run(*command, who=self.who, text=text, **dict(self.variables))
        if done.returncode:
            raise Failed(Refusal(done.returncode, done.stdout + done.stderr))
        return done.stdout


def by_command(visit: Visit) -> Story:
    """The command line."""
    flags = ("--task", "text-classification", "--model", f"server:{visit.place.data / 'bert'}", "--epochs", str(EPOCHS))
    said = visit.run("shardyard", "submit", *flags, "--train", str(visit.file), "--job-id", visit.key)
    answers = json.loads(visit.run("shardyard", "predict", visit.key, *TEXTS, "--json"))
    lines = [line.split() for line in said.splitlines()]
    return Story(
        visit.key,
        [int(words[0]) for words in lines if words and words[0].isdigit()],
        any(words[2:] == ["finalizing", "→", "succeeded"] for words in lines),
        [(each["label"], max(each["scores"].values())) for each in answers],
    )


def by_client(visit: Visit) -> Story:
    """The SDK, which finds everything in the environment."""
    with _environment(visit), shardyard.Client(reconnect_for=5) as client:
        job = client.submit(_spec(visit), job_id=visit.key)
        events = list(job.watch())
        return _told(visit, events, job.model().predict(TEXTS))


async def by_async_client(visit: Visit) -> Story:
    """The async SDK, with arguments."""
    place, given = visit.place, visit.place.environment(visit.who, **dict(visit.variables))
    address, token, ca = (given[f"SHARDYARD_{name}"] for name in ("ADDRESS", "TOKEN", "CA"))
    with mock.patch.dict("os.environ", {"SHARDYARD_CONFIG": str(place.folder / "none.toml")}):
        async with shardyard.AsyncClient(address, token, PROJECT, ca=ca, reconnect_for=5) as client:
            job = await client.submit(_spec(visit), job_id=visit.key)
            events = [event async for event in job.watch()]
            return _told(visit, events, await (await job.model()).predict(TEXTS))


def by_buf_curl(visit: Visit) -> Story:
    """`buf curl` over gRPC, with the protos."""
    content = visit.file.read_bytes()
    file = {"path": "rows.csv", "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    header = {"parent": f"projects/{PROJECT}", "resource_id": visit.key, "request_id": _uuid(), "files": [file]}
    chunk = {"data": base64.b64encode(content).decode(), "crc32c": google_crc32c.value(content)}
    (dataset,) = _buf(visit, "DatasetService/CreateDataset", {"header": header}, {"chunk": chunk})
    spec = {
        "fine_tuning": {"text_classification": {}},
        "model": {"uri": str(visit.place.data / "bert")},
        "train_data": {"dataset": dataset["name"]},
        "optimization": {"epochs": EPOCHS},
    }
    request = {"parent": f"projects/{PROJECT}", "job_id": visit.key, "request_id": _uuid(), "job": {"spec": spec}}
    (job,) = _buf(visit, "JobService/CreateJob", request)
    batches = _buf(visit, "JobService/WatchJob", {"name": job["name"]})
    events = [event for batch in batches for event in batch.get("events", [])]
    asked = {"model": f"projects/{PROJECT}/models/{visit.key}", "instances": [{"text": text} for text in TEXTS]}
    (answer,) = _buf(visit, "ModelService/Predict", asked)
    found = [each["classification"] for each in answer["predictions"]]
    return Story(
        visit.key,
        [int(event["sequence"]) for event in events],
        any(event.get("state", {}).get("to") == "STATE_SUCCEEDED" for event in events),
        [(each["label"], max(score["score"] for score in each["scores"])) for each in found],
    )


def by_example(command: Sequence[str]) -> Callable[[Visit], Story]:
    """A client under examples/."""

    def through(visit: Visit) -> Story:
        said = visit.run(*command, str(visit.place.data / "bert"), str(visit.file), *TEXTS)
        lines = said.splitlines()
        found = re.fullmatch(rf"submitted projects/{PROJECT}/jobs/(\S+)", lines[0])
        assert found, said
        words = [line.split(maxsplit=2) for line in lines[-len(TEXTS) :]]
        return Story(
            found[1],
            [int(line.split()[0]) for line in lines if line.split()[0].isdigit()],
            any("FINALIZING → SUCCEEDED" in line for line in lines),
            [(label, float(score)) for label, score, _ in words],
        )

    return through


def curve(place: Protected, job_id: str) -> list[tuple[int, float]]:
    """The loss of every step."""
    with place.client() as client:
        found = client.job(job_id).metrics("loss", max_points=200)["loss"]
    return [(point.step, point.value) for point in found.points]


def _spec(visit: Visit) -> shardyard.JobSpec:
    return shardyard.JobSpec(
        shardyard.TextClassification(),
        model=f"server:{visit.place.data / 'bert'}",
        train_data=visit.file,
        optimization=shardyard.Optimization(epochs=EPOCHS),
    )


def _told(visit: Visit, events: list[Any], answers: Any) -> Story:
    return Story(
        visit.key,
        [event.sequence for event in events],
        any(getattr(event.data, "to", "") == "succeeded" for event in events),
        [(answer.label, answer.score) for answer in answers],
    )


@contextlib.contextmanager
def _environment(visit: Visit) -> Iterator[None]:
    found = visit.place.environment(visit.who, **dict(visit.variables))
    with mock.patch.dict("os.environ", {name: value for name, value in found.items() if name.startswith("SHARDYARD_")}):
        yield


def _buf(visit: Visit, method: str, *messages: object) -> list[Any]:
    given = visit.place.environment(visit.who, **dict(visit.variables))
    headers = visit.place.folder / f"{visit.key}.headers"
    headers.write_text(f"authorization: Bearer {given['SHARDYARD_TOKEN']}\n" if given["SHARDYARD_TOKEN"] else "")
    reach = ("--protocol", "grpc", "--schema", str(ROOT / "protos"), "--cacert", given["SHARDYARD_CA"])
    reach += ("--header", f"@{headers}") if given["SHARDYARD_TOKEN"] else ()
    url = f"https://{given['SHARDYARD_ADDRESS']}/shardyard.v1.{method}"
    said = visit.run(str(BIN / "buf"), "curl", *reach, "-d", "@-", url, text="\n".join(map(json.dumps, messages)))
    decoder, found = json.JSONDecoder(), []
    while said := said.strip():
        value, end = decoder.raw_decode(said)
        found.append(value)
        said = said[end:]
    return found


def _uuid() -> str:
    return str(uuid.uuid4())

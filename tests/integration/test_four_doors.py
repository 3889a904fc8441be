"""The same job through the command line, both clients and a raw call: one loss curve, and features of one model."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import shardyard
from helpers.served import BIN
from helpers.workplace import Workplace, workplace

CURVE = 200


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("doors")) as place:
        yield place


def spec(place: Workplace) -> shardyard.JobSpec:
    return shardyard.JobSpec(
        shardyard.TextClassification(pooling="mean", max_length=16),
        model=place.folder / "bert",
        train_data=place.folder / "reviews.csv",
        eval_data=place.folder / "test.csv",
        optimization=shardyard.Optimization(max_steps=12, learning_rate=1e-3, seed=7),
    )


def curve(client: shardyard.Client, job_id: str) -> list[tuple[int, float]]:
    job = client.job(job_id)
    assert job.wait(timeout=240).state == "succeeded"
    return [(point.step, point.value) for point in job.metrics("loss", max_points=CURVE)["loss"].points]


async def test_one_job_through_four_doors_has_one_loss_curve(place: Workplace) -> None:
    flags = "--task text-classification --pooling mean --max-length 16 --model bert --train reviews.csv --eval test.csv"
    numbers = "--max-steps 12 --lr 1e-3 --seed 7 --job-id by-command --detach"
    done = place.run(f"shardyard submit {flags} {numbers}")
    assert done.returncode == 0, done.stderr
    with shardyard.Client(place.address) as client:
        client.submit(spec(place), job_id="by-client")
        async with shardyard.AsyncClient(place.address) as asynchronous:
            await asynchronous.submit(spec(place), job_id="by-async-client")
        raw = raw_request(client.job("by-client"))
        url = f"http://{place.address}/shardyard.v1.JobService/CreateJob"
        (place.folder / "request.json").write_text(json.dumps(raw))
        done = place.run(f"{BIN / 'buf'} curl --protocol grpc --http2-prior-knowledge --data @request.json {url}")
        assert done.returncode == 0, done.stderr
        doors = ("by-command", "by-client", "by-async-client", "by-raw-call")
        curves = [curve(client, job_id) for job_id in doors]
    assert len(curves[0]) == 12
    assert curves.count(curves[0]) == 4


def raw_request(job: shardyard.Job) -> dict[str, object]:
    """The request as a program without an SDK would write it: the data sets and the model are there by now."""
    submitted = job.info.spec
    assert submitted is not None
    return {
        "parent": "projects/default",
        "job_id": "by-raw-call",
        "job": {
            "spec": {
                "fine_tuning": {"text_classification": {"pooling": "POOLING_MEAN", "max_length": 16}},
                "model": submitted["model"],
                "train_data": submitted["train_data"],
                "eval_data": submitted["eval_data"],
                "optimization": {"max_steps": "12", "learning_rate": 1e-3, "seed": "7"},
            }
        },
    }

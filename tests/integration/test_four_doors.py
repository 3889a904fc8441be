"""The same job through the command line, both clients and a raw call: one loss curve, and features of one model."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import shardyard
from helpers.served import BIN
from helpers.small_pictures import save_vit, write_folders
from helpers.workplace import Workplace, workplace

CURVE = 200


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("doors")) as place:
        yield place


# The flags of the command line, the same as a task of the SDK, as a request of one's own, and the model and the files.
JOBS = {
    "texts": (
        "--task text-classification --pooling mean --max-length 16",
        shardyard.TextClassification(pooling="mean", max_length=16),
        {"text_classification": {"pooling": "POOLING_MEAN", "max_length": 16}},
        ("bert", "reviews.csv", "test.csv"),
    ),
    "words": (
        "--task token-classification --max-length 16",
        shardyard.TokenClassification(max_length=16),
        {"token_classification": {"max_length": 16}},
        ("bert", "words.conll", "words.jsonl"),
    ),
    "pictures": (
        "--task image-classification",
        shardyard.ImageClassification(),
        {"image_classification": {}},
        ("vit", "flowers/train", "flowers/test"),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def words(place: Workplace) -> None:
    rows = [{"tokens": ["Anna", "met", name], "tags": ["B-PER", "O", "B-LOC"]} for name in ["Rome", "Bonn"] * 12]
    lines = ("\n".join(f"{w} {t}" for w, t in zip(row["tokens"], row["tags"], strict=True)) for row in rows)
    (place.folder / "words.conll").write_text("\n\n".join(lines) + "\n")
    (place.folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))


@pytest.fixture(scope="module", autouse=True)
def pictures(place: Workplace) -> None:
    write_folders(place.folder / "flowers" / "train", 12)
    write_folders(place.folder / "flowers" / "test", 3, first=50)
    save_vit(place.folder / "vit")


def spec(place: Workplace, job: str) -> shardyard.JobSpec:
    _, task, _, (model, train, held_out) = JOBS[job]
    return shardyard.JobSpec(
        task,
        model=place.folder / model,
        train_data=place.folder / train,
        eval_data=place.folder / held_out,
        optimization=shardyard.Optimization(max_steps=12, learning_rate=1e-3, seed=7),
    )


def curve(client: shardyard.Client, job_id: str) -> list[tuple[int, float]]:
    job = client.job(job_id)
    assert job.wait(timeout=240).state == "succeeded"
    return [(point.step, point.value) for point in job.metrics("loss", max_points=CURVE)["loss"].points]


# The doors know nothing of tasks: two tasks, of two kinds of inputs, show it; the third one is for the proofs.
@pytest.mark.parametrize("job", ["words", "pictures", pytest.param("texts", marks=pytest.mark.prove)])
async def test_one_job_through_four_doors_has_one_loss_curve(place: Workplace, job: str) -> None:
    flags, _, _, (model, train, held_out) = JOBS[job]
    files = f"--model {model} --train {train} --eval {held_out}"
    numbers = f"--max-steps 12 --lr 1e-3 --seed 7 --job-id {job}-by-command --detach"
    done = place.run(f"shardyard submit {flags} {files} {numbers}")
    assert done.returncode == 0, done.stderr
    with shardyard.Client(place.address) as client:
        client.submit(spec(place, job), job_id=f"{job}-by-client")
        async with shardyard.AsyncClient(place.address) as asynchronous:
            await asynchronous.submit(spec(place, job), job_id=f"{job}-by-async-client")
        raw = raw_request(client.job(f"{job}-by-client"), job)
        url = f"http://{place.address}/shardyard.v1.JobService/CreateJob"
        (place.folder / "request.json").write_text(json.dumps(raw))
        done = place.run(f"{BIN / 'buf'} curl --protocol grpc --http2-prior-knowledge --data @request.json {url}")
        assert done.returncode == 0, done.stderr
        doors = ("by-command", "by-client", "by-async-client", "by-raw-call")
        curves = [curve(client, f"{job}-{door}") for door in doors]
    assert len(curves[0]) == 12
    assert curves.count(curves[0]) == 4


def raw_request(by_client: shardyard.Job, job: str) -> dict[str, object]:
    """The request as a program without an SDK would write it: the data sets and the model are there by now."""
    submitted = by_client.info.spec
    assert submitted is not None
    return {
        "parent": "projects/default",
        "job_id": f"{job}-by-raw-call",
        "job": {
            "spec": {
                "fine_tuning": JOBS[job][2],
                "model": submitted["model"],
                "train_data": submitted["train_data"],
                "eval_data": submitted["eval_data"],
                "optimization": {"max_steps": "12", "learning_rate": 1e-3, "seed": "7"},
            }
        },
    }

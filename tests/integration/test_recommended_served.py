"""Which model to train, through the service: the catalogue and the project's models, the SDK and the command line."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardyard
from helpers.served import Served, served
from helpers.workplace import fill
from shardyard_trainer.choosing.catalogue import load_catalogue

GIB = 2**30
TASK = "text-classification"


@dataclasses.dataclass
class Place:
    """A service with prices, a client of it, and a folder with data and the model `bert` in the project."""

    service: Served
    client: shardyard.Client
    folder: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("here")
    fill(folder)
    where = tmp_path_factory.mktemp("service")
    with (
        served(where, "local", "--slot-hour-price", "0.5", "--currency", "EUR") as service,
        shardyard.Client(service.address) as client,
    ):
        yield Place(service, client, folder)


def test_models_are_ranked_with_what_they_need_and_the_command_that_starts_the_first(place: Place) -> None:
    found = place.client.recommend_models(TASK, rows=2000, memory="4GiB", languages=["en"])
    assert len(found.recommendations) == 5 and found.num_candidates > 30
    assert found.assumptions is not None and found.assumptions.memory_bytes == 4 * GIB
    totals = [sum(each.points for each in one.points) for one in found.recommendations]
    assert totals == sorted(totals, reverse=True)
    for each in found.recommendations:
        assert each.memory is not None and each.memory.verdict in {"fits", "tight"}
        assert each.memory.total_bytes <= 4 * GIB == each.memory.available_bytes
        assert each.time is not None and each.time.cost == pytest.approx(0.5 * each.time.slot_hours)
        assert each.time.currency == "EUR" and each.latency is not None
        assert each.languages and "en" in each.languages and all(score.source for score in each.scores)
        assert bool(each.licence_source) == ("licence" not in each.unchecked)
        assert each.command.startswith(f"shardyard submit --task {TASK} --model {each.name} --train DATA")
        assert each.pros
    assert {each.reason for each in found.left_out} == {"WEIGHTS", "MEMORY"}
    assert any("does not reach the Hub" in note for note in found.notes), "the service is offline here"
    assert place.client.recommend_models(TASK, rows=2000, memory="4GiB", languages=["en"]) == found


def test_a_plan_says_what_its_run_costs(place: Place) -> None:
    spec = shardyard.JobSpec(
        shardyard.TextClassification(max_length=16),
        model=place.folder / "bert",
        train_data=place.folder / "reviews.csv",
        optimization=shardyard.Optimization(epochs=3),
        resources=shardyard.Resources(workers=2),
    )
    plan = place.client.plan(spec)
    assert plan.slots == 2 and plan.time is not None and plan.time.slot_hours > 0
    assert plan.time.cost == pytest.approx(0.5 * plan.time.slot_hours) and plan.time.currency == "EUR"
    command = f"shardyard plan --task {TASK} --model ./bert --train reviews.csv --epochs 3 --workers 2"
    shown = place.service.run(*shlex.split(command), cwd=place.folder)
    assert shown.returncode == 0 and " EUR" in shown.stdout, shown.stderr


def test_the_memory_is_what_a_plan_of_the_same_architecture_says(place: Place) -> None:
    text = "the dog is cute " * 5
    rows = "".join(f"{text},{'good' if at % 2 else 'bad'}\n" for at in range(60))
    (place.folder / "same.csv").write_text(f"text,label\n{rows}")
    small = next(entry for entry in load_catalogue().entries if entry.id == "google/bert_uncased_L-2_H-128_A-2")
    spec = shardyard.JobSpec(
        shardyard.TextClassification(max_length=128),
        model=shardyard.Architecture("bert", dict(small.architecture)),
        tokenizer=shardyard.TrainedTokenizer(vocab_size=300),
        train_data=place.folder / "same.csv",
        optimization=shardyard.Optimization(epochs=3),
    )
    plan = place.client.plan(spec)
    assert plan.train_stats is not None and plan.train_stats.lengths is not None and plan.memory is not None
    found = place.client.recommend_models(
        TASK, rows=60, tokens_per_row=plan.train_stats.lengths.longest, max_results=50
    )
    each = next(one for one in found.recommendations if one.name == f"hub:{small.id}")
    assert each.memory == plan.memory and each.num_parameters == plan.num_parameters
    assert each.time is not None and plan.time is not None
    assert each.time.expected == pytest.approx(plan.time.expected, rel=0.05)


def test_a_model_of_the_project_is_recommended_and_its_command_is_accepted(place: Place) -> None:
    model = place.client.upload_model(place.folder / "bert")
    found = place.client.recommend_models(TASK, rows=80, memory="1GiB")
    first = found.recommendations[0]
    assert first.name == model.name and any(point.criterion == "own" for point in first.points)
    command = first.command.replace("DATA", str(place.folder / "reviews.csv"))
    done = place.service.run(*shlex.split(command), "--validate-only")
    assert done.returncode == 0, done.stderr
    spec = {**(first.spec or {}), "train_data": str(place.folder / "reviews.csv")}
    planned = place.client.plan({"job": {"spec": spec}})
    assert planned.num_parameters == first.num_parameters
    other = place.client.recommend_models("image_classification", rows=80)
    assert all(not each.name.startswith("projects/") for each in other.recommendations)
    assert {each.reason: each.count for each in other.left_out if each.reason != "WEIGHTS"} == {"UNSUITED": 1}


def test_conditions_leave_out_and_say_how_many(place: Place) -> None:
    german = place.client.recommend_models(TASK, languages=["de"], commercial_use=True, max_results=50)
    assert german.recommendations and all(
        "de" in each.languages or each.name.startswith("projects/") for each in german.recommendations
    )
    counts = {each.reason: each.count for each in german.left_out}
    assert counts["LANGUAGE"] > 20
    assert german.num_candidates == len(german.recommendations) + sum(counts.values())
    nothing = place.client.recommend_models("instruction", rows=10, memory="1MiB")
    assert nothing.recommendations == () and nothing.left_out[-1].reason == "MEMORY"
    cheap = place.client.recommend_models(TASK, rows=2000, max_cost=0.02, max_time="30m", max_latency="100ms")
    for each in cheap.recommendations:
        assert each.time is not None and each.time.cost is not None and each.time.cost <= 0.02
        assert each.latency is not None and each.latency.total_seconds() <= 0.1
    assert {"LATENCY"} <= {each.reason for each in cheap.left_out}


def test_the_command_line_shows_a_table_the_reasons_and_the_command(place: Place) -> None:
    done = place.service.run("shardyard", "recommend", "--task", TASK, "--rows", "2000", "--memory", "4GiB")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["MODEL", "PARAMETERS", "MEMORY", "TIME"]
    assert "   + " in done.stdout and "   - " in done.stdout
    published = [line for line in lines[1:4] if line.startswith("hub:")]
    assert lines[0].split()[-2] == "LICENCE" and done.stdout.count(", read at ") == len(published) >= 2
    assert lines[-1].strip().startswith("shardyard submit --task text-classification --model ")
    as_json = place.service.run(
        "shardyard", "recommend", "--task", TASK, "--rows", "2000", "--memory", "4GiB", "--json", "--limit", "2"
    )
    document = json.loads(as_json.stdout)
    assert [each["name"] for each in document["recommendations"]] == [line.split()[0] for line in lines[1:3]]
    assert lines[-1].strip() == document["recommendations"][0]["command"]


def test_wrong_requests_are_refused_at_once_with_all_that_is_wrong(place: Place) -> None:
    with pytest.raises(shardyard.InvalidArgument) as caught:
        place.client.recommend_models("text-clasification", rows=-1, languages=["EN", "deu"], max_results=99)
    assert {each.field for each in caught.value.violations} == {
        "task", "rows", "languages[0]", "languages[1]", "max_results"
    }  # fmt: skip
    with pytest.raises(shardyard.InvalidArgument, match="already trained"):
        place.client.recommend_models("model_evaluation")
    for memory, words in (("4GBB", "is not a size"), ("-4GiB", "is not a size"), ("", "is not a size")):
        with pytest.raises(shardyard.InvalidArgument, match=words):
            place.client.recommend_models(TASK, memory=memory)
    with pytest.raises(TypeError, match="takes no language; it takes languages"):
        place.client.recommend_models(TASK, language="en")  # type: ignore[call-arg]
    with pytest.raises(shardyard.InvalidArgument, match="is not a duration"):
        place.client.recommend_models(TASK, rows=5, max_time="soon")
    done = place.service.run("shardyard", "recommend", "--task", "nope", "--json")
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 1 and error["violations"][0]["field"] == "task"

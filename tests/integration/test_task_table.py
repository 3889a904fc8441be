"""The integration table, row by row through the service: each task on real data, where its row says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import shardyard
from helpers.real_slices import SEED, write_rows
from helpers.small_specs import shared_data
from helpers.task_table import ROWS
from helpers.workplace import Workplace

TRAINED = [name for name, row in ROWS.items() if row.story is not None]


@pytest.mark.parametrize("name", TRAINED)
def test_a_task_learns_from_real_data_and_its_model_gives_the_numbers_of_its_evaluation(
    place: Workplace, name: str
) -> None:
    row = ROWS[name]
    assert row.story is not None
    (folder := place.folder / name).mkdir()
    story = row.story(folder)
    with shardyard.Client(place.address) as client:
        job = client.submit(dataclasses.replace(story.spec, **row.where()), job_id=name.replace("_", "-"))
        assert job.wait(timeout=300).state == "succeeded"
        resolved = job.info.resolved_spec or {}
        assert resolved["resources"]["workers"] == row.workers
        assert resolved["parallelism"].get("zero_stage", 0) == row.zero_stage
        losses = [point.value for point in job.metrics("loss", max_points=200)["loss"].points]
        assert sum(losses[-5:]) < story.falls_to * sum(losses[:5]), losses
        model = job.model()
        assert model.info.task == name
        own = story.numbers(model) if story.numbers else measured(client, model, story.spec)
        assert any(own.values()), "nothing is right: equal numbers would say nothing"
        assert own == pytest.approx({name: model.info.metrics[name] for name in own}, rel=1e-5, abs=1e-9)


def measured(client: shardyard.Client, model: shardyard.Model, spec: shardyard.JobSpec) -> dict[str, float]:
    """All numbers of a model, by a job that evaluates it."""
    assert isinstance(spec.eval_data, Path)
    job = client.submit(
        shardyard.ModelEvaluation(data=spec.eval_data),
        model=model,
        resources=ROWS["model_evaluation"].where()["resources"],
        optimization=shardyard.Optimization(seed=SEED),
    )
    found = job.wait(timeout=300).evaluation
    assert found is not None and found.is_final
    return dict(found.metrics)


def test_vectors_of_real_texts_are_written_by_all_workers_and_are_those_of_embed(place: Workplace) -> None:
    lines = (shared_data("sst2") / "dev.tsv").read_text(encoding="utf-8").splitlines()[:40]
    texts = [line.split("\t")[0] for line in lines]
    with shardyard.Client(place.address) as client:
        job = client.submit(
            shardyard.FeatureExtraction(data=write_rows(place.folder / "sst2.jsonl", [{"text": t} for t in texts])),
            model=place.folder / "bert",
            resources=ROWS["feature_extraction"].where()["resources"],
        )
        assert job.wait(timeout=300).state == "succeeded"
        folder = client.dataset(job.id).download(place.folder / "vectors")
        vectors = client.upload_model(place.folder / "bert").embed(texts)
    rows = pq.read_table(folder).to_pylist()
    assert [row["vector"] for row in rows] == [pytest.approx(vector.values, abs=1e-5) for vector in vectors]

"""A feature extraction continues where an attempt left off, and takes nothing of other data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from helpers.extractions import Recorder, extract
from helpers.tiny_folders import save_folder
from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.failures import RunFailed
from shardyard_trainer.planning import extraction
from shardyard_trainer.planning.plan import plan


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> worker_pb2.AttemptSpec:
    monkeypatch.setitem(extraction.ROWS_PER_SHARD, spec_pb2.FeatureExtraction.OUTPUT_POOLED, 4)
    save_folder(tmp_path / "model", "BertModel")
    for made in ("job", "datasets"):
        (tmp_path / made).mkdir()
    (tmp_path / "texts.txt").write_text("\n".join(["the dog", "a cat", "my film"] * 6) + "\n")
    spec = spec_pb2.JobSpec(
        feature_extraction=spec_pb2.FeatureExtraction(data=spec_pb2.DataSource(uri=str(tmp_path / "texts.txt"))),
        model=spec_pb2.ModelSource(uri=str(tmp_path / "model")),
    )
    return worker_pb2.AttemptSpec(
        epoch=1,
        spec=spec,
        locations=worker_pb2.Locations(data_roots=[str(tmp_path)], cache_dir=str(tmp_path / "cache")),
        job_dir=str(tmp_path / "job"),
        export_dir=str(tmp_path / "datasets" / "uid"),
    )


def working_files(attempt: worker_pb2.AttemptSpec) -> dict[str, Any]:
    return {path.name: path.stat().st_mtime_ns for path in Path(attempt.job_dir).rglob("*.parquet")}


def test_a_stopped_extraction_continues_without_making_a_file_twice(attempt: worker_pb2.AttemptSpec) -> None:
    first = extract(attempt, Recorder(stop_after=1))
    assert first.kinds()[-1] == "stopped"
    made = working_files(attempt)
    assert sorted(made) == ["features-000000.parquet", "features-000001.parquet"]
    (next(Path(attempt.job_dir).glob("features-*")) / ".features-000003.parquet.1").write_bytes(b"half")
    attempt.epoch = 2
    second = extract(attempt, Recorder())
    resumed = next(event.resumed for event in second.events if event.WhichOneof("payload") == "resumed")
    assert resumed.step == 2
    assert second.kinds()[-1] == "exported"
    folder = Path(attempt.export_dir)
    assert sorted(path.name for path in folder.iterdir()) == [
        "_features.json",
        *(f"features-{index:06}.parquet" for index in range(5)),
    ]
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [row["row"] for row in rows] == list(range(18))
    assert rows[0]["vector"] == pytest.approx(rows[3]["vector"], abs=1e-5)
    assert {file.path for file in second.events[-1].exported.model.files} == {path.name for path in folder.iterdir()}
    assert not working_files(attempt)


def test_files_of_other_data_are_not_taken(attempt: worker_pb2.AttemptSpec, tmp_path: Path) -> None:
    extract(attempt, Recorder(stop_after=1))
    (tmp_path / "texts.txt").write_text("very good\n")
    done = extract(attempt, Recorder())
    assert next(event.resumed.step for event in done.events if event.HasField("resumed")) == 0
    assert [path.name for path in Path(attempt.export_dir).glob("*.parquet")] == ["features-000000.parquet"]


def test_data_that_changed_since_the_plan_is_refused(attempt: worker_pb2.AttemptSpec) -> None:
    attempt.plan.CopyFrom(plan_pb2.JobPlan(data_fingerprint="of other files"))
    with pytest.raises(RunFailed) as failed:
        extract(attempt, Recorder())
    assert failed.value.cause == "DATA_CHANGED"
    assert not Path(attempt.export_dir).exists()


def test_a_plan_says_what_of_the_texts_is_cut_unknown_or_blank(tmp_path: Path) -> None:
    save_folder(tmp_path / "model", "BertModel")
    lines = ["the dog", "the cat is very cute and my dog is good", "Schadenfreude", " ", "bad film"]
    rows = "".join(json.dumps({"text": line}) + "\n" for line in lines * 4)
    (tmp_path / "texts.jsonl").write_text(rows)
    spec = spec_pb2.JobSpec(
        feature_extraction=spec_pb2.FeatureExtraction(
            data=spec_pb2.DataSource(uri=str(tmp_path / "texts.jsonl")), max_length=6
        ),
        model=spec_pb2.ModelSource(uri=str(tmp_path / "model")),
    )
    places = worker_pb2.Locations(data_roots=[str(tmp_path)], cache_dir=str(tmp_path / "cache"))
    request = worker_pb2.PlanRequest(spec=spec, locations=places)
    found = worker_pb2.PlanResult.FromString(plan(request.SerializeToString())).plan
    stats = found.train_stats
    assert (stats.num_samples, stats.num_tokens) == (20, 4 * (4 + 6 + 3 + 2 + 4))
    assert stats.cut_share == pytest.approx(0.2)
    assert stats.unknown_share == pytest.approx(1 / 9)
    assert [(each.reason, each.field) for each in found.warnings] == [
        ("BLANK_TEXTS", "spec.feature_extraction.data"),
        ("TEXTS_CUT", "spec.feature_extraction.max_length"),
        ("UNKNOWN_TOKENS", "spec.model"),
    ]
    assert "label" not in "".join(each.message for each in found.warnings)

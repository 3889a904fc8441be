"""Whole runs of the trainer without a coordinator: what it exports answers as its own evaluation says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from google.protobuf import json_format

from helpers.tiny_folders import WORDS, save_folder
from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import embed, predict

ROWS = [
    (f"the {WORDS[2 + index % 2]} is {'very good' if index % 3 else 'not bad'}", "yes" if index % 3 else "no")
    for index in range(48)
]


def run_trainer(tmp_path: Path, spec: dict[str, Any], *, workers: int = 1) -> list[tuple[str, dict[str, Any]]]:
    """The events that rank 0 prints."""
    text = json.dumps(spec).replace("ROOT", str(tmp_path))
    attempt = worker_pb2.AttemptSpec(
        job_name="projects/default/jobs/t",
        job_uid="0" * 32,
        epoch=1,
        spec=json_format.Parse(text, spec_pb2.JobSpec()),
        locations=worker_pb2.Locations(data_roots=[str(tmp_path)], cache_dir=str(tmp_path / "cache")),
        job_dir=str(tmp_path / "job"),
        attempt_dir=str(tmp_path / "job" / "e000001"),
        export_dir=str(tmp_path / "out"),
        world_size=workers,
        threads_per_rank=1,
        rendezvous=f"file://{tmp_path}/rendezvous",
    )
    (tmp_path / "spec.json").write_text(json_format.MessageToJson(attempt))
    (tmp_path / "rendezvous").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "shardyard_trainer", "spec.json"]
    ranks = [
        subprocess.Popen(
            [*command, "--rank", str(rank), "--local-rank", str(rank)],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(workers)
    ]
    outputs = [rank.communicate(timeout=110)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * workers, "\n".join(outputs)[-6000:]
    events = []
    for line in outputs[0].splitlines():
        parts = line.split(" ", 2)
        if len(parts) == 3 and parts[2].startswith("{"):
            events.append((parts[1], json.loads(parts[2])))
    return events


def write_reviews(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("\n".join(["text,label", *(f"{text},{label}" for text, label in rows)]) + "\n")


@pytest.mark.parametrize(
    ("kind", "pooling", "stage", "workers"),
    [
        ("GPT2LMHeadModel", "LAST", 0, 1),
        pytest.param("BertModel", "CLS", 3, 2, marks=pytest.mark.prove),
        pytest.param("BertModel", "MEAN", 1, 2, marks=pytest.mark.prove),
    ],
)
def test_predict_on_the_test_set_gives_the_jobs_own_numbers(
    tmp_path: Path, kind: str, pooling: str, stage: int, workers: int
) -> None:
    save_folder(tmp_path / "model", kind)
    write_reviews(tmp_path / "train.csv", ROWS[:32])
    write_reviews(tmp_path / "test.csv", ROWS[32:])
    spec = {
        "fine_tuning": {"text_classification": {"pooling": f"POOLING_{pooling}"}},
        "model": {"uri": "ROOT/model"},
        "train_data": {"uri": "ROOT/train.csv"},
        "eval_data": {"uri": "ROOT/test.csv"},
        "optimization": {"max_steps": 6, "global_batch_size": 8, "learning_rate": 0.003},
        "parallelism": {"zero_stage": stage},
        "resources": {"workers": workers},
    }
    events = run_trainer(tmp_path, spec, workers=workers)
    final = [event for kind, event in events if kind == "evaluation"][-1]["metrics"]
    exported = next(event for kind, event in events if kind == "exported")
    assert exported["model"]["metrics"] == pytest.approx(final)
    request = model_service_pb2.PredictRequest(
        instances=[model_service_pb2.Instance(text=text) for text, _ in ROWS[32:]]
    )
    call = worker_pb2.PredictCall(folder=str(tmp_path / "out"), request=request)
    reply = worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))
    answers = reply.response.predictions
    right = [answer.classification.label == label for answer, (_, label) in zip(answers, ROWS[32:], strict=True)]
    assert np.mean(right) == pytest.approx(final["accuracy"])
    losses = [
        -np.log(next(score.score for score in answer.classification.scores if score.label == label))
        for answer, (_, label) in zip(answers, ROWS[32:], strict=True)
    ]
    assert np.mean(losses) == pytest.approx(final["loss"], abs=1e-5)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.prove), 2])
def test_features_are_those_of_embed_and_a_data_set_at_the_end(tmp_path: Path, workers: int) -> None:
    save_folder(tmp_path / "model", "BertModel")
    texts = [f"the {WORDS[index % 7]} is {WORDS[index % 11]}" for index in range(300)]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    spec = {
        "feature_extraction": {"data": {"uri": "ROOT/texts.txt"}, "output": "OUTPUT_LAST_HIDDEN_STATE"},
        "model": {"uri": "ROOT/model"},
        "resources": {"workers": workers},
    }
    events = run_trainer(tmp_path, spec, workers=workers)
    kinds = [kind for kind, _ in events]
    assert kinds.index("resumed") < kinds.index("progress") < kinds.index("canary") < kinds.index("finished")
    assert kinds[-1] == "exported"
    assert events[-1][1]["is_dataset"] is True
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert [file.name for file in files] == [f"features-{index:06}.parquet" for index in range(3)]
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert [row["row"] for row in rows] == list(range(300))
    request = model_service_pb2.EmbedRequest(
        instances=[model_service_pb2.Instance(text=text) for text in texts],
        output=spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE,
    )
    call = worker_pb2.EmbedCall(folder=str(tmp_path / "model"), request=request)
    reply = worker_pb2.EmbedReply.FromString(embed(call.SerializeToString()))
    for row, embedding in zip(rows, reply.response.embeddings, strict=True):
        assert np.allclose(np.array(row["vectors"]).ravel(), embedding.values, atol=1e-5)
    assert not list((tmp_path / "job").glob("features-*"))

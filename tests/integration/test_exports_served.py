"""Further formats of a model through the service: with its training, afterwards, downloaded, refused and replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

import shardyard
from helpers.workplace import Workplace
from shardyard.types import ExportedFormat

TEXTS = ["the dog is good", "bad", "a film the cat my hello good is a bad the dog , hello"]


@pytest.fixture(scope="module")
def job(place: Workplace) -> shardyard.JobInfo:
    """A training whose model is also written in two formats, and is refused in none."""
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.TextClassification(max_length=16, pooling="cls"),
            model=place.folder / "bert",
            train_data=place.folder / "reviews.csv",
            eval_data=place.folder / "test.csv",
            optimization=shardyard.Optimization(epochs=4, learning_rate=1e-2, global_batch_size=16, seed=1),
            export=shardyard.ExportPolicy(["onnx", "bf16"], max_drop=0.2),
        )
        return client.submit(spec, job_id="exported").wait(timeout=240)


def logits_of(folder: Path, texts: list[str]) -> list[list[float]]:
    """As the README of a format's folder says."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    read = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="np")
    inputs = {each.name: read[each.name].astype("int64") for each in session.get_inputs()}
    found: list[list[float]] = session.run(["logits"], inputs)[0].tolist()
    return found


def test_a_training_leaves_the_formats_that_its_spec_names(
    place: Workplace, job: shardyard.JobInfo, tmp_path: Path
) -> None:
    assert job.state == "succeeded"
    with shardyard.Client(place.address) as client:
        model = client.model("exported")
        onnx, bf16 = model.info.exports
        assert (onnx.format, onnx.prefix, bf16.format) == ("onnx", "exports/onnx/", "bf16")
        assert onnx.difference < 1e-4 and onnx.metrics == pytest.approx(onnx.original_metrics, abs=1e-5)
        assert onnx.metric == "accuracy" and onnx.num_samples == 16 and onnx.max_drop == pytest.approx(0.2)
        assert onnx.original_metrics["loss"] == pytest.approx(model.info.metrics["loss"], abs=1e-5)
        assert onnx.latency_s > 0 < onnx.original_latency_s and onnx.source_job == job.name
        assert bf16.size_ratio < 0.75 and 0 < bf16.difference < 0.1
        files = {file.path: file.size_bytes for file in model.info.files}
        assert onnx.size_bytes == sum(size for path, size in files.items() if path.startswith(onnx.prefix))
        assert model.info.size_bytes == sum(files.values())
        wanted = [answer.logits for answer in model.predict(TEXTS)]
        folder = model.download(tmp_path / "onnx", format="onnx")
        half = model.download(tmp_path / "half", format="bf16")
        whole = model.download(tmp_path / "whole")
    assert logits_of(folder, TEXTS) == [pytest.approx(each, abs=1e-4) for each in wanted]
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["metrics"]["accuracy"] == onnx.metrics["accuracy"] and receipt["format"] == "onnx"
    assert "onnxruntime" in (folder / "README.md").read_text()
    assert not (whole / "exports").exists() and (whole / "model.safetensors").exists()
    read = transformers.AutoModelForSequenceClassification.from_pretrained(half, dtype=torch.bfloat16).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(half)
    with torch.no_grad():
        found = read(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.float().numpy()
    assert np.abs(found - np.asarray(wanted)).max() < 0.1 * np.abs(wanted).max() + 0.05


def test_a_format_is_added_to_a_stored_model_and_replaced_while_the_model_is_used(
    place: Workplace, job: shardyard.JobInfo, tmp_path: Path
) -> None:
    del job
    done = place.run("shardyard export exported --format onnx-int8 --max-drop 0.5 --job-id small", timeout_s=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "onnx-int8" in done.stdout and "download exported ./exported-onnx-int8 --format onnx-int8" in done.stdout
    with shardyard.Client(place.address) as client:
        first = client.job("small")
        receipt = first.export()
        assert receipt.format == "onnx_int8" and receipt.num_samples == 16 and receipt.source_job == first.name
        assert first.model().id == "exported" and first.info.evaluation is not None
        # The model is unchanged for whoever uses it: it plans, predicts, and is trained from.
        model = client.model("exported")
        before = [answer.logits for answer in model.predict(TEXTS)]
        again = model.export("onnx-int8", data=place.folder / "reviews.csv")
        assert again.wait(timeout=240).state == "succeeded"
        kept = [each for each in client.model("exported").info.exports if each.format == "onnx_int8"]
        assert [(each.source_job, each.num_samples) for each in kept] == [(again.name, 80)]
        assert [answer.logits for answer in model.predict(TEXTS)] == before
        folder = model.download(tmp_path / "int8", format="onnx-int8")
        assert sum(path.stat().st_size for path in folder.iterdir()) == kept[0].size_bytes
        path = Path(client.model("exported").info.path) / "exports"
        assert sorted(each.name for each in path.iterdir()) == ["bf16", "onnx", "onnx-int8"]
    answered = np.asarray(logits_of(folder, TEXTS))
    assert np.abs(answered - np.asarray(before)).max() < 0.2 * np.abs(before).max() + 0.1
    shown = place.run("shardyard models exported")
    assert "onnx-int8" in shown.stdout and "accuracy" in shown.stdout
    fetched = place.run("shardyard download exported ./fetched --format onnx-int8")
    assert fetched.returncode == 0 and (place.folder / "fetched" / "model.onnx").exists()


def test_a_format_over_its_bound_is_refused_and_the_model_stays_as_it_was(
    place: Workplace, job: shardyard.JobInfo
) -> None:
    del job
    with shardyard.Client(place.address) as client:
        before = client.model("exported").info
        refused = client.model("exported").export("bf16", metric="loss", max_drop=0.0, job_id="refused")
        ended = refused.wait(timeout=240, check=False)
        if ended.state == "succeeded":
            assert refused.export().drop <= 0  # By chance it is better.
            return
        assert ended.failure is not None and ended.failure.reason == "EXPORT_REFUSED"
        assert "loss of" in ended.failure.message and "0 is allowed" in ended.failure.message
        assert ended.attempt_count == 1
        assert client.model("exported").info == before


BAD: list[tuple[dict[str, Any], str]] = [
    ({"format": "gguf"}, "format: `gguf` is none of onnx, onnx_int8, bf16"),
    ({"format": "onnx", "max_drop": -1.0}, "max_drop"),
    ({"format": "onnx", "metric": "bleu"}, "metric: 'bleu' is not a metric of this text_classification"),
    ({"format": "onnx", "data": "server:/etc/passwd"}, "data.uri"),
    ({"format": "onnx", "job_id": "No"}, "job_id"),
]


@pytest.mark.parametrize(("given", "words"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_request_names_its_own_fields(
    place: Workplace, job: shardyard.JobInfo, given: dict[str, Any], words: str
) -> None:
    del job
    with shardyard.Client(place.address) as client, pytest.raises(shardyard.InvalidArgument) as refused:
        client.model("exported").export(**given)
    assert any(words in str(violation) for violation in refused.value.violations), refused.value.violations


def test_models_that_cannot_be_exported_are_refused_with_the_reason(place: Workplace, job: shardyard.JobInfo) -> None:
    del job
    with shardyard.Client(place.address) as client:
        bare = client.upload_model(place.folder / "bert")
        with pytest.raises(shardyard.InvalidArgument, match="uploaded, so no job has evaluated it"):
            bare.export("onnx")
        with pytest.raises(shardyard.InvalidArgument, match="fine-tune the model first"):
            bare.export("onnx", data=place.folder / "test.csv")
        with pytest.raises(shardyard.NotFound, match="there is no model"):
            shardyard.Model(client._connection, type(bare.message)(name="projects/default/models/none")).export("onnx")
        spec = shardyard.JobSpec(shardyard.ModelExport(place.folder / "test.csv"), model="hub:owner/name")
        with pytest.raises(shardyard.InvalidArgument, match="a model that the service stores"):
            client.submit(spec)


def receipt_of(exports: tuple[ExportedFormat, ...], name: str) -> ExportedFormat:
    return next(each for each in exports if each.format == name)

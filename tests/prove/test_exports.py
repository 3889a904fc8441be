"""A real BERT that has learnt SST-2, in every format: as good within a point, and int8 at a third of the size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import transformers

import shardyard
from helpers.served import BIN, Served
from helpers.small_specs import shared_data

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.prove


def test_int8_is_within_a_point_of_the_model_at_a_third_of_its_size(
    service: Served, bert: Path, tmp_path: Path
) -> None:
    data = shared_data("sst2")
    files = ["--model", str(bert), "--train", str(data / "train.tsv"), "--eval", str(data / "test.tsv")]
    formats = ["--export", "onnx", "--export", "bf16", "--max-drop", "0.01"]
    submit = [str(BIN / "shardyard"), "submit", str(EXAMPLES / "sst2.yaml"), "--job-id", "sst2-formats"]
    done = service.run(*submit, *files, *formats, timeout_s=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    export = [str(BIN / "shardyard"), "export", "sst2-formats", "--format", "onnx-int8", "--max-drop", "0.01"]
    done = service.run(*export, timeout_s=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [line.rsplit("\t", 1) for line in (data / "test.tsv").read_text().splitlines()]
    with shardyard.Client(service.address) as client:
        model = client.model("sst2-formats")
        made = {each.format: each for each in model.info.exports}
        for each in made.values():
            print(f"{each.format}: {each.size_ratio:.3f} of the size, {each.latency_s * 1e3:.2f} ms a sample (model "
                  f"{each.original_latency_s * 1e3:.2f}), accuracy {each.metrics['accuracy']:.4f} "
                  f"(the model {each.original_metrics['accuracy']:.4f}), difference {each.difference:.2g}")  # fmt: skip
        folder = model.download(tmp_path / "int8", format="onnx-int8")
        labels = model.info.labels
    small = made["onnx_int8"]
    assert sorted(made) == ["bf16", "onnx", "onnx_int8"]
    assert small.drop <= 0.01 and small.size_ratio <= 0.35
    assert made["onnx"].drop == pytest.approx(0, abs=1e-3) and made["onnx"].difference < 1e-4
    # What is downloaded is what was measured: the same answers, by onnxruntime and the tokenizer of its folder alone.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    right = 0
    for text, label in rows:
        read = tokenizer(text, truncation=True, max_length=64, return_tensors="np")
        inputs = {each.name: read[each.name].astype("int64") for each in session.get_inputs()}
        right += labels[int(np.argmax(session.run(["logits"], inputs)[0]))] == label
    assert right / len(rows) == pytest.approx(small.metrics["accuracy"], abs=1e-9)

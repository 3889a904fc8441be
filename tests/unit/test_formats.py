"""Further formats of a model: equal outputs at every length and batch size, receipts, and what is refused."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import json_format

from helpers.measured import TRAINED, Recorder, write_measured
from helpers.plan_requests import ask, places, where
from shardyard.export_formats import word_of, words
from shardyard.v1 import model_service_pb2, plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.exporting.network import completed, input_names
from shardyard_trainer.exporting.onnx_file import DATA_NAME, NAME, OnnxNetwork, write_onnx, write_quantised
from shardyard_trainer.failures import RunFailed
from shardyard_trainer.models.door import open_folder, signature
from shardyard_trainer.models.known_files import file_names
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.base import Exportable, Graph, build_module
from shardyard_trainer.tasks.heads import TextClassifier
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.tasks.model_evaluation import prepare_evaluation
from shardyard_trainer.training import formats
from shardyard_trainer.training.context import Context
from shardyard_trainer.training.export import export_model
from shardyard_trainer.training.gang import Gang

GANG = Gang(rank=0, world_size=1, device=torch.device("cpu"))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
WIDE = {**SIZES, "max_position_embeddings": 40}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": WIDE,
    "roberta": WIDE,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 40},
    "mpnet": WIDE,
    "deberta-v2": {**WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "albert": {**WIDE, "embedding_size": 16},
    "electra": {**WIDE, "embedding_size": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40},
    "llama": {**WIDE, "num_key_value_heads": 1},
}
TEXTS = ("text_classification", "token_classification", "question_answering", "reranking", "causal_lm", "masked_lm")
OTHERS = ("image_classification", "recommendation", "masked_item")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    write_measured(folder)
    rows = [{"text": row.split(",")[0], "text_pair": "the dog", "score": at % 5} for at, row in enumerate(
        (folder / "new.csv").read_text().splitlines()[1:])]  # fmt: skip
    (folder / "alike.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def spec_of(root: Path, name: str, *, formats: tuple[int, ...] = (1, 2, 3), **changes: Any) -> spec_pb2.JobSpec:
    given = {**TRAINED[name], **changes}
    spec = json_format.Parse(json.dumps(given).replace("ROOT", str(root)), spec_pb2.JobSpec())
    spec.export.formats.extend(formats)  # type: ignore[arg-type]
    return spec


def exported(
    root: Path, spec: spec_pb2.JobSpec, name: str
) -> tuple[dict[str, model_service_pb2.ModelExport], Recorder, Path]:
    """The receipts of a model that has made no step, by their formats; the events; the model's folder."""
    plan = ask(root, json_format.MessageToDict(spec, preserving_proto_field_name=True)
               | {"optimization": {"max_steps": 1}})  # fmt: skip
    assert not plan.violations, plan.violations
    spec = plan.plan.resolved_spec
    prepared = prepare(spec, where(root))
    module = build_module(prepared, spec)
    attempt = worker_pb2.AttemptSpec(epoch=1, spec=spec, locations=where(root))
    reporter = Recorder()
    context = Context(attempt=attempt, gang=GANG, reporter=reporter, trace=lambda name: None)
    add = functools.partial(formats.add_formats, context)
    folder = root / f"made-{name}"
    made = export_model(module, module.state_dict(), prepared, attempt, {}, folder=folder, add=add)
    return {word_of(each.format): each for each in made.model.exports}, reporter, folder


@pytest.mark.parametrize("name", [*TEXTS, *OTHERS])
def test_the_model_of_a_task_has_its_metrics_in_every_format(root: Path, name: str) -> None:
    found, reporter, folder = exported(root, spec_of(root, name), name)
    assert sorted(found) == sorted(words()) and "warning" not in reporter.kinds()
    for word, each in found.items():
        assert each.metrics.keys() == each.original_metrics.keys() and each.num_samples > 0
        assert each.metric in each.metrics and each.latency_s > 0 < each.original_latency_s
        files = {path.name for path in (folder / "exports" / word).iterdir()}
        assert {"README.md", "receipt.json", "config.json", "shardyard.json"} < files
        assert ("model.onnx" in files) is (word != "bf16")
    onnx_of = found["onnx"]
    assert onnx_of.difference < 1e-4
    for metric, value in onnx_of.metrics.items():
        assert value == pytest.approx(onnx_of.original_metrics[metric], rel=1e-4, abs=1e-4), metric
    assert 1e-4 < found["bf16"].difference < 0.2 and found["bf16"].size_ratio < 0.75
    # The formats are no part of what is read: pins and warm models of a running job stay as they are.
    without = signature(folder)
    assert not any("exports" in path for path, *_ in without)
    assert not any("exports" in path for path in file_names(open_folder(folder)))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_architecture_gives_the_same_outputs_at_every_length_and_batch_size(tmp_path: Path, model_type: str) -> None:
    import transformers

    torch.manual_seed(2)
    sizes = {"vocab_size": 60, **ARCHITECTURES[model_type]}
    config = transformers.AutoConfig.for_model(model_type, **sizes, num_labels=3)
    config.pad_token_id, config.use_cache = 1, False
    module = TextClassifier(
        transformers.AutoModel.from_config(config), torch.nn.Linear(32, 3), pooling="mean",
        problem=spec_pb2.TextClassification.PROBLEM_SINGLE_LABEL, dropout=0.0, label_smoothing=0.0,
    ).eval()  # fmt: skip
    names, graph = input_names(config), Graph({"logits": ("batch",)})

    def batch(number: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, 60, (number, length))
        mask = torch.ones_like(ids)
        for row in range(1, number):
            mask[row, max(1, length - row) :] = 0
        return completed({"input_ids": torch.where(mask > 0, ids, 1), "attention_mask": mask}, names)

    with torch.no_grad():
        write_onnx(tmp_path, module, graph, batch(2, 9))
        (small := tmp_path / "small").mkdir()
        write_quantised(small, tmp_path / NAME)
        run, quantised = OnnxNetwork(tmp_path, threads=1), OnnxNetwork(small, threads=1)
        for number, length in ((1, 1), (1, 2), (3, 7), (5, 31), (2, 9)):
            inputs = batch(number, length)
            wanted = module.network(inputs)["logits"]
            assert run(inputs)["logits"].numpy() == pytest.approx(wanted.numpy(), rel=1e-4, abs=1e-5)
            assert quantised(inputs)["logits"].isfinite().all()
            assert float((quantised(inputs)["logits"] - wanted).abs().max()) < 0.2 * max(1.0, float(wanted.abs().max()))
    # Layers that share their weights have them once.
    weights = sum(parameter.numel() * 4 for parameter in module.parameters())
    assert sum(len(each.raw_data) for each in onnx.load(tmp_path / NAME).graph.initializer) < 1.5 * weights


def test_weights_too_large_for_one_file_are_beside_it(tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(vocab_size=600, **WIDE)
    module = TextClassifier(
        transformers.BertModel(config), torch.nn.Linear(32, 2), pooling="cls",
        problem=spec_pb2.TextClassification.PROBLEM_SINGLE_LABEL, dropout=0.0, label_smoothing=0.0,
    ).eval()  # fmt: skip
    ids = torch.randint(5, 60, (2, 6))
    inputs = completed({"input_ids": ids}, input_names(config))
    for folder, most in ((tmp_path / "one", 10**9), (tmp_path / "two", 10_000)):
        folder.mkdir()
        write_onnx(folder, module, Graph({"logits": ("batch",)}), inputs, most_in_one_file=most)
        (quantised := folder / "int8").mkdir()
        write_quantised(quantised, folder / NAME, most_in_one_file=most)
    parts = [sorted(path.name for path in (tmp_path / each).iterdir() if path.is_file()) for each in ("one", "two")]
    assert parts == [[NAME], [NAME, DATA_NAME]]
    assert sorted(path.name for path in (tmp_path / "two" / "int8").iterdir()) == [NAME, DATA_NAME]
    assert (tmp_path / "two" / NAME).stat().st_size < (tmp_path / "one" / NAME).stat().st_size / 3
    for kind in (".", "int8"):
        one, two = (OnnxNetwork(tmp_path / each / kind, threads=1)(inputs)["logits"] for each in ("one", "two"))
        assert torch.equal(one, two)


def test_vectors_are_exported_pooled_and_of_length_one(root: Path) -> None:
    spec = json_format.ParseDict(
        {"fine_tuning": {"sentence_embedding": {"max_length": 12, "lowest_score": 0, "highest_score": 4}},
         "model": {"uri": str(root / "bert")}, "train_data": {"uri": str(root / "alike.jsonl")},
         "eval_data": {"uri": str(root / "alike.jsonl")}}, spec_pb2.JobSpec())  # fmt: skip
    spec.export.formats.append(spec_pb2.EXPORT_FORMAT_ONNX)
    found, _, folder = exported(root, spec, "vectors")
    assert found["onnx"].metric == "pearson" or found["onnx"].metric in found["onnx"].metrics
    session = onnxruntime.InferenceSession(folder / "exports" / "onnx" / NAME, providers=["CPUExecutionProvider"])
    ids = np.array([[2, 6, 7, 3], [2, 8, 3, 0]])
    inputs = {each.name: (ids > 0).astype("int64") for each in session.get_inputs()}
    inputs |= {"input_ids": ids, **({"token_type_ids": 0 * ids} if "token_type_ids" in inputs else {})}
    (vectors,) = session.run(["sentence_embedding"], inputs)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-5)


def test_adapters_are_merged_into_the_formats(root: Path) -> None:
    spec = spec_of(root, "text_classification", formats=(1,))
    spec.fine_tuning.lora.rank = 2
    spec.fine_tuning.lora.targets.append("query")
    found, reporter, _ = exported(root, spec, "lora")
    assert found["onnx"].difference < 1e-4 and "warning" not in reporter.kinds()


def test_a_refused_format_is_a_warning_with_the_numbers_and_is_not_in_the_model(root: Path) -> None:
    spec = spec_of(root, "causal_lm", formats=(3, 1))
    spec.export.metric, spec.export.max_drop = "perplexity", 1e-3
    found, reporter, folder = exported(root, spec, "refused")
    assert list(found) == ["onnx"] and [path.name for path in (folder / "exports").iterdir()] == ["onnx"]
    (warning,) = [event.warning for event in reporter.events if event.HasField("warning")]
    assert warning.reason == "EXPORT_REFUSED" and "bf16 has a perplexity of" in warning.message
    assert "0.001 is allowed" in warning.message


def test_a_job_writes_one_format_into_the_stored_model_and_replaces_it(root: Path) -> None:
    _, _, folder = exported(root, spec_of(root, "token_classification", formats=(1,)), "stored")
    spec = export_of(root, folder, "new.jsonl")
    result = plan_of(root, folder, spec)
    assert not result.violations, result.violations
    assert result.plan.output == plan_pb2.JOB_OUTPUT_FORMAT
    assert result.plan.resolved_spec.model_export.metric == "token_accuracy"
    before = (folder / "exports" / "onnx" / "receipt.json").read_text()
    attempt, reporter = run(root, folder, result.plan.resolved_spec)
    assert reporter.kinds()[-3:] == ["evaluation", "finished", "exported"]
    made = reporter.events[-1].exported
    assert made.path == attempt.export_dir and made.format.prefix == "exports/onnx/"
    assert {file.path for file in made.model.files} >= {"exports/onnx/model.onnx", "exports/onnx/receipt.json"}
    assert (folder / "exports" / "onnx" / "receipt.json").read_text() != before
    assert [path.name for path in (folder / "exports").iterdir()] == ["onnx"]


def test_a_job_over_its_bound_fails_and_leaves_what_was_there(root: Path) -> None:
    _, _, folder = exported(root, spec_of(root, "causal_lm", formats=()), "bounded")
    spec = export_of(root, folder, "new.txt")
    spec.model_export.format = spec_pb2.EXPORT_FORMAT_BF16
    spec.model_export.max_drop, spec.model_export.metric = 0.0, "perplexity"
    resolved = plan_of(root, folder, spec).plan.resolved_spec
    with pytest.raises(RunFailed, match="worse") as failed:
        run(root, folder, resolved)
    assert failed.value.cause == "EXPORT_REFUSED" and "perplexity" in failed.value.message
    assert not list((folder / "exports").iterdir())


def export_of(root: Path, folder: Path, data: str) -> spec_pb2.JobSpec:
    spec = spec_pb2.JobSpec()
    spec.model.model = "projects/p/models/m"
    spec.model_export.format = spec_pb2.EXPORT_FORMAT_ONNX
    spec.model_export.data.uri = str(root / data)
    return spec


def located(root: Path, folder: Path) -> worker_pb2.Locations:
    locations = where(root)
    locations.folders["projects/p/models/m"] = str(folder)
    return locations


def plan_of(root: Path, folder: Path, spec: spec_pb2.JobSpec) -> worker_pb2.PlanResult:
    from shardyard_trainer.planning.plan import plan

    shape = worker_pb2.NodeShape(memory_bytes=2**33, cpus=4)
    request = worker_pb2.PlanRequest(spec=spec, locations=located(root, folder), node_shape=shape)
    return worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))


def run(root: Path, folder: Path, spec: spec_pb2.JobSpec) -> tuple[worker_pb2.AttemptSpec, Recorder]:
    """The job on one rank, in the folder that its launch makes."""
    found = prepare_evaluation(spec, located(root, folder))
    (folder / "exports").mkdir(exist_ok=True)
    target = folder / "exports" / word_of(spec.model_export.format)
    attempt = worker_pb2.AttemptSpec(
        epoch=1, spec=spec, locations=located(root, folder), export_dir=str(target), plan=plan_pb2.JobPlan()
    )
    reporter = Recorder()
    formats.run(Context(attempt=attempt, gang=GANG, reporter=reporter, trace=lambda name: None), found)
    return attempt, reporter


REFUSED: list[tuple[str, dict[str, Any], list[tuple[str, str]], str]] = [
    ("translation", {}, [("export.formats", "OBJECTIVE_UNSUPPORTED")], "those of causal_lm, masked_lm"),
    ("instruction", {}, [("export.formats", "OBJECTIVE_UNSUPPORTED")], "instruction models are not written"),
    ("text_classification", {"export": {"metric": "bleu", "formats": [1]}}, [("export.metric", "SPEC_INVALID")], "f1"),
    ("recommendation", {"evaluation": {"holdout": 0}}, [("export", "SPEC_INVALID")], "no data to measure"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "where_to", "words_of"), REFUSED, ids=lambda value: str(value)[:24])
def test_what_cannot_be_exported_is_refused_at_planning(
    root: Path, name: str, changes: dict[str, Any], where_to: list[tuple[str, str]], words_of: str
) -> None:
    spec = spec_of(root, name, formats=() if "export" in changes else (1,), **changes)
    value = json_format.MessageToDict(spec, preserving_proto_field_name=True)
    result = ask(root, {**value, "optimization": {"max_steps": 1}})
    assert places(result) == [(f"spec.{field}", reason) for field, reason in where_to]
    assert all(words_of in each.message for each in result.violations)


def test_every_task_says_whether_its_models_can_be_exported() -> None:
    able = {name for name in table.NAMES if isinstance(table.named(name), Exportable)}
    assert able == {*TEXTS, *OTHERS, "sentence_embedding"}


def test_without_the_packages_the_plan_says_how_to_install_them(root: Path) -> None:
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "import importlib.util; found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'onnx' else found(name, *rest)\n"
        "from shardyard_trainer.exporting.support import refusals\n"
        "from shardyard_trainer.tasks import table; from transformers import BertConfig\n"
        "for number in (1, 3):\n"
        "    print([str(each) for each in refusals(table.named('masked_lm'), BertConfig(), [number], field='f')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    missing, nothing = done.stdout.strip().splitlines()[-2:]
    assert "needs onnx" in missing and 'pip install "shardyard[export]"' in missing and nothing == "[]"

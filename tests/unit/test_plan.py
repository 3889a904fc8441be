"""Plans: every default resolved, exact arithmetic, all violations at once, and the same again when planned again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.listings import folders_listed
from helpers.plan_requests import (
    CPU_NODE,
    GIB,
    GPU_NODE,
    ask,
    extraction,
    filled,
    fine_tuning,
    places,
    planned,
    pretraining,
    where,
)
from shardyard.v1 import plan_pb2, spec_pb2
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.tasks.ingredients import prepare


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return filled(tmp_path)


def test_every_default_of_a_fine_tuning_is_resolved(root: Path) -> None:
    result = ask(root, fine_tuning())
    assert not result.violations
    spec = result.plan.resolved_spec
    task = spec.fine_tuning.text_classification
    assert (task.max_length, task.pooling) == (32, spec_pb2.POOLING_MEAN)
    assert list(task.labels) == list(result.plan.labels) == ["bad", "good"]
    assert spec.optimization.learning_rate == 5e-5
    assert spec.optimization.precision == spec_pb2.PRECISION_FP32
    assert spec.optimization.warmup_ratio == 0.1
    assert spec.train_data.format == spec_pb2.DATA_FORMAT_CSV
    assert (spec.resources.workers, spec.resources.gpus_per_worker, spec.resources.cpus_per_worker) == (1, 0, 1)
    assert (spec.parallelism.zero_stage, spec.checkpoints.keep_last, spec.evaluation.holdout) == (0, 2, 0.1)
    assert (result.plan.num_train_samples, result.plan.num_eval_samples) == (54, 6)
    assert result.plan.total_steps == 14  # ⌈2 · 54 / 8⌉
    assert spec.evaluation.every == 7, "a pass over the data"
    assert [warning.reason for warning in result.plan.warnings] == ["NEW_HEAD"]
    assert json.loads(result.plan.deepspeed_config_json)["zero_optimization"] == {"stage": 0}


def test_a_pretraining_counts_its_parameters_without_making_them(root: Path) -> None:
    result = ask(root, pretraining())
    assert not result.violations
    vocabulary, width, layers, positions = 300, 32, 2, 32
    block = 12 * width * width + 13 * width
    assert result.plan.num_parameters <= vocabulary * width + positions * width + layers * block + 2 * width
    assert result.plan.resolved_spec.optimization.learning_rate == 1e-3
    assert result.plan.resolved_spec.train_data.document == spec_pb2.DOCUMENT_UNIT_LINE
    assert result.plan.num_train_tokens == result.plan.num_train_samples * 32
    assert result.plan.checkpoint_bytes == 12 * result.plan.num_parameters
    assert result.plan.memory.verdict == plan_pb2.MEMORY_VERDICT_FITS


ACCEPTED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("fine-tuning", fine_tuning(), CPU_NODE),
    ("three workers", fine_tuning(resources={"workers": 3}), CPU_NODE),
    ("pretraining", pretraining(), CPU_NODE),
    ("masked", pretraining(
        pretraining={"masked_lm": {"sequence_length": 16}}, tokenizer=None, model={"uri": "ROOT/bert"}
    ), CPU_NODE),
    ("on GPUs", pretraining(resources={"workers": 4}), GPU_NODE),
    ("extraction", extraction(), CPU_NODE),
    ("vectors of tokens", extraction(
        feature_extraction={"data": {"uri": "ROOT/corpus.txt"}, "output": "OUTPUT_LAST_HIDDEN_STATE", "max_length": 8}
    ), CPU_NODE),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "node"), [row[1:] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED])
def test_a_plans_spec_planned_again_is_the_same_plan(root: Path, spec: dict[str, Any], node: dict[str, Any]) -> None:
    first = ask(root, {key: value for key, value in spec.items() if value is not None}, node)
    assert not first.violations
    again = planned(root, first.plan.resolved_spec, node)
    assert again.SerializeToString(deterministic=True) == first.SerializeToString(deterministic=True)


def test_workers_that_do_not_divide_get_exact_shares(root: Path) -> None:
    batch = ask(root, fine_tuning(resources={"workers": 3})).plan.batch
    assert list(batch.samples_per_rank) == [2, 3, 3]
    assert batch.micro_batch_size == 3


def test_the_defaults_on_gpus_are_one_gpu_and_bf16_at_stage_1(root: Path) -> None:
    found = ask(root, pretraining(), GPU_NODE).plan
    assert found.resolved_spec.resources.gpus_per_worker == 1
    assert found.resolved_spec.optimization.precision == spec_pb2.PRECISION_BF16
    assert found.resolved_spec.parallelism.zero_stage == 1
    assert found.memory.available_bytes == 80 * GIB
    assert found.slots == 1


def test_what_the_samples_of_a_step_take_is_in_the_estimate(root: Path) -> None:
    small, large = (
        ask(root, fine_tuning(optimization={"max_steps": 1, "global_batch_size": size})).plan.memory
        for size in (8, 800_000)
    )
    assert large.batches_bytes == pytest.approx(100_000 * small.batches_bytes, rel=0.01)
    assert large.total_bytes - large.activations_bytes > large.batches_bytes > 800_000 * 60
    gpu = ask(root, fine_tuning(optimization={"max_steps": 1, "global_batch_size": 800_000}), GPU_NODE).plan.memory
    assert gpu.batches_bytes == large.batches_bytes
    assert gpu.total_bytes == sum(
        (gpu.parameters_bytes, gpu.gradients_bytes, gpu.optimizer_bytes, gpu.activations_bytes, gpu.process_bytes)
    )


UNSUPPORTED, INVALID = "PRECISION_UNSUPPORTED", "SPEC_INVALID"
BF16 = {"epochs": 1, "precision": "PRECISION_BF16"}
CSV = {"uri": "ROOT/reviews.csv"}
REFUSED: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("nothing", {}, [("optimization", INVALID), ("task", INVALID)]),
    ("micro batch",
     fine_tuning(resources={"workers": 3},
                 optimization={"max_steps": 1, "global_batch_size": 64, "micro_batch_size": 6}),
     [("optimization.micro_batch_size", "BATCH_NOT_DIVISIBLE")]),
    ("workers over batch", fine_tuning(resources={"workers": 9}), [("resources.workers", INVALID)]),
    ("fp16", fine_tuning(optimization={"epochs": 1, "precision": "PRECISION_FP16"}),
     [("optimization.precision", UNSUPPORTED)]),
    ("bf16 on CPU", fine_tuning(optimization=BF16), [("optimization.precision", UNSUPPORTED)]),
    ("bf16 at stage 0", fine_tuning(optimization=BF16, parallelism={"zero_stage": 0}),
     [("optimization.precision", UNSUPPORTED), ("parallelism.zero_stage", UNSUPPORTED)]),
    ("no duration", fine_tuning(optimization={}), [("optimization", INVALID)]),
    ("too many steps", fine_tuning(optimization={"epochs": 1e300}), [("optimization.epochs", INVALID)]),
    ("warm-up over the run", fine_tuning(optimization={"max_steps": 5, "warmup_steps": 6}),
     [("optimization.warmup_steps", INVALID)]),
    ("batch over memory", fine_tuning(optimization={"max_steps": 1, "global_batch_size": 2**31 - 1}),
     [("optimization.global_batch_size", "MODEL_DOES_NOT_FIT")]),
    ("minimum over peak", fine_tuning(optimization={"epochs": 1, "learning_rate": 0.1, "min_learning_rate": 0.2}),
     [("optimization.min_learning_rate", INVALID)]),
    ("minimum over the default", fine_tuning(optimization={"epochs": 1, "min_learning_rate": 0.2}),
     [("optimization.min_learning_rate", INVALID)]),
    ("too long", fine_tuning(fine_tuning={"text_classification": {"max_length": 10**6}}),
     [("fine_tuning.text_classification.max_length", INVALID)]),
    ("two columns", fine_tuning(train_data={**CSV, "columns": {"text": "txet", "label": "lable"}}),
     [("train_data.columns.text", "DATA_INVALID"), ("train_data.columns.label", "DATA_INVALID")]),
    ("both sources", fine_tuning(train_data={**CSV, "columns": {"text": "txet"}},
                                 eval_data={**CSV, "columns": {"label": "lable"}}),
     [("train_data.columns.text", "DATA_INVALID"), ("eval_data.columns.label", "DATA_INVALID")]),
    ("length and source", fine_tuning(fine_tuning={"text_classification": {"max_length": 10**6}},
                                      eval_data={**CSV, "columns": {"label": "lable"}}),
     [("fine_tuning.text_classification.max_length", INVALID), ("eval_data.columns.label", "DATA_INVALID")]),
    ("no time", fine_tuning(max_run_time="0s"), [("max_run_time", INVALID)]),
    ("400 years", fine_tuning(max_run_time="12623000000s"), [("max_run_time", INVALID)]),
    ("cores", fine_tuning(resources={"cpus_per_worker": 99}), [("resources.cpus_per_worker", "TOO_LARGE_FOR_CLUSTER")]),
    ("objective", pretraining(pretraining={"masked_lm": {}}), [("pretraining.masked_lm", "OBJECTIVE_UNSUPPORTED")]),
    ("model and data and batch",
     fine_tuning(model={"uri": "/etc/passwd"}, train_data={"uri": "ROOT/x.csv"},
                 optimization={"epochs": 1, "micro_batch_size": 5}),
     [("model.uri", "PATH_NOT_ALLOWED"), ("train_data.uri", "PATH_NOT_ALLOWED"),
      ("optimization.micro_batch_size", "BATCH_NOT_DIVISIBLE")]),
    *[
        (f"sees ahead: {kind}", pretraining(model={"architecture": {"model_type": kind}}),
         [("pretraining.causal_lm", "OBJECTIVE_UNSUPPORTED")])
        for kind in ("bert-generation", "xlnet")
    ],
    *[
        (f"refused by name: {kind}", pretraining(model={"architecture": {"model_type": kind}}),
         [("model.architecture", "OBJECTIVE_UNSUPPORTED")])
        for kind in ("fnet", "reformer", "yoso", "cpmant", "git", "blt")
    ],
    *[
        (f"no text model: {kind}", fine_tuning(model={"architecture": {"model_type": kind}},
                                               tokenizer={"train": {"vocab_size": 300}}),
         [("fine_tuning.text_classification", "OBJECTIVE_UNSUPPORTED")])
        for kind in ("t5", "vit", "clip", "gemma3", "wav2vec2")
    ],
    ("unigram", pretraining(tokenizer={"train": {"algorithm": "ALGORITHM_UNIGRAM", "vocab_size": 64}},
                            train_data={"uri": "ROOT/signs.txt"}), [("tokenizer.train.vocab_size", INVALID)]),
    ("half a surrogate", fine_tuning(train_data={"uri": "ROOT/half.jsonl"}), [("train_data", "DATA_INVALID")]),
    ("settings",
     pretraining(model={"architecture": {"model_type": "llama", "overrides": {
         "return_dict": False, "attention_dropout": 2, "rms_norm_eps": -1, "num_attention_heads": 0}}}),
     [(f"model.architecture.overrides.{name}", INVALID)
      for name in ("attention_dropout", "num_attention_heads", "return_dict", "rms_norm_eps")]),
    ("extraction from nothing", extraction(model={"architecture": {"model_type": "bert"}}, train_data=CSV),
     [("train_data", INVALID), ("model.architecture", INVALID)]),
    ("extraction too long", extraction(feature_extraction={"data": CSV, "max_length": 99}),
     [("feature_extraction.max_length", INVALID)]),
    ("settings that an extraction does not follow", extraction(optimization={"micro_batch_size": 8, "seed": 3}),
     [("optimization.micro_batch_size", INVALID), ("optimization.seed", INVALID)]),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "expected"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_wrong_comes_back_all_at_once(
    root: Path, spec: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    (root / "signs.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 500))))
    (root / "half.jsonl").write_text('{"text": "a", "label": "good"}\n{"text": "b", "label": "\\ud800"}\n')
    result = ask(root, spec)
    assert places(result) == [(f"spec.{field}", reason) for field, reason in expected]
    assert not result.HasField("plan")


def test_the_batch_message_names_the_nearest_that_works(root: Path) -> None:
    optimization = {"max_steps": 1, "global_batch_size": 64, "micro_batch_size": 6}
    result = ask(root, fine_tuning(optimization=optimization, resources={"workers": 3}))
    assert result.violations[0].message == (
        "micro_batch 6 x accumulation 4 x workers 3 = 72, but global_batch_size is 64; "
        "try micro_batch 8, accumulation 2, workers 4"
    )


def test_a_label_out_of_place_is_named_with_file_and_line(root: Path) -> None:
    (root / "reviews.csv").write_text("text,label\na dog,good\na cat,bad\na film,meh\n")
    result = ask(root, fine_tuning(fine_tuning={"text_classification": {"labels": ["good", "bad"]}}))
    (found,) = result.violations
    assert (found.reason, found.metadata["file"], found.metadata["line"]) == ("DATA_INVALID", "reviews.csv", "4")
    assert "meh" in found.message


def test_weights_that_are_not_finite_are_refused_at_submission(root: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = root / "bert" / "model.safetensors"
    tensors = load_file(path)
    tensors["embeddings.LayerNorm.bias"][0] = float("nan")
    save_file(tensors, path)
    assert places(ask(root, fine_tuning())) == [("spec.model.uri", "MODEL_INVALID")]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"optimization": {"epochs": 1, "learning_rate": 0.0}}, "LEARNING_RATE_ZERO"),
        ({"optimization": {"epochs": 1, "learning_rate": 5.0}}, "LEARNING_RATE_HIGH"),
        ({"optimization": {"max_steps": 5, "warmup_steps": 5}}, "WARMUP_TOO_LONG"),
        ({"optimization": {"epochs": 1, "global_batch_size": 99}}, "BATCH_OVER_DATA"),
        ({"eval_data": {"uri": "ROOT/reviews.csv"}}, "SAME_DATA"),
        ({"train_data": {"uri": "ROOT/split"}}, "TEST_DATA_TRAINED_ON"),
        ({"train_data": {"uri": "ROOT/scores.csv"}}, "MANY_LABELS"),
        ({"train_data": {"uri": "ROOT/split"}, "eval_data": {"uri": "ROOT/split/sst-test.csv"}}, "SAME_DATA"),
        ({"parallelism": {"compile": True}}, "COMPILE_ON_CPU"),
        ({"train_data": {"uri": "ROOT/blank.csv"}}, "BLANK_TEXTS"),
    ],
)
def test_what_is_allowed_but_odd_is_warned_of(root: Path, changes: dict[str, Any], reason: str) -> None:
    (root / "scores.csv").write_text("text,label\n" + "".join(f"the dog,{at / 10}\n" for at in range(30)))
    (root / "blank.csv").write_text("text,label\n" + "the dog,good\nthe cat,bad\n   ,bad\n" * 10)
    (root / "split").mkdir()
    for name in ("sst-test.csv", "latest.csv"):
        shutil.copy(root / "reviews.csv", root / "split" / name)
    result = ask(root, fine_tuning(**changes))
    assert not result.violations
    assert reason in [warning.reason for warning in result.plan.warnings]


def test_files_that_are_all_for_tests_are_meant(root: Path) -> None:
    (root / "test").mkdir()
    shutil.copy(root / "reviews.csv", root / "test" / "reviews.csv")
    told = [warning.reason for warning in ask(root, fine_tuning(train_data={"uri": "ROOT/test"})).plan.warnings]
    assert "TEST_DATA_TRAINED_ON" not in told


def test_the_lot_leaves_each_class_a_text_to_train_on(root: Path) -> None:
    (root / "reviews.csv").write_text("text,label\n" + "the dog,common\n" * 8 + "the cat,rare\n")
    evaluation = {"holdout": 0.5}
    for seed in range(6):
        optimization = {"epochs": 1, "global_batch_size": 4, "seed": seed}
        result = ask(root, fine_tuning(optimization=optimization, evaluation=evaluation))
        train = prepare(result.plan.resolved_spec, where(root)).train
        labels = train.micro_batch([SampleRef(0, index) for index in range(train.num_samples)]).inputs["labels"]
        assert set(labels.tolist()) == {0, 1}
        was_told = "RARE_LABELS" in [warning.reason for warning in result.plan.warnings]
        assert was_told == (train.num_samples == 6)


def test_one_label_of_several_is_enough_and_its_plan_can_be_planned_again(root: Path) -> None:
    (root / "a.jsonl").write_text('{"text": "the dog", "label": ["cute"]}\n{"text": "the cat"}\n')
    spec = fine_tuning(
        fine_tuning={"text_classification": {"problem": "PROBLEM_MULTI_LABEL"}},
        train_data={"uri": "ROOT/a.jsonl"},
        evaluation={"holdout": 0},
    )
    first = ask(root, spec).plan
    assert list(first.labels) == ["cute"]
    assert planned(root, first.resolved_spec).plan == first


def test_states_larger_than_memory_do_not_fit_and_activations_only_warn(root: Path) -> None:
    small = ask(root, pretraining(), {"memory_bytes": 100_000, "cpus": 1})
    assert small.plan.memory.verdict == plan_pb2.MEMORY_VERDICT_NO_FIT
    refusal = small.plan.warnings[0]
    assert (refusal.reason, refusal.field) == ("MODEL_DOES_NOT_FIT", "spec.model")
    assert not small.plan.alternatives and "or a smaller model" in refusal.message
    tight = ask(root, pretraining(), {"memory_bytes": 300 * 10**6, "cpus": 1})
    assert tight.plan.memory.verdict == plan_pb2.MEMORY_VERDICT_TIGHT
    assert "MEMORY_TIGHT" in [warning.reason for warning in tight.plan.warnings]


def test_many_layers_do_not_fit(root: Path) -> None:
    model = {"architecture": {"model_type": "gpt2", "overrides": {"n_layer": 1000000}}}
    assert [violation.reason for violation in ask(root, pretraining(model=model)).violations] == ["MODEL_DOES_NOT_FIT"]


def test_nothing_outside_of_the_data_roots_is_even_listed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    with folders_listed() as listed:
        result = ask(root, fine_tuning(model={"uri": str(outside)}, train_data={"uri": str(outside)}))
        nameless = ask(root, fine_tuning(model={"model": "projects/default/models/none"}))
    assert {reason for _, reason in places(result)} == {"PATH_NOT_ALLOWED"}
    assert ("spec.model.model", "MODEL_NOT_FOUND") in places(nameless)
    assert str(outside) not in listed and str(Path.cwd()) not in listed

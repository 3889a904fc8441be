"""How long a job would take: what the guess depends on, and that it is near what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.plan_requests import GPU_NODE, ask, filled, fine_tuning, pretraining
from helpers.small_pictures import write_folders

# What `bench/trainer.py` measured, at two threads: tokens (or pictures) a second.
GPT2 = {"n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 16_384}
VIT = {
    "image_size": 96, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 768,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = filled(tmp_path_factory.mktemp("time"))
    (folder / "large.txt").write_text("the dog is cute and the cat sleeps\n" * 2000)
    write_folders(folder / "flowers", 10)
    return folder


def seconds(root: Path, spec: dict[str, Any], node: dict[str, Any] | None = None) -> float:
    result = ask(root, spec, node)
    assert not result.violations, result.violations
    time = result.plan.time
    low, expected, high = (each.ToMilliseconds() / 1000 for each in (time.low, time.expected, time.high))
    assert low < expected < high
    slots, workers = result.plan.slots, result.plan.batch.workers
    assert time.slot_hours == pytest.approx(expected * slots / 3600, rel=1e-3)
    assert time.worker_hours == pytest.approx(expected * workers / 3600, rel=1e-3)
    assert not time.HasField("cost"), "only the coordinator knows the price"
    return expected


def steps_s(root: Path, spec: dict[str, Any], node: dict[str, Any] | None = None) -> float:
    """Seconds of 10,000 steps, without start and end."""
    optimization = spec.get("optimization", {})
    many, few = ({**spec, "optimization": {**optimization, "max_steps": number}} for number in (20_000, 10_000))
    return seconds(root, many, node) - seconds(root, few, node)


def large(**changes: Any) -> dict[str, Any]:
    model = {"architecture": {"model_type": "gpt2", "overrides": GPT2}}
    spec: dict[str, Any] = pretraining(model=model, train_data={"uri": "ROOT/large.txt"})
    return {
        **spec,
        "pretraining": {"causal_lm": {"sequence_length": 256}},
        "optimization": {"global_batch_size": 8},
        "evaluation": {"holdout": 0},
        **changes,
    }


@pytest.mark.parametrize(("threads", "measured"), [(2, 2_819.0)])
def test_a_gpt2_takes_about_as_long_as_it_was_measured(root: Path, threads: int, measured: float) -> None:
    planned = steps_s(root, large(resources={"cpus_per_worker": threads}))
    assert 10_000 * 8 * 256 / planned == pytest.approx(measured, rel=0.5)


def test_pictures_take_about_as_long_as_they_were_measured(root: Path) -> None:
    spec = fine_tuning(
        fine_tuning={"image_classification": {"image_size": 96}},
        model={"architecture": {"model_type": "vit", "overrides": VIT}},
        train_data={"uri": "ROOT/flowers"},
        optimization={"global_batch_size": 32},
        resources={"cpus_per_worker": 2},
        evaluation={"holdout": 0},
    )
    assert 10_000 * 32 / steps_s(root, spec) == pytest.approx(212.0, rel=0.5)


def test_what_takes_longer_is_planned_longer(root: Path) -> None:
    alone = steps_s(root, large())
    assert steps_s(root, large(resources={"cpus_per_worker": 2})) == pytest.approx(alone / 2, rel=0.01)
    assert alone / 2 < steps_s(root, large(resources={"workers": 2})) < alone
    again = steps_s(root, large(parallelism={"activation_checkpointing": True}))
    assert again == pytest.approx(alone * 4 / 3, rel=0.01)
    staged = steps_s(root, large(parallelism={"zero_stage": 3}, resources={"workers": 2}))
    assert staged > steps_s(root, large(parallelism={"zero_stage": 1}, resources={"workers": 2}))


def test_frozen_and_adapted_models_compute_less_backwards(root: Path) -> None:
    model = {"architecture": {"model_type": "gpt2", "overrides": {**GPT2, "vocab_size": 300}}}
    spec = fine_tuning(model=model, tokenizer={"train": {"vocab_size": 300}}, evaluation={"holdout": 0})
    spec["optimization"] = {"global_batch_size": 8}
    whole = steps_s(root, spec)
    adapted = steps_s(root, {**spec, "fine_tuning": {"text_classification": {}, "lora": {"rank": 4}}})
    frozen = steps_s(root, {**spec, "fine_tuning": {"text_classification": {}, "freeze": {"backbone": True}}})
    assert adapted == pytest.approx(whole * 2 / 3, rel=0.05)
    assert frozen == pytest.approx(whole / 3, rel=0.05)


def test_gpus_are_faster_and_those_that_are_not_known_less_sure(root: Path) -> None:
    on_cpu = steps_s(root, large())
    known = {**GPU_NODE, "gpu_name": "NVIDIA H100 80GB HBM3"}
    assert steps_s(root, large(), known) < on_cpu / 100
    plan = ask(root, large(optimization={"max_steps": 10}), {**GPU_NODE, "gpu_name": "Voodoo 2"}).plan
    assert plan.time.high.ToMilliseconds() == pytest.approx(5 * plan.time.expected.ToMilliseconds(), rel=0.01)

"""What would fit: settings that a plan proposes, each of which fits when it is planned itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.plan_requests import GPU_NODE, ask, filled, fine_tuning, pretraining
from shardyard.v1 import plan_pb2

GIB = 2**30
FITS = plan_pb2.MEMORY_VERDICT_FITS
WIDE = {"architecture": {"model_type": "gpt2", "overrides": {"n_layer": 11, "n_embd": 768, "n_head": 12}}}
DEEP = {"architecture": {"model_type": "gpt2", "overrides": {"n_layer": 24, "n_embd": 768, "n_head": 12}}}
TOKENIZER = {"train": {"vocab_size": 300}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("alternatives"))


def with_settings(spec: dict[str, Any], settings: dict[str, str]) -> dict[str, Any]:
    """The spec with the settings in their places."""
    for path, value in settings.items():
        fields = spec
        *parents, name = path.removeprefix("spec.").split(".")
        for parent in parents:
            fields[parent] = dict(fields.get(parent, {}))
            fields = fields[parent]
        written: Any = {"true": True, "bf16": "PRECISION_BF16"}.get(value, value)
        fields[name] = int(written) if isinstance(written, str) and written.isdigit() else written
    return spec


# A spec, the node, its verdict, and settings that are among those proposed.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, dict[str, str]]] = {
    "adapters": (
        fine_tuning(model=DEEP, tokenizer=TOKENIZER),
        {"memory_bytes": 2_600_000_000, "cpus": 1},
        plan_pb2.MEMORY_VERDICT_NO_FIT,
        {"spec.fine_tuning.lora.rank": "8"},
    ),
    "the optimizer on the node": (
        pretraining(model=WIDE, optimization={"max_steps": 4, "precision": "PRECISION_FP32"}),
        {**GPU_NODE, "gpus": 1, "gpu_memory_bytes": 2 * GIB},
        plan_pb2.MEMORY_VERDICT_TIGHT,
        {"spec.optimization.precision": "bf16"},
    ),
    "a stage that was not taken": (
        pretraining(
            model=WIDE,
            parallelism={"zero_stage": 1},
            resources={"workers": 4},
            optimization={"max_steps": 4, "global_batch_size": 32, "micro_batch_size": 8},
        ),
        {**GPU_NODE, "gpus": 4, "gpu_memory_bytes": 1_500_000_000},
        plan_pb2.MEMORY_VERDICT_TIGHT,
        # Not stage 3, which gathers all of a model of this size.
        {"spec.parallelism.zero_stage": "2"},
    ),
    "smaller micro batches": (
        pretraining(optimization={"max_steps": 4, "global_batch_size": 512, "micro_batch_size": 512}),
        {"memory_bytes": 8 * 10**8, "cpus": 1},
        plan_pb2.MEMORY_VERDICT_TIGHT,
        {"spec.optimization.micro_batch_size": "1"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_alternative_fits_when_it_is_planned_itself(root: Path, case: str) -> None:
    spec, node, verdict, wanted = CASES[case]
    plan = ask(root, spec, node).plan
    assert plan.memory.verdict == verdict
    found = [dict(each.settings) for each in plan.alternatives]
    assert wanted in found and 1 <= len(found) <= 4
    for alternative in plan.alternatives:
        again = ask(root, with_settings(dict(spec), dict(alternative.settings)), node)
        assert not again.violations, again.violations
        assert again.plan.memory.verdict == FITS == alternative.memory.verdict, alternative
        assert again.plan.memory.total_bytes == pytest.approx(alternative.memory.total_bytes, rel=0.05)


def test_the_refusal_of_a_job_names_what_would_fit(root: Path) -> None:
    spec, node, _, _ = CASES["adapters"]
    (warning, *_) = ask(root, spec, node).plan.warnings
    assert (warning.reason, warning.field) == ("MODEL_DOES_NOT_FIT", "spec.model")
    assert "these would fit: spec.fine_tuning.lora.rank=8" in warning.message


def test_a_job_that_fits_needs_no_alternative(root: Path) -> None:
    plan = ask(root, fine_tuning()).plan
    assert plan.memory.verdict == FITS and not plan.alternatives

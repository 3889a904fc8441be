"""What a plan costs: files that are wrong are refused before the long work, and what was read is not read again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.folder_doors import planned
from helpers.small_specs import causal_spec, classification_spec, locations, masked_spec
from helpers.tiny_folders import save_folder
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.planning.statistics import data_stats
from shardyard_trainer.tasks.ingredients import prepare


def seconds(root: Path, spec: spec_pb2.JobSpec) -> tuple[float, worker_pb2.PlanResult]:
    """What the plan computes for, whatever else the machine does."""
    begin_s = time.process_time()
    result = planned(root, spec)
    return time.process_time() - begin_s, result


def fine_tuned(root: Path, data: Path) -> spec_pb2.JobSpec:
    return classification_spec(data, {"uri": str(root / "bert")})


def pretrained(root: Path, data: Path) -> spec_pb2.JobSpec:
    return masked_spec(data, model={"uri": str(root / "bert")}, tokenizer={})


def made_afresh(_root: Path, data: Path) -> spec_pb2.JobSpec:
    return causal_spec(data)


@pytest.mark.parametrize("make", [fine_tuned, pretrained, made_afresh], ids=lambda make: make.__name__)
def test_an_unclosed_quote_at_a_files_end_is_refused_before_anything_is_tokenised(
    tmp_path: Path, make: Callable[[Path, Path], spec_pb2.JobSpec]
) -> None:
    save_folder(tmp_path / "bert", "BertModel")
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    rows = [f'"the cat {index} is cute, and so is the dog that sleeps",{index % 2}' for index in range(20_000)]
    good.write_text("\n".join(["text,label", *rows]) + "\n")
    bad.write_text("\n".join(["text,label", *rows, '"the last one']) + "\n")
    planned(tmp_path, make(tmp_path, _few(tmp_path)))  # Imports are not measured.
    read_s, refused = seconds(tmp_path, make(tmp_path, bad))
    tokenised_s, accepted = seconds(tmp_path, make(tmp_path, good))
    assert not accepted.violations
    assert "line 20002: a quote that opens here is never closed" in refused.violations[0].message
    assert read_s < 0.5 * tokenised_s


def seeded(spec: spec_pb2.JobSpec, seed: int) -> spec_pb2.JobSpec:
    found = spec_pb2.JobSpec()
    found.CopyFrom(spec)
    found.optimization.seed = seed
    return found


def test_another_seed_reads_nothing_again_but_for_its_own_split(tmp_path: Path) -> None:
    save_folder(tmp_path / "bert", "BertModel")
    few = _few(tmp_path)
    held_out = classification_spec(few, {"uri": str(tmp_path / "bert")}, evalData={"uri": str(few)})
    for spec in (pretrained(tmp_path, few), made_afresh(tmp_path, few), held_out):
        first_s, first = seconds(tmp_path, seeded(spec, 1))
        again_s, again = min((seconds(tmp_path, seeded(spec, seed)) for seed in (2, 3, 4)), key=lambda each: each[0])
        assert not first.violations and not again.violations
        assert again_s < 0.3 * first_s
        assert again.plan.train_stats == first.plan.train_stats
    split = fine_tuned(tmp_path, few)
    for seed in (0, 1, 2):
        found = planned(tmp_path, seeded(split, seed)).plan
        assert found.resolved_spec.optimization.seed == seed
        task = prepare(seeded(split, seed), locations(tmp_path))
        assert task.eval is not None and found.eval_stats == data_stats(task, task.eval)


def _few(root: Path) -> Path:
    path = root / "few.csv"
    path.write_text("text,label\n" + "".join(f"the cat {index} is cute,{index % 2}\n" for index in range(200)))
    return path

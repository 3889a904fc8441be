"""Plans as they are asked for: a folder with data and models, and specs of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from helpers.tiny_folders import WORDS, save_folder
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.planning.plan import plan

GIB = 2**30
CPU_NODE = {"memory_bytes": 8 * GIB, "cpus": 4}
GPU_NODE = {"memory_bytes": 64 * GIB, "cpus": 32, "gpus": 8, "gpu_memory_bytes": 80 * GIB, "bf16": True}


def filled(folder: Path) -> Path:
    """A folder with data and models, all of it allowed."""
    rows = [f"the {WORDS[index % 11]} is {WORDS[index % 7]},{'good' if index % 2 else 'bad'}" for index in range(60)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (folder / "corpus.txt").write_text("\n".join("the dog is cute and the cat sleeps" for _ in range(200)) + "\n")
    save_folder(folder / "bert", "BertModel")
    save_folder(folder / "gpt2", "GPT2LMHeadModel")
    return folder


def ask(root: Path, spec: dict[str, Any], node: dict[str, Any] | None = None) -> worker_pb2.PlanResult:
    text = json.dumps(spec).replace("ROOT", str(root))
    return planned(root, json_format.Parse(text, spec_pb2.JobSpec()), node)


def planned(root: Path, spec: spec_pb2.JobSpec, node: dict[str, Any] | None = None) -> worker_pb2.PlanResult:
    request = worker_pb2.PlanRequest(
        spec=spec,
        locations=where(root),
        node_shape=worker_pb2.NodeShape(**(CPU_NODE if node is None else node)),
    )
    return worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))


def where(root: Path) -> worker_pb2.Locations:
    return worker_pb2.Locations(data_roots=[str(root)], cache_dir=str(cache_of(root)))


def cache_of(root: Path) -> Path:
    return root.parent / f"{root.name}-cache"


def places(result: worker_pb2.PlanResult) -> list[tuple[str, str]]:
    return [(violation.field, violation.reason) for violation in result.violations]


def fine_tuning(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "fine_tuning": {"text_classification": {}},
        "model": {"uri": "ROOT/bert"},
        "train_data": {"uri": "ROOT/reviews.csv"},
        "optimization": {"epochs": 2, "global_batch_size": 8},
    }
    return {**spec, **changes}


def pretraining(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "pretraining": {"causal_lm": {"sequence_length": 32}},
        "model": {"architecture": {"model_type": "gpt2", "overrides": {"n_layer": 2, "n_embd": 32, "n_head": 2}}},
        "tokenizer": {"train": {"vocab_size": 300}},
        "train_data": {"uri": "ROOT/corpus.txt"},
        "optimization": {"max_steps": 40},
    }
    return {**spec, **changes}


def extraction(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "feature_extraction": {"data": {"uri": "ROOT/reviews.csv", "columns": {"text": "text"}}},
        "model": {"uri": "ROOT/bert"},
    }
    return {**spec, **changes}

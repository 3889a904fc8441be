"""A model's folder at each of its doors: asked as an upload, a plan or a prediction; and ways to spoil it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.small_specs import causal_spec, classification_spec, locations, masked_spec, write_corpus, write_labelled
from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.planning.plan import plan

Change = Callable[[Path], None]


def planned(root: Path, spec: spec_pb2.JobSpec) -> worker_pb2.PlanResult:
    node = worker_pb2.NodeShape(memory_bytes=2**33, cpus=4)
    request = worker_pb2.PlanRequest(spec=spec, locations=locations(root), node_shape=node)
    return worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))


def inspected(folder: Path) -> worker_pb2.InspectModelResult:
    request = worker_pb2.InspectModelRequest(folder=str(folder))
    return worker_pb2.InspectModelResult.FromString(inspect_model(request.SerializeToString()))


def asked(folder: Path, text: str) -> worker_pb2.PredictReply:
    request = model_service_pb2.PredictRequest(model="m", instances=[model_service_pb2.Instance(text=text)])
    call = worker_pb2.PredictCall(folder=str(folder), request=request)
    return worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))


def spec_for(task: str, root: Path, folder: Path) -> spec_pb2.JobSpec:
    source = {"uri": str(folder)}
    if task == "text_classification":
        return classification_spec(write_labelled(root / "labelled.csv"), source)
    make = causal_spec if task == "causal_lm" else masked_spec
    return make(write_corpus(root), model=source, tokenizer={})


def set_config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def set_tensors(**changes: Any) -> Change:
    """Adds tensors (a shape), or takes them away (None); `__` in a name is a dot."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for name, shape in changes.items():
            if shape is None:
                del tensors[name.replace("__", ".")]
            else:
                tensors[name.replace("__", ".")] = torch.full(shape, 0.01)
        save_file(tensors, path, {"format": "pt"})

    return change

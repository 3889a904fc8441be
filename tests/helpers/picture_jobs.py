"""Jobs on small pictures: their specs, and what the planner says of them; files of pictures written from memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from google.protobuf import json_format
from PIL import Image

from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.planning.plan import plan
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.training.export import export_model

TINY = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}


def planned(folder: Path, source: dict[str, Any], **task: Any) -> worker_pb2.PlanResult:
    spec, locations = spec_of(folder, source, **task)
    call = worker_pb2.PlanRequest(spec=spec, locations=locations)
    return worker_pb2.PlanResult.FromString(plan(call.SerializeToString()))


def spec_of(folder: Path, source: dict[str, Any], **task: Any) -> tuple[spec_pb2.JobSpec, worker_pb2.Locations]:
    more = task.pop("more", {})
    spec = {
        "fine_tuning": {"image_classification": {"image_size": 24, **task}},
        "model": {"architecture": {"model_type": "resnet", "overrides": TINY}},
        "train_data": {"uri": str(folder), **source},
        "optimization": {"epochs": 1},
        **more,
    }
    cache = folder.parent / "cache"
    locations = worker_pb2.Locations(cache_dir=str(cache), data_roots=[str(folder.parent)])
    return json_format.ParseDict(spec, spec_pb2.JobSpec()), locations


def accepted(folder: Path, source: dict[str, Any] | None = None, **task: Any) -> plan_pb2.JobPlan:
    result = planned(folder, source or {}, **task)
    assert not result.violations, result.violations
    return result.plan


def content(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exported(
    folder: Path, spec: spec_pb2.JobSpec, locations: worker_pb2.Locations, *, rate: float = 0.1, metric: str = "loss"
) -> Path:
    """One step of training, and the folder of it; the export compares what it loads with the live model."""
    task = prepare(spec, locations)
    module = build_module(task, spec).train()
    module(**task.train.micro_batch([SampleRef(0, at) for at in range(4)]).inputs).loss_sum.backward()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=rate)
    attempt = worker_pb2.AttemptSpec(
        job_name="projects/p/jobs/j", epoch=1, spec=spec, world_size=1, locations=locations
    )
    state = {key: value.detach().clone() for key, value in module.state_dict().items()}
    export_model(module, state, task, attempt, {metric: 0.5}, folder=folder)
    return folder

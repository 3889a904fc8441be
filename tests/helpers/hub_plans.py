"""Plans of jobs that begin from repositories of PyTorch Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.small_pictures import write_folders
from helpers.small_specs import parse
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.planning.plan import plan

SMALL = {"width": 4, "num_classes": 10}


def write_data(folder: Path) -> Path:
    """Pictures of three classes, and texts of two."""
    write_folders(folder / "garden", 4)
    rows = [f"the dog is {'good' if index % 2 else 'bad'},{'yes' if index % 2 else 'no'}" for index in range(24)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return folder


def job(
    data: Path,
    source: dict[str, Any],
    *,
    task: str = "image_classification",
    file: str = "garden",
    side: int = 32,
    **adapted: Any,
) -> Any:
    """A fine-tuning job; `side` of 0 leaves it out, `adapted` are fields beside the task such as `lora`."""
    settings = {"image_size": side} if task == "image_classification" and side else {}
    return parse(
        {
            "fine_tuning": {task: settings, **adapted},
            "model": {"torch_hub": source},
            "train_data": {"uri": str(data / file)},
            "optimization": {"epochs": 1},
        }
    )


def places(data: Path, folder: Path, *repositories: Path, **named: Path) -> worker_pb2.Locations:
    """The repositories of a list may run; `named` are those of a name."""
    return worker_pb2.Locations(
        data_roots=[str(data), str(folder)],
        cache_dir=str(folder / "cache"),
        torch_hub={str(each): str(each) for each in repositories} | {name: str(each) for name, each in named.items()},
    )


def planned(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> worker_pb2.PlanResult:
    """The answer of the planner."""
    request = worker_pb2.PlanRequest(spec=spec, locations=locations)
    return worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))


def refused(data: Path, folder: Path, source: dict[str, Any], *repositories: Path) -> Any:
    """The only violation of a job with this source."""
    result = planned(job(data, source), places(data, folder, *repositories))
    assert len(result.violations) == 1, result
    return result.violations[0]

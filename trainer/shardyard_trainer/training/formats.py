"""Further formats of a model: at the end of its training, or for one that the service stores already; on rank 0."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import cast

import torch

from shardyard.export_formats import prefix_of, word_of
from shardyard.v1 import model_service_pb2, spec_pb2, transfer_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.claim import missing_storage
from shardyard_trainer.exporting.formats import Bound, FormatRefused, Original
from shardyard_trainer.exporting.measuring import Measured
from shardyard_trainer.failures import RunFailed, storage_failure
from shardyard_trainer.models.door import Folder, open_folder
from shardyard_trainer.tasks import model_evaluation
from shardyard_trainer.tasks.base import Exportable, Prepared, build_module
from shardyard_trainer.tasks.module import HuggingFaceModule
from shardyard_trainer.training.config import resolved_spec
from shardyard_trainer.training.context import Context
from shardyard_trainer.training.engine import COLLECTIVE_TIMEOUT
from shardyard_trainer.training.export import Trained
from shardyard_trainer.training.results import put_in_place, stored_files, sync

REASON = "EXPORT_REFUSED"

_OTHERS_WAIT_S = COLLECTIVE_TIMEOUT.total_seconds() / 2
"""How long the other ranks of a training may wait for the formats: half of what would end them."""


def add_formats(context: Context, folder: Path, trained: Trained) -> list[model_service_pb2.ModelExport]:
    """Writes the formats of the spec into `folder`, which has the trained model; a refused one is a warning."""
    policy = resolved_spec(trained.attempt).export
    if not policy.formats:
        return []
    task = trained.task
    assert task.eval is not None
    deadline_s = time.monotonic() + _OTHERS_WAIT_S if context.gang.world_size > 1 else None
    made = []
    original = _original(task, _plain_module(trained), open_folder(folder), deadline_s)
    for number in policy.formats:
        context.phase("exporting", word_of(number))
        target = folder / prefix_of(number)
        target.mkdir(parents=True)
        try:
            made.append(original.write(number, target, _bound(policy)))
        except FormatRefused as refused:
            shutil.rmtree(target)
            text = f"the model was exported without {word_of(number)}: {refused}"
            context.warn(REASON, text, "spec.export")
    return made


def run(context: Context, found: model_evaluation.Measured) -> None:
    """Writes the format of a `model_export` job into the stored model. Raises RunFailed EXPORT_REFUSED, STORAGE_."""
    attempt = context.attempt
    wanted = resolved_spec(attempt).model_export
    target = Path(attempt.export_dir)
    building = target.with_name(f".{target.name}.e{attempt.epoch:06}")
    context.canary_passed(0.0)
    try:
        export = _write(context, found, wanted, building)
        if context.directive:
            context.stopped()
            return
        sync(building)
        put_in_place(building, target)
    except OSError as error:
        failed = missing_storage(attempt.locations) or storage_failure(error, "the format")
        raise failed or error from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    context.evaluated(1, export.metrics, num_samples=export.num_samples, is_final=True, is_partial=False)
    context.finished(1)
    context.exported(worker_pb2.Exported(path=str(target), model=_files(target, export.prefix), format=export))


def _write(
    context: Context, found: model_evaluation.Measured, wanted: spec_pb2.FormatExport, building: Path
) -> model_service_pb2.ModelExport:
    # The folder itself was made for this rank, which may not write to the one above it.
    for left in building.glob("*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    building.mkdir(exist_ok=True)
    task = found.task
    assert task.choice.folder is not None
    module = build_module(task, found.spec)
    context.phase("exporting", word_of(wanted.format))
    try:
        original = _original(task, module, task.choice.folder, None)
        return original.write(wanted.format, building, _bound(wanted))
    except FormatRefused as refused:
        raise RunFailed(
            REASON,
            str(refused),
            "raise max_drop, take another format, or train the model longer; the model is as it was",
        ) from refused


def _original(task: Prepared, module: HuggingFaceModule, folder: Folder, deadline_s: float | None) -> Original:
    """The model as formats are compared with it, without gradients, in evaluation mode."""
    graph = cast("Exportable", task.task).graph
    assert task.eval is not None
    module = module.cpu().float().eval().requires_grad_(False)
    measured = Measured(task, module, graph, task.eval, deadline_s=deadline_s)
    return Original(measured, folder, threads=torch.get_num_threads())


def _plain_module(trained: Trained) -> HuggingFaceModule:
    """The trained module in fp32 on the CPU, without adapters: the live one may be sharded, or in another type."""
    spec = spec_pb2.JobSpec()
    spec.CopyFrom(resolved_spec(trained.attempt))
    spec.fine_tuning.ClearField("lora")
    spec.fine_tuning.ClearField("freeze")
    spec.ClearField("parallelism")
    module = build_module(trained.task, spec)
    if getattr(trained.module.model.base_model, "pooler", module) is None:
        module.model.base_model.pooler = None
    module.model.load_state_dict({name: tensor.float() for name, tensor in trained.plain_state().items()})
    if module.own_head is not None:
        module.own_head.load_state_dict({name: tensor.float() for name, tensor in trained.head_state().items()})
    return module


def _bound(wanted: spec_pb2.FormatExport | spec_pb2.ExportPolicy) -> Bound:
    return Bound(wanted.metric, wanted.max_drop if wanted.HasField("max_drop") else None)


def _files(folder: Path, prefix: str) -> model_service_pb2.Model:
    files = [
        transfer_pb2.StoredFile(
            path=f"{prefix}{file.path}", size_bytes=file.size_bytes, sha256=file.sha256, committed_bytes=file.size_bytes
        )
        for file in stored_files(folder)
    ]
    return model_service_pb2.Model(files=files)

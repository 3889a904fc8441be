"""Exports the gang's gathered weights as a Hugging Face folder, which is loaded and compared before it counts.

The folder is written under another name, loaded afresh as `Predict` loads it, compared with the live model on one
batch, fsynced, and then renamed into place: a folder of that name works. Called on rank 0 only.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.claim import missing_storage
from shardyard_trainer.failures import RunFailed, storage_failure, system_error
from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.models.door import FolderInvalid, open_folder
from shardyard_trainer.models.folder import TORCH_HUB_TYPES, save_code
from shardyard_trainer.models.generation import generation_settings
from shardyard_trainer.models.loading import number_parameter, quiet
from shardyard_trainer.models.weights import read_header
from shardyard_trainer.tasks.adaptation import has_adapters, merged, save_adapter
from shardyard_trainer.tasks.base import Predictor, Prepared, build_module
from shardyard_trainer.tasks.module import HuggingFaceModule, TaskModule
from shardyard_trainer.tasks.opening import open_model
from shardyard_trainer.training.config import resolved_spec
from shardyard_trainer.training.model_card import Subject, model_card
from shardyard_trainer.training.results import put_in_place, stored_files, sync

TOLERANCE = 1e-4
"""How far fp32 logits of the folder may be from the live model's, relative to the largest of them (at least 1)."""

BF16_TOLERANCE = 0.1
"""The same for a live model that computes in bf16: the folder is read in fp32."""

_COMPARED_SAMPLES = 4
ADAPTER_FOLDER = "adapter"
_FILES = ("config.json", "model.safetensors", "shardyard.json")


@dataclass(frozen=True)
class Trained:
    """The trained weights with their task and attempt, as they are exported."""

    module: HuggingFaceModule
    state_dict: Mapping[str, torch.Tensor]
    task: Prepared
    attempt: worker_pb2.AttemptSpec
    step: int

    def plain_state(self) -> dict[str, torch.Tensor]:
        """The weights of the model alone, with adapters merged into them."""
        return merged(self.module.model, _part(self.state_dict, "model."))

    def head_state(self) -> dict[str, torch.Tensor]:
        """The weights of a head of our own; empty if there is none."""
        return _part(self.state_dict, "own_head.")


AddFormats = Callable[[Path, Trained], Sequence[model_service_pb2.ModelExport]]
"""Writes further formats into the folder of a model that has been verified, and returns their receipts."""


def export_model(
    engine_module: TaskModule,
    state_dict: Mapping[str, torch.Tensor],
    task: Prepared,
    attempt: worker_pb2.AttemptSpec,
    metrics: Mapping[str, float],
    *,
    folder: Path,
    step: int = 0,
    add: AddFormats | None = None,
) -> worker_pb2.Exported:
    """Writes `folder`, whole and verified, and describes it.

    `state_dict` has all weights of the module by name on the CPU, after `step` (0: the last one of the plan).
    An earlier attempt's folder is replaced. `add` writes further formats into the folder before it counts.
    Raises RunFailed EXPORT_FAILED, LOSS_DIVERGED or a STORAGE_ cause; then nothing is left at the target.
    """
    trained = Trained(cast("HuggingFaceModule", engine_module), state_dict, task, attempt, step)
    building = folder.with_name(f".{folder.name}.e{attempt.epoch:06}")
    broken = next((name for name, tensor in state_dict.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise _diverged(f"the trained weights `{broken}` are no longer numbers")
    try:
        _write(building, trained, metrics)
        predictor = _verify(building, trained)
        formats = add(building, trained) if add is not None else []
        sync(building)
        put_in_place(building, folder)
        model = _describe(folder, trained.task, metrics, predictor)
        model.exports.extend(formats)
    except (OSError, SafetensorError) as error:
        missing = missing_storage(attempt.locations)
        os_error = system_error(error)
        failed = missing or (storage_failure(os_error, "the exported model") if os_error else None)
        raise failed or _failed(f"it could not be written: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return worker_pb2.Exported(path=str(folder), model=model)


def dry_run(
    engine_module: TaskModule,
    state_dict: Mapping[str, torch.Tensor],
    task: Prepared,
    attempt: worker_pb2.AttemptSpec,
    metrics: Mapping[str, float],
    *,
    folder: Path,
    step: int = 0,
) -> worker_pb2.Exported:
    """All of `export_model` in a folder that is then removed: the canary's part."""
    try:
        return export_model(engine_module, state_dict, task, attempt, metrics, folder=folder, step=step)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, trained: Trained, metrics: Mapping[str, float]) -> None:
    module, state_dict, task = trained.module, trained.state_dict, trained.task
    # The folder itself may have been made for this rank, which may not write to another one.
    for left in folder.glob("*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    folder.mkdir(exist_ok=True)  # Without the folders above: they are there, or the storage is not.
    described = dict(task.describe())
    pooling = str(described.get("pooling") or "")
    with quiet():
        _save_model(folder, module, _part(state_dict, "model."), task)
        save_code(folder, task.choice.config.model_type)
        task.inputs.save(folder, task.choice.config)
    lora = resolved_spec(trained.attempt).fine_tuning.lora
    if lora.keep_adapter and has_adapters(module):
        save_adapter(folder / ADAPTER_FOLDER, module, state_dict, lora)
    if module.own_head is not None:
        head = {name: tensor.float().contiguous() for name, tensor in _part(state_dict, "own_head.").items()}
        save_file(head, folder / "head.safetensors")
        outputs, width = head["weight"].shape
        _save_json(
            folder / "head.json",
            {"format": 1, "pooling": pooling, "width": width, "num_outputs": outputs, "max_length": task.length},
        )
    # Answers may depend on metrics, such as a threshold; JSON has no numbers that are not finite.
    found = {name: value for name, value in metrics.items() if math.isfinite(value)}
    _save_json(folder / "shardyard.json", {**described, "format": 1, "metrics": found})
    subject = Subject(
        task=task.task,
        model_type=task.choice.config.model_type,
        num_parameters=_num_parameters(folder),
        labels=list(described.get("labels") or ()),
        max_length=task.length if task.task.cuts else None,
        own_head=pooling if module.own_head is not None else "",
        vectors=pooling if described.get("normalize") else "",
        metrics=metrics,
        step=trained.step,
        hub=module.model.config if module.model.config.model_type in TORCH_HUB_TYPES else None,
    )
    (folder / "README.md").write_text(model_card(subject, trained.attempt), encoding="utf-8")


def _save_model(
    folder: Path, module: HuggingFaceModule, state_dict: Mapping[str, torch.Tensor], task: Prepared
) -> None:
    """Through a model without memory of its own: the live one may be sharded, or on a GPU with its ties undone."""
    config = copy.deepcopy(module.model.config)
    config.use_cache = getattr(task.choice.config, "use_cache", True)
    with torch.device("meta"):
        shell = type(module.model)(config)
    if getattr(module.model.base_model, "pooler", shell) is None:
        shell.base_model.pooler = None
    shell.load_state_dict(merged(module.model, state_dict), strict=True, assign=True)
    # Only weights that are equal: T5 1.1 ties them by its configuration, but has a separate output layer.
    shell.tie_weights(missing_keys=set())
    if not shell.can_generate():
        shell.generation_config = None
        shell.save_pretrained(folder)
        return
    # Written unchanged: transformers refuses to save some that it reads, such as a temperature without do_sample.
    shell.generation_config = GenerationConfig()
    shell.save_pretrained(folder)
    settings = generation_settings(task.choice.folder) if task.choice.folder is not None else {}
    generation = task.inputs.generation(task.choice.config, settings)
    _save_json(folder / "generation_config.json", {**generation, "transformers_version": transformers.__version__})


def _verify(folder: Path, trained: Trained) -> Predictor:
    """Loads the folder, and returns its predictor. Raises RunFailed if it does not answer as the live model does."""
    task = trained.task
    missing = [name for name in (*_FILES, *task.inputs.files) if not (folder / name).is_file()]
    if missing:
        raise _failed(f"{missing[0]} was not written")
    try:
        opened = open_model(open_folder(folder, runs=trained.attempt.locations.torch_hub))
    except FolderInvalid as error:
        raise _failed(f"the folder does not load: {error}") from error
    if opened.predictor is None:
        raise _failed("its task is not found again")
    if strangers := opened.loaded.strangers:
        raise _failed(f"transformers does not read the tensor {strangers[0]!r}")
    live = trained.module
    if any(hasattr(parameter, "ds_id") for parameter in live.parameters()):
        # At ZeRO-3 a forward pass of one rank alone would wait for the others forever.
        live = build_module(task, resolved_spec(trained.attempt))
        live.load_state_dict(trained.state_dict)
    samples = [SampleRef(0, index) for index in range(min(_COMPARED_SAMPLES, task.train.num_samples))]
    wanted, found = _compare(live, opened.predictor, task.train.micro_batch(samples))
    if not wanted.isfinite().all():
        raise _diverged("what the trained model computes is no longer a number")
    difference = float((wanted - found).abs().max())
    is_bf16 = number_parameter(live).dtype == torch.bfloat16
    allowed = (BF16_TOLERANCE if is_bf16 else TOLERANCE) * max(1.0, float(wanted.abs().max()))
    if not difference <= allowed:  # so written, NaN fails too
        raise _failed(f"loaded afresh, its logits differ by {difference:.3g} from the trained model's")
    return opened.predictor


def _compare(live: HuggingFaceModule, predictor: Predictor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    was_training = live.training
    live.eval()
    try:
        return predictor.compare(live, batch)
    finally:
        live.train(was_training)


def _describe(
    folder: Path, task: Prepared, metrics: Mapping[str, float], predictor: Predictor
) -> model_service_pb2.Model:
    files = stored_files(folder)
    return model_service_pb2.Model(
        state=model_service_pb2.Model.STATE_READY,
        files=files,
        size_bytes=sum(file.size_bytes for file in files),
        path=str(folder),
        model_type=task.choice.config.model_type,
        task=task.task.name,
        labels=list(task.describe().get("labels") or ()),
        num_parameters=_num_parameters(folder),
        inputs=predictor.takes,
        parameters=predictor.parameters,
        metrics=dict(metrics),
    )


def _num_parameters(folder: Path) -> int:
    opened = open_folder(folder)
    headers = (read_header(opened, name) for name in opened.weight_names())
    return sum(math.prod(tensor.shape) for header in headers for tensor in header)


def _part(state_dict: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def _save_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _diverged(what: str) -> RunFailed:
    advice = "lower optimization.learning_rate and weight_decay, or lengthen the warm-up"
    return RunFailed("LOSS_DIVERGED", what, advice)


def _failed(what: str) -> RunFailed:
    return RunFailed(
        "EXPORT_FAILED",
        f"the exported model was not accepted: {what}",
        "see the log of rank 0; the checkpoints are kept",
    )

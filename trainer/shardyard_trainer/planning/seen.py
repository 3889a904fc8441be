"""The model and data of a spec, read once for all specs that differ only in settings of the run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.inspect import check_weights
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.data.sources import named_sources, resolve_uri
from shardyard_trainer.models.door import signature
from shardyard_trainer.models.hub import snapshot_folder
from shardyard_trainer.models.hub_process import CHECKPOINTS
from shardyard_trainer.models.tf_checkpoint import folder_of
from shardyard_trainer.models.torch_hub import repository_name
from shardyard_trainer.planning import activations, memory
from shardyard_trainer.planning.sizing import longest_sample
from shardyard_trainer.planning.statistics import num_shared
from shardyard_trainer.reading import about, reading
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.adaptation import has_adapters, num_layers_frozen
from shardyard_trainer.tasks.base import Footprint, Prepared, build_module
from shardyard_trainer.tasks.distillation import FIELD, Lesson, prepare_both
from shardyard_trainer.tasks.module import HuggingFaceModule

PROPOSED_RANK = 8
"""Of the LoRA that is proposed for a job that does not fit."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Seen:
    """Everything that depends on files, but not on the settings of the run."""

    spec: spec_pb2.JobSpec
    task: Prepared
    lesson: Lesson | None
    weight_errors: tuple[SpecError, ...]
    of_any_seed: Seen | None = None
    """The same spec with another seed, which has the same model."""

    @cached_property
    def num_shared(self) -> int | None:
        """Evaluation samples that are in the training data too; None: not compared."""
        return num_shared(self.task)

    @cached_property
    def shape(self) -> memory.Shape:
        """The model's. Raises SpecError if none can be made."""
        if self.of_any_seed is not None:
            return self.of_any_seed.shape
        shape = shape_of(self.task, self.spec)
        return shape if self.lesson is None else replace(shape, teacher=shape_of(self.lesson.task, self.lesson.spec))

    @cached_property
    def adapted_shape(self) -> memory.Shape:
        """The model's with the LoRA that is proposed if it does not fit. Raises SpecError if none can be made."""
        spec = spec_pb2.JobSpec()
        spec.CopyFrom(self.spec)
        spec.fine_tuning.lora.rank = PROPOSED_RANK
        shape = replace(shape_of(self.task, spec), teacher=self.shape.teacher)
        # Pictures are counted by the task, without adapters, each of which keeps at most its layer's input again.
        return replace(shape, activation_bytes=2 * shape.activation_bytes) if shape.is_attention_counted else shape

    def shape_for(self, spec: spec_pb2.JobSpec) -> memory.Shape:
        """The model's for the same spec, or for one that has the proposed LoRA beside. Raises SpecError."""
        has_more = spec.fine_tuning.HasField("lora") and not self.spec.fine_tuning.HasField("lora")
        return self.adapted_shape if has_more else self.shape


def look(spec: spec_pb2.JobSpec, call: worker_pb2.PlanRequest) -> Seen:
    """Reads the files, once for all specs that differ only in settings of the run. Raises SpecError.

    The cache key is the spec without those settings, so that nothing in the cache can depend on them.
    """
    reduced = spec_pb2.JobSpec()
    reduced.CopyFrom(spec)
    for name in ("optimization", "parallelism", "resources", "checkpoints", "retry", "max_run_time", "export"):
        reduced.ClearField(name)
    for name in ("every", "metric", "select_best", "early_stopping"):
        reduced.evaluation.ClearField(name)  # type: ignore[arg-type]
    where = call.locations.SerializeToString(deterministic=True)
    seed = spec.optimization.seed if _is_split_by_lot(spec) else 0
    if may_move(spec):
        reduced.optimization.seed = seed
        return _look_once.__wrapped__(reduced.SerializeToString(deterministic=True), where, ())
    files = reduced.SerializeToString(deterministic=True), where, tuple(identities(call))
    return _split_once(*files, seed) if seed else _look_once(*files)


def _is_split_by_lot(spec: spec_pb2.JobSpec) -> bool:
    """Whether the seed decides which samples are held out; nothing else that a plan says depends on it."""
    has_holdout = not spec.evaluation.HasField("holdout") or spec.evaluation.holdout > 0
    return table.trained(spec).holds_out_by_lot and not spec.HasField("eval_data") and has_holdout


@lru_cache(maxsize=8)
def _look_once(spec: bytes, locations: bytes, _identity: tuple[object, ...]) -> Seen:
    read, where = spec_pb2.JobSpec.FromString(spec), worker_pb2.Locations.FromString(locations)
    task, lesson = prepare_both(read, where)
    errors = _weight_errors(read.model, task, "spec.model")
    if lesson is not None:
        errors += _weight_errors(read.distillation.teacher, lesson.task, FIELD)
    return Seen(read, task, lesson, tuple(errors))


@lru_cache(maxsize=8)
def _split_once(spec: bytes, locations: bytes, identity: tuple[object, ...], seed: int) -> Seen:
    seen = _look_once(spec, locations, identity)
    read, where = spec_pb2.JobSpec.FromString(spec), worker_pb2.Locations.FromString(locations)
    read.optimization.seed = seed
    return Seen(read, *prepare_both(read, where), seen.weight_errors, of_any_seed=seen)


def shape_of(task: Prepared, spec: spec_pb2.JobSpec) -> memory.Shape:
    """Counts the model without making it. Raises SpecError, also for layers that `spec` names and it does not have."""
    about("spec.model", "MODEL_INVALID")
    reading("the model that its configuration asks for")
    module, footprint = build_module(task, spec, meta=True), task.footprint()
    shape = count(module, task.choice.config, footprint)
    if footprint.activation_bytes:
        return shape
    length = longest_sample(task)
    # Both parts of an encoder-decoder have a position at least.
    source = min(max(round(length * footprint.encoded), 1), length - 1) if footprint.encoded else 0
    kept = activations.kept_bytes(module, length, source)
    if kept is None:
        return shape
    attention = activations.attention_bytes(task.choice.config, length, source)
    beside = attention * (shape.num_layers - shape.num_frozen_layers)
    return replace(shape, activation_bytes=-(-kept // length), attention_bytes=beside, is_kept_counted=True)


def count(module: HuggingFaceModule, config: Any, footprint: Footprint) -> memory.Shape:
    """The inputs of the formulas about a module on the meta device."""
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    num_layers, width = int(getattr(config, "num_hidden_layers", 1)), int(getattr(config, "hidden_size", 1))
    embeddings = int(getattr(config, "vocab_size", 0)) * width
    return memory.Shape(
        num_parameters=num_parameters,
        num_trainable=sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
        num_layers=num_layers,
        width=width,
        num_logits=math.ceil(footprint.num_logits * footprint.predicted),
        chunk=footprint.chunk,
        live_parameters=embeddings + max(num_parameters - embeddings, 0) // max(num_layers, 1),
        activation_bytes=footprint.activation_bytes,
        num_frozen_layers=min(num_layers_frozen(module), num_layers),
        has_adapters=has_adapters(module),
        forward_flops=footprint.forward_flops or round(2 * _parameters_at_work(module, footprint, width)),
        is_kept_counted=footprint.forward_flops > 0,
        is_attention_counted=footprint.forward_flops > 0,
        can_recompute=bool(getattr(module.model, "supports_gradient_checkpointing", False)),
    )


def _parameters_at_work(module: HuggingFaceModule, footprint: Footprint, width: int) -> float:
    """Parameters that a position is multiplied with: all but tables of vectors, unless these are outputs too.

    Of an encoder-decoder those of the part that the position goes through, on average.
    """
    num_logits = footprint.num_logits
    tables = {
        parameter for part in module.modules() if isinstance(part, nn.Embedding) for parameter in part.parameters()
    }
    working = float(sum(parameter.numel() for parameter in module.parameters() if parameter not in tables))
    is_tied = num_logits and not any(
        isinstance(part, nn.Linear) and part.out_features == num_logits and part.weight not in tables
        for part in module.modules()
    )
    # A layer of outputs is one of the module's own, unless it is tied; it works where there are outputs alone.
    working += num_logits * width * (footprint.predicted - (0.0 if is_tied else 1.0))
    if not footprint.encoded:
        return working
    encoder = sum(int(each.numel()) for each in module.model.get_encoder().parameters() if each not in tables)
    return footprint.encoded * encoder + (1 - footprint.encoded) * (working - encoder)


def _weight_errors(source: spec_pb2.ModelSource, task: Prepared, field: str) -> list[SpecError]:
    """The faults of weights that were not inspected yet; a registered model's were, when it was uploaded."""
    kind = source.WhichOneof("source")
    if task.choice.folder is None or kind == "model":
        return []
    return [
        SpecError(f"{field}.{kind}", problem.reason, str(problem), problem.metadata)
        for problem in check_weights(task.choice.folder)
    ]


def may_move(spec: spec_pb2.JobSpec) -> bool:
    """Whether it names something outside of this machine's files, which no signature can pin."""
    named: list[Any] = [source for _, source in named_sources(spec)]
    hubs = [source.hub for source in named if source.WhichOneof("source") == "hub"]
    return not all(_COMMIT.fullmatch(hub.revision) for hub in hubs)


def identities(call: worker_pb2.PlanRequest) -> Iterator[object]:
    """Changes whenever a file of the spec changes."""
    for _, source in named_sources(call.spec):
        kind = source.WhichOneof("source")
        if kind == "hub":
            yield signature(snapshot_folder(getattr(source, kind), Path(call.locations.cache_dir)))
        elif kind == "checkpoint":
            yield _identity(folder_of(getattr(source, kind).uri), "uri", call.locations)
        elif kind in {"uri", "model", "dataset"}:
            yield _identity(getattr(source, kind), kind, call.locations)
        elif kind == "torch_hub":
            yield _identity_of_repository(repository_name(getattr(source, kind)), call.locations)
            # Weights that its code loads: the operator may have put a file there since it was refused.
            loaded = Path(torch.hub.get_dir()) / CHECKPOINTS
            yield signature(loaded) if loaded.is_dir() else "not there"


def _identity_of_repository(named: str, locations: worker_pb2.Locations) -> object:
    """Of a folder on the server, or of a repository in torch's cache."""
    if named.startswith("/"):
        return _identity(named, "uri", locations)
    path = Path(locations.torch_hub.get(named, ""))
    return signature(path) if named in locations.torch_hub and path.is_dir() else "not there"


def _identity(named: str, kind: str, locations: worker_pb2.Locations) -> object:
    """Of a path on the server, or of a registered model or data set."""
    try:
        if kind == "uri":
            # Refused before it is walked: a client may name `/`.
            path = resolve_uri(named, locations, field=kind)
        elif not (folder := locations.folders.get(named)):
            return "not there"
        else:
            path = Path(folder)
        if path.is_dir():
            return signature(path)
        stat = path.stat()
    except (OSError, SpecError):
        return "not there"
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

"""What a candidate needs for a task: the planner's own arithmetic, over data that is only imagined.

Nothing here is a formula: the task builds its module as for a job (`imagine`), and `planning` sizes and times it, and
finds the settings with which it fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from shardyard.task_paths import task_paths
from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.choosing.candidates import Candidate
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.image import positions
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.models import architectures, loading, sources
from shardyard_trainer.models.loading import LOADING_ERRORS, quiet
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.plain_words import in_plain_words
from shardyard_trainer.planning import memory, resolve
from shardyard_trainer.planning.alternatives import alternatives, with_settings
from shardyard_trainer.planning.checks import node_memory_of_worker
from shardyard_trainer.planning.duration import plan_time, reading_s
from shardyard_trainer.planning.extraction import memory_of_vectors
from shardyard_trainer.planning.plan import checkpoint_bytes, evaluation_steps
from shardyard_trainer.planning.seen import Seen, count
from shardyard_trainer.planning.sizing import Sized, size_up
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.base import Footprint, Output
from shardyard_trainer.tasks.ingredients import DEFAULT_HOLDOUT, Ingredients
from shardyard_trainer.tasks.module import HuggingFaceModule
from shardyard_trainer.tasks.picture_tasks import DEFAULT_SIDE
from shardyard_trainer.tasks.texts import DEFAULT_MAX_LENGTH

IMAGINED_ROWS = 1000
"""Rows of the training data if they are not known: memory hardly depends on them, and no time is said."""

FINE_TUNING_EPOCHS, PRETRAINING_EPOCHS, NEW_EPOCHS = 3.0, 1.0, 50.0
"""Passes over the data, as in examples/; a model that starts at random needs more of them."""

_HISTORY = "max_history"
LENGTHS = ("max_length", "sequence_length", _HISTORY, "max_source_length")
"""Fields of tasks that say how long a row is."""

SHORTEST = 16
"""Tokens that every task on texts takes as its length; shorter rows are padded less, not cut."""

_CLOSE = (plan_pb2.MEMORY_VERDICT_NO_FIT, plan_pb2.MEMORY_VERDICT_TIGHT)


@dataclass(frozen=True)
class Wanted:
    """What is asked for: the task's name, rows and tokens of the data (0: not known), and the node of a worker."""

    task: str
    rows: int
    tokens: int
    node: worker_pb2.NodeShape
    locations: worker_pb2.Locations

    @property
    def trains(self) -> bool:
        """Whether the task leaves a model."""
        return table.named(self.task).output is Output.MODEL

    def epochs(self, *, is_new: bool = False) -> float:
        """Passes over the data."""
        if is_new:
            return NEW_EPOCHS
        return PRETRAINING_EPOCHS if path_of(self.task)[0] == "pretraining" else FINE_TUNING_EPOCHS


@dataclass(frozen=True)
class Estimate:
    """What a candidate needs; `settings` are those without which it would not fit, `length` the positions of a row.

    `time` is None if nothing is trained, or the rows are not known. `spec` is the job's, without data; `resources` are
    those of its worker.
    """

    spec: spec_pb2.JobSpec
    settings: Mapping[str, str]
    num_parameters: int
    memory: memory.Memory
    time: plan_pb2.TimePlan | None
    reading_s: float
    length: int
    resources: spec_pb2.Resources

    @property
    def fits(self) -> bool:
        """Whether the memory suffices, be it only just; it does if no node's memory is known."""
        return not self.memory.available or self.memory.total <= self.memory.available

    @property
    def is_tight(self) -> bool:
        """Whether it is close."""
        return self.memory.verdict == plan_pb2.MEMORY_VERDICT_TIGHT


def path_of(task: str) -> tuple[str, ...]:
    """The members of a spec that lead to a task, by its name. Raises KeyError for an unknown one."""
    return {path[-1]: path for path in task_paths()}[task]


def estimate(candidate: Candidate, wanted: Wanted) -> Estimate:
    """What a job of a candidate would need. Raises SpecError for one that the task does not take."""
    written, planned = (
        _spec(model, wanted, is_new=candidate.is_new) for model in (candidate.source, candidate.planned)
    )
    if candidate.image_size:
        # The side that it was trained with, which a job reads from the folder.
        _set_if_any(planned, "image_size", candidate.image_size)
    if not wanted.trains:
        return _of_vectors(written, planned, candidate, wanted)
    seen = _look(planned, wanted)
    sized = _size(planned, seen, wanted)
    settings = _settings(planned, seen, sized, wanted) if sized.need.verdict in _CLOSE else {}
    if settings:
        written, planned = with_settings(written, settings), with_settings(planned, settings)
        sized = _size(planned, seen, wanted)
    shape = seen.shape_for(planned)
    return Estimate(
        written,
        settings,
        seen.shape.num_parameters,
        sized.need,
        _time(planned, seen, sized, wanted) if wanted.rows else None,
        reading_s(planned, shape, sized.length, wanted.node),
        sized.length,
        planned.resources,
    )


def _spec(model: spec_pb2.ModelSource, wanted: Wanted, *, is_new: bool) -> spec_pb2.JobSpec:
    """The job's spec, as far as the question says something about it."""
    spec = spec_pb2.JobSpec(model=model)
    message: Any = spec
    for name in path_of(wanted.task):
        message = getattr(message, name)
    message.SetInParent()
    if wanted.tokens:
        for name in LENGTHS:
            _set_if_any(spec, name, wanted.tokens if name == _HISTORY else max(wanted.tokens, SHORTEST))
    if wanted.trains:
        spec.optimization.epochs = wanted.epochs(is_new=is_new)
    return spec


def _set_if_any(spec: spec_pb2.JobSpec, name: str, value: int) -> None:
    message = table.message_of(spec)
    if name in message.DESCRIPTOR.fields_by_name:
        setattr(message, name, value)


def _look(planned: spec_pb2.JobSpec, wanted: Wanted) -> Seen:
    rows, where = wanted.rows or IMAGINED_ROWS, wanted.locations.SerializeToString(deterministic=True)
    return _look_once(planned.SerializeToString(deterministic=True), rows, where)


def _size(planned: spec_pb2.JobSpec, seen: Seen, wanted: Wanted) -> Sized:
    """How the job is cut to its worker; fills in `planned`."""
    resolve.fill_resources(planned, wanted.node, trains=True)
    resolve.fill_optimization(planned, seen.task)
    resolve.fill_adaptation(planned.fine_tuning)
    return size_up(planned, seen.task, None, seen.shape_for(planned), wanted.node)


@lru_cache(maxsize=1024)
def _look_once(spec: bytes, rows: int, locations: bytes) -> Seen:
    """The task with imagined data; what is counted once stays counted while this process is kept."""
    read = spec_pb2.JobSpec.FromString(spec)
    held_out = round(rows * DEFAULT_HOLDOUT)
    data = Imagined(max(rows - held_out, 1), held_out)
    job = Ingredients(read, worker_pb2.Locations.FromString(locations))
    return Seen(read, table.trained(read).imagine(job, data), None, ())


def _settings(planned: spec_pb2.JobSpec, seen: Seen, sized: Sized, wanted: Wanted) -> Mapping[str, str]:
    """The cheapest settings with which it fits and still reads whole rows; empty: there are none."""
    for other in alternatives(planned, seen, sized, wanted.node):
        if not any(path.rpartition(".")[2] in LENGTHS for path in other.settings):
            return dict(other.settings)
    return {}


def _time(planned: spec_pb2.JobSpec, seen: Seen, sized: Sized, wanted: Wanted) -> plan_pb2.TimePlan:
    timed = spec_pb2.JobSpec()
    timed.CopyFrom(planned)
    ways = sized.placed.ways
    every = evaluation_steps(seen.task, sized.batch, sized.steps)
    resolve.fill_batch(timed, sized.batch, ways, evaluate_every=every)
    shape = seen.shape_for(planned)
    checkpoint = checkpoint_bytes(shape, stage=ways.stage, bf16=sized.gang.bf16)
    return plan_time(timed, seen.task, shape, sized, wanted.node, checkpoint=checkpoint)


def _of_vectors(written: spec_pb2.JobSpec, planned: spec_pb2.JobSpec, candidate: Candidate, wanted: Wanted) -> Estimate:
    """A job that makes vectors and trains nothing."""
    resolve.fill_resources(planned, wanted.node, trains=False)
    limit = min(each for each in (candidate.context, wanted.tokens or DEFAULT_MAX_LENGTH) if each)
    where = wanted.locations.SerializeToString(deterministic=True)
    model = candidate.planned.SerializeToString(deterministic=True)
    shape, length = _backbone_once(model, candidate.image_size or DEFAULT_SIDE, limit, where)
    need = memory_of_vectors(shape.num_parameters, available=node_memory_of_worker(planned, wanted.node))
    seconds = reading_s(planned, shape, length, wanted.node)
    return Estimate(written, {}, shape.num_parameters, need, None, seconds, length, planned.resources)


@lru_cache(maxsize=1024)
def _backbone_once(model: bytes, side: int, tokens: int, locations: bytes) -> tuple[memory.Shape, int]:
    """A model that makes vectors, and the positions of one input. Raises SpecError."""
    source = spec_pb2.ModelSource.FromString(model)
    choice = sources.choose_model(source, worker_pb2.Locations.FromString(locations), image_size=side)
    pictures = architectures.is_of_pictures(choice.config.model_type)
    if not pictures and not architectures.reads_text(choice.config):
        message = f"{choice.config.model_type} does not give one vector for each token of a text"
        raise SpecError(choice.field, "OBJECTIVE_UNSUPPORTED", message)
    if pictures and choice.is_fresh and hasattr(choice.config, "image_size"):
        choice.config.image_size = side
    module = HuggingFaceModule()
    with quiet(), torch.device("meta"):
        module.model, _ = loading.load(transformers.AutoModel, choice, meta=True)
    module.own_head = None
    length = positions((side, side)) if pictures else tokens
    footprint = Footprint(0, 0, 0, _operations(module, side, choice) // length if pictures else 0)
    return count(module, choice.config, footprint), length


def _operations(module: HuggingFaceModule, side: int, choice: ModelChoice) -> int:
    """Of one picture, counted. Raises SpecError."""
    channels = getattr(choice.config, "num_channels", 3)
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            module.model.eval()(torch.empty(1, channels, side, side, device="meta"))
    except LOADING_ERRORS as error:
        message = f"{choice.config.model_type} gives no vector of a picture: {in_plain_words(error)}"
        raise SpecError(choice.field, "OBJECTIVE_UNSUPPORTED", message) from None
    return int(counter.get_total_flops())

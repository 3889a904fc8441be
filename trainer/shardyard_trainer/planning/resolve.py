"""Fills in what a spec leaves out, as the comments of spec.proto say, so that a resolved spec plans to itself.

Two fields stay unset, because they depend on the run: `checkpoints.every`, and `retry.max`, whose default depends on
the cause of a failure.
"""

from __future__ import annotations

from typing import Any

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.inputs.tokenization import DEFAULT_VOCAB_SIZE
from shardyard_trainer.models import sources
from shardyard_trainer.planning.arithmetic import DEFAULT_METRIC, DEFAULT_PATIENCE, Batch
from shardyard_trainer.planning.memory import Ways
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.adaptation import DEFAULT_ALPHA, DEFAULT_RANK
from shardyard_trainer.tasks.base import Prepared
from shardyard_trainer.tasks.distillation import Lesson
from shardyard_trainer.tasks.ingredients import DEFAULT_HOLDOUT

GLOBAL_BATCH_SIZE = 32
PRETRAINED_LEARNING_RATE = 5e-5
LORA_LEARNING_RATE = 2e-4
FRESH_LEARNING_RATE = 1e-3
KEEP_LAST = 2

_OPTIMIZATION: dict[str, Any] = {
    "schedule": spec_pb2.SCHEDULE_LINEAR,
    "min_learning_rate": 0.0,
    "weight_decay": 0.01,
    "clip": 1.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "seed": 0,
}


def fill_resources(spec: spec_pb2.JobSpec, node: worker_pb2.NodeShape, *, trains: bool) -> None:
    """Fills in workers, their cores and GPUs, and the precision for them.

    bf16 is for training (`trains`) on GPUs that are known to compute it.
    """
    resources = spec.resources
    if resources.WhichOneof("size") is None:
        resources.workers = 1
    _fill(resources, gpus_per_worker=1 if node.gpus else 0, cpus_per_worker=1)
    optimization = spec.optimization
    if not optimization.precision:
        on_gpu = resources.gpus_per_worker > 0 and trains
        optimization.precision = spec_pb2.PRECISION_BF16 if on_gpu and node.bf16 else spec_pb2.PRECISION_FP32


def fill_optimization(spec: spec_pb2.JobSpec, task: Prepared) -> None:
    """Fills in learning rate, schedule, batch and the like."""
    optimization = spec.optimization
    if not optimization.schedule:
        optimization.schedule = _OPTIMIZATION["schedule"]
    of_pretrained = LORA_LEARNING_RATE if spec.fine_tuning.HasField("lora") else PRETRAINED_LEARNING_RATE
    if task.learning_rate is not None:
        of_pretrained = task.learning_rate
    rate = FRESH_LEARNING_RATE if task.choice.is_fresh else of_pretrained
    _fill(optimization, global_batch_size=GLOBAL_BATCH_SIZE, learning_rate=rate)
    _fill(optimization, **{name: value for name, value in _OPTIMIZATION.items() if name != "schedule"})
    if optimization.WhichOneof("warmup") is None:
        optimization.warmup_ratio = 0.1
    _fill(spec.parallelism, compile=False)
    _fill(spec.checkpoints, keep_last=KEEP_LAST)


def fill_adaptation(fine_tuning: spec_pb2.FineTuning) -> None:
    """The numbers of LoRA, if there is one; no `targets` means all linear layers of the backbone."""
    if fine_tuning.HasField("lora"):
        _fill(fine_tuning.lora, rank=DEFAULT_RANK, alpha=DEFAULT_ALPHA, dropout=0.0)


def fill_task(spec: spec_pb2.JobSpec, task: Prepared) -> None:
    """Fills in what the task found: lengths, labels, pooling, and commits of the Hub."""
    task.resolve(table.message_of(spec))
    sources.pin(spec.model, task.choice.pinned)
    if spec.tokenizer.WhichOneof("source") == "train":
        trained = spec.tokenizer.train
        if not trained.algorithm:
            trained.algorithm = spec_pb2.TrainedTokenizer.ALGORITHM_BYTE_BPE
        if trained.algorithm != spec_pb2.TrainedTokenizer.ALGORITHM_CHARACTERS:
            _fill(trained, vocab_size=DEFAULT_VOCAB_SIZE)
    if not spec.HasField("eval_data"):
        _fill(spec.evaluation, holdout=DEFAULT_HOLDOUT)


def fill_distillation(spec: spec_pb2.JobSpec, lesson: Lesson | None) -> None:
    """Temperature and weight, and the commit of a teacher on the Hub."""
    if lesson is not None:
        _fill(spec.distillation, temperature=lesson.temperature, weight=lesson.weight)
        sources.pin(spec.distillation.teacher, lesson.task.choice.pinned)


def fill_batch(spec: spec_pb2.JobSpec, batch: Batch, ways: Ways, *, evaluate_every: int | None) -> None:
    """The batch if it divides exactly; an uneven one is chosen again from the same numbers, with the same result."""
    if batch.is_even:
        spec.optimization.micro_batch_size = batch.micro_batch_size
    _fill(
        spec.parallelism,
        zero_stage=ways.stage,
        activation_checkpointing=ways.recomputes,
        offload_optimizer=ways.offloads,
    )
    if evaluate_every is not None:
        _fill(spec.evaluation, every=evaluate_every)
        spec.evaluation.metric = spec.evaluation.metric or DEFAULT_METRIC
    if spec.evaluation.HasField("early_stopping"):
        _fill(spec.evaluation.early_stopping, patience=DEFAULT_PATIENCE, min_delta=0.0)


def fill_source(source: spec_pb2.DataSource, files: list[DataFile]) -> None:
    """Fills in the format by the file's ending."""
    if files:
        source.format = files[0].format
    if source.format == spec_pb2.DATA_FORMAT_TEXT and not source.document:
        source.document = spec_pb2.DOCUMENT_UNIT_LINE


def _fill(message: Any, **values: Any) -> None:
    for name, value in values.items():
        if not message.HasField(name):
            setattr(message, name, value)

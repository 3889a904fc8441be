"""The settings in a job's spec beside task, model and data: how and where to train, and what to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]
ExportFormat = Literal["onnx", "onnx-int8", "bf16"]


@dataclass(frozen=True)
class Lora:
    """Fine-tuning by low-rank adapters: a frozen layer W becomes W + alpha ÷ rank · B A, and A and B are trained.

    `targets` are the layers that get an adapter, such as `["query", "value"]`; by default all linear layers do. The
    export has the adapters merged into its weights; with `keep_adapter` it also has them alone, for peft.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    targets: tuple[str, ...] | list[str] | None = None
    keep_adapter: bool | None = None


@dataclass(frozen=True)
class Freeze:
    """What fine-tuning does not train: the whole `backbone`, the `embeddings`, or the first `layers`, a number."""

    backbone: bool | None = None
    embeddings: bool | None = None
    layers: int | None = None


@dataclass(frozen=True)
class Optimization:
    """Steps (`max_steps` or `epochs`), batch, learning rate. The optimizer is AdamW."""

    max_steps: int | None = None
    epochs: float | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    schedule: Schedule | None = None
    warmup_ratio: float | None = None
    warmup_steps: int | None = None
    min_learning_rate: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    precision: Precision | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Parallelism:
    """How the model states are sharded, by the ZeRO stage, 0 to 3, and how else memory is saved.

    `activation_checkpointing` computes layers again in the backward pass; `offload_optimizer` keeps the optimizer in
    the node's memory. Both are chosen by need if they are left out.
    """

    zero_stage: int | None = None
    compile: bool | None = None
    activation_checkpointing: bool | None = None
    offload_optimizer: bool | None = None


@dataclass(frozen=True)
class Resources:
    """The number of workers, and the GPUs and CPU cores of each."""

    workers: int | None = None
    gpus_per_worker: int | None = None
    cpus_per_worker: int | None = None


@dataclass(frozen=True)
class Checkpoints:
    """Steps between two checkpoints, and how many of the newest are kept."""

    every: int | None = None
    keep_last: int | None = None


@dataclass(frozen=True)
class EarlyStopping:
    """Training ends after `patience` evaluations in a row that are not better by more than `min_delta`."""

    patience: int | None = None
    min_delta: float | None = None


@dataclass(frozen=True)
class EvaluationPolicy:
    """Steps between two evaluations, and the part of the training data held out if no `eval_data` is given.

    Evaluations are compared by `metric`, such as `accuracy`: with `select_best` the weights of the best one are
    exported, with `early_stopping` training ends when it no longer improves.
    """

    every: int | None = None
    holdout: float | None = None
    metric: str | None = None
    select_best: bool | None = None
    early_stopping: EarlyStopping | None = None


@dataclass(frozen=True)
class ExportPolicy:
    """Formats that the trained model is written in as well, each measured on the evaluation data.

    One whose `metric` is worse than the model's own by more than `max_drop` is left out, with a warning.
    """

    formats: tuple[ExportFormat, ...] | list[ExportFormat]
    max_drop: float | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Retry:
    """How many attempts after the first may fail."""

    max: int | None = None

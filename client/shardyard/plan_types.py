"""Plans of jobs: users have them from `shardyard.types`, which says how to read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from shardyard.job_types import Warning


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch is made."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    workers: int
    samples_per_rank: tuple[int, ...]


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one worker in bytes; `verdict` is fits, tight, no_fit or unspecified."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    process_bytes: int
    total_bytes: int
    available_bytes: int
    verdict: str
    batches_bytes: int
    teacher_bytes: int
    evaluation_bytes: int
    export_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class LengthStats:
    """Lengths in tokens that half, 90 %, 99 % and all of the samples do not exceed."""

    p50: int
    p90: int
    p99: int
    longest: int


@dataclass(frozen=True)
class ClassCount:
    """How many samples, or words, have a label."""

    label: str
    count: int


@dataclass(frozen=True)
class DataStats:
    """The size of data, and the shares of it that a model would not see: cut texts, unknown tokens."""

    num_samples: int
    num_tokens: int
    cut_share: float
    unknown_share: float
    lengths: LengthStats | None
    classes: tuple[ClassCount, ...]


@dataclass(frozen=True)
class EvaluationMetric:
    """What evaluations can be compared by."""

    name: str
    higher_is_better: bool


@dataclass(frozen=True)
class Decision:
    """A field that saves memory, its value, and the numbers that speak for it."""

    field: str
    value: str
    reason: str


@dataclass(frozen=True)
class Alternative:
    """Settings of a spec with which a job fits, by their fields, and the memory of one worker then."""

    settings: Mapping[str, str]
    memory: MemoryPlan | None


@dataclass(frozen=True)
class TimePlan:
    """How long a job would take, with an interval, and what that costs if the operator has set a price."""

    expected: timedelta | None
    low: timedelta | None
    high: timedelta | None
    worker_hours: float
    slot_hours: float
    cost: float | None
    currency: str


@dataclass(frozen=True)
class Plan:
    """What a job would need; `output` is the kind of result: a `model`, a `dataset`, or `metrics`."""

    resolved_spec: Mapping[str, Any] | None
    batch: BatchPlan | None
    deepspeed_config_json: str
    num_parameters: int
    memory: MemoryPlan | None
    total_steps: int
    num_train_samples: int
    num_eval_samples: int
    num_train_tokens: int
    labels: tuple[str, ...]
    checkpoint_bytes: int
    warnings: tuple[Warning, ...]
    slots: int
    data_fingerprint: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    train_stats: DataStats | None
    eval_stats: DataStats | None
    output: str
    metrics: tuple[EvaluationMetric, ...]
    num_trainable_parameters: int
    num_teacher_parameters: int
    teacher_fingerprint: str
    decisions: tuple[Decision, ...]
    etag: str
    num_shared_samples: int | None
    alternatives: tuple[Alternative, ...]
    time: TimePlan | None

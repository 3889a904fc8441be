"""Jobs, their attempts, events and plans: users have them from `shardyard.types`, which says how to read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

TERMINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True)
class Progress:
    """How far training has progressed."""

    step: int
    total_steps: int
    data_epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    eta: timedelta | None
    padding_share: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """One evaluation's numbers; `is_final` marks that of the exported weights, `is_partial` one of some samples."""

    step: int
    metrics: Mapping[str, float]
    num_samples: int
    is_final: bool
    is_partial: bool


@dataclass(frozen=True)
class Condition:
    """A fact about a job beside its state."""

    type: str
    active: bool
    message: str
    time: datetime | None


@dataclass(frozen=True)
class PendingInfo:
    """Why a queued job does not run yet."""

    constraint: str
    message: str
    needed_slots: int
    free_slots: int
    position: int
    until: datetime | None


@dataclass(frozen=True)
class FailureReport:
    """Why a job or an attempt failed, and what to do about it."""

    reason: str
    message: str
    next_step: str
    attempt: int
    rank: int | None
    step: int | None
    log_tail: str
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class ResourceUsage:
    """The resources that a job has used."""

    slot_seconds: float
    recomputed_steps: int


@dataclass(frozen=True)
class JobInfo:
    """A job as it was when it was read. `spec` and `resolved_spec` are in the form of a spec file."""

    name: str
    uid: str
    etag: str
    display_name: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    external_uri: str
    traceparent: str
    queue: str
    priority: str
    spec: Mapping[str, Any] | None
    resolved_spec: Mapping[str, Any] | None
    state: str
    progress: Progress | None
    conditions: tuple[Condition, ...]
    pending: PendingInfo | None
    failure: FailureReport | None
    attempt_count: int
    latest_checkpoint: str
    best_checkpoint: str
    model: str
    output_dataset: str
    last_event_sequence: int
    usage: ResourceUsage | None
    creator: str
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    update_time: datetime | None
    evaluation: Evaluation | None

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rsplit("/", 1)[-1]

    @property
    def is_terminal(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in TERMINAL_STATES


@dataclass(frozen=True)
class Attempt:
    """One launch of a gang."""

    name: str
    state: str
    workers: int
    nodes: tuple[str, ...]
    resumed_from_step: int
    last_step: int
    failure: FailureReport | None
    create_time: datetime | None
    end_time: datetime | None


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint."""

    name: str
    state: str
    attempt: int
    step: int
    size_bytes: int
    metrics: Mapping[str, float]
    path: str
    workers: int
    create_time: datetime | None


@dataclass(frozen=True)
class StateChanged:
    """The job's state changed; `from_state` is `unspecified` in its first event."""

    from_state: str
    to: str
    failure: FailureReport | None
    message: str


@dataclass(frozen=True)
class AttemptChanged:
    """An attempt's state changed."""

    attempt: Attempt | None


@dataclass(frozen=True)
class CheckpointChanged:
    """A checkpoint was `committed`, `deleted`, or found `corrupt`."""

    checkpoint: str
    change: str
    step: int
    size_bytes: int
    message: str


@dataclass(frozen=True)
class Warning:
    """A warning that does not stop the job."""

    reason: str
    message: str
    field: str


@dataclass(frozen=True)
class ModelRegistered:
    """A model was registered; `path` is its folder on the service's storage."""

    model: str
    path: str


@dataclass(frozen=True)
class DatasetRegistered:
    """A data set was registered; `path` is its folder on the service's storage."""

    dataset: str
    path: str


@dataclass(frozen=True)
class PhaseStarted:
    """A slow phase of starting or ending began."""

    phase: str
    message: str


@dataclass(frozen=True)
class CanaryPassed:
    """Everything needed at the end has worked once."""

    duration_s: float


@dataclass(frozen=True)
class JobDeleted:
    """The job was deleted: its last event."""

    principal: str


@dataclass(frozen=True)
class JobUpdated:
    """A user changed these fields of the job, such as `priority`."""

    fields: tuple[str, ...]
    principal: str


Payload = (
    StateChanged
    | AttemptChanged
    | CheckpointChanged
    | Evaluation
    | Progress
    | Condition
    | Warning
    | ModelRegistered
    | PendingInfo
    | JobDeleted
    | PhaseStarted
    | DatasetRegistered
    | CanaryPassed
    | JobUpdated
)


@dataclass(frozen=True)
class Event:
    """One durable event of a job.

    `kind` is one of state, attempt_changed, checkpoint, evaluation, progress, condition, warning, model, pending,
    deleted, phase, dataset, canary, updated; `unknown`, with `data` None, is a kind that a newer service sends.
    `str(event)` is a line for people.
    """

    sequence: int
    id: str
    time: datetime | None
    attempt: int
    kind: str
    data: Payload | None

    @property
    def progress(self) -> Progress | None:
        """The progress, if the event is one."""
        return self.data if isinstance(self.data, Progress) else None

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation, if the event is one."""
        return self.data if isinstance(self.data, Evaluation) else None

    @property
    def state(self) -> str | None:
        """The new state, if the event changed it."""
        return self.data.to if isinstance(self.data, StateChanged) else None

    @property
    def is_terminal(self) -> bool:
        """Whether nothing follows."""
        return self.state in TERMINAL_STATES or isinstance(self.data, JobDeleted)

    def __str__(self) -> str:
        from shardyard._lines import event_line  # Imported here: only needed for printing.

        return event_line(self)


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

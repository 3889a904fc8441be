"""Jobs, their attempts and events: users have them from `shardyard.types`, which says how to read them."""

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

"""The rows of the store as frozen records: what every part of the coordinator passes around.

Bytes are serialised `shardyard.v1` messages, which only `wire` and `encode` open. Times are microseconds since
1970 UTC, 0 if there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final, NamedTuple

from shardyard_coordinator.domain.states import AttemptState, JobState


class EventKind(IntEnum):
    """Kinds of events; the numbers are those of `shardyard.v1.EventKind`."""

    STATE = 1
    ATTEMPT = 2
    CHECKPOINT = 3
    EVALUATION = 4
    PROGRESS = 5
    CONDITION = 6
    WARNING = 7
    MODEL = 8
    PENDING = 9
    DELETED = 10
    PHASE = 11
    DATASET = 12
    CANARY = 13
    UPDATED = 14


@dataclass(frozen=True)
class NewJob:
    """A job to accept. `description` is a Job with only labels, annotations, external_uri and traceparent.

    `attributes` are what filters find in it, by the filters' names. `warnings` are the events of its plan's warnings,
    which follow the first event. `adds` is the part of a stored
    model that it writes, such as `projects/p/models/m/exports/onnx`: one job at a time may; empty: none.
    """

    project: str
    job_id: str
    uid: str
    request_id: str
    fingerprint: bytes
    display_name: str
    labels: Mapping[str, str]
    description: bytes
    queue: str
    priority: int
    task: str
    spec: bytes
    resolved_spec: bytes
    plan: bytes
    workers: int
    gpus_per_worker: int
    cpus_per_worker: int
    uses: tuple[str, ...] = ()
    warnings: tuple[EventDraft, ...] = ()
    adds: str = ""
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class JobRecord:
    """A job's row. `id` orders submissions; `epoch` is the newest attempt, 0 before the first."""

    id: int
    uid: str
    project: str
    job_id: str
    version: int
    display_name: str
    description: bytes
    queue: str
    priority: int
    task: str
    creator: str
    state: JobState
    spec: bytes
    resolved_spec: bytes
    plan: bytes
    workers: int
    gpus_per_worker: int
    cpus_per_worker: int
    epoch: int
    last_sequence: int
    progress: bytes
    evaluation: bytes
    failure: bytes
    pending: bytes
    conditions: bytes
    latest_checkpoint: str
    best_checkpoint: str
    best_value: float | None
    model: str
    output_dataset: str
    slot_seconds: float
    recomputed_steps: int
    last_step: int
    not_before_us: int
    failures: int
    failures_in_row: int
    failure_cause: str
    failure_step: int
    failures_at_step: int
    create_us: int
    start_us: int
    end_us: int
    update_us: int
    waiting_us: int
    deleted_us: int

    @property
    def name(self) -> str:
        """`projects/{project}/jobs/{job}`."""
        return f"projects/{self.project}/jobs/{self.job_id}"

    @property
    def etag(self) -> str:
        """Changes with every change of the row."""
        return f"{self.uid[-8:]}-{self.version}"

    @property
    def slots(self) -> int:
        """Slots that its gang holds: GPUs, or CPU cores if it asks for no GPU."""
        return self.workers * self.slots_per_worker

    @property
    def slots_per_worker(self) -> int:
        """Slots of one worker."""
        return self.gpus_per_worker or self.cpus_per_worker

    def checkpoint_name(self, epoch: int, step: int) -> str:
        """`projects/{project}/jobs/{job}/checkpoints/e{n}-s{step}`."""
        return f"{self.name}/checkpoints/e{epoch}-s{step}"


class QueuedJob(NamedTuple):
    """The columns of a waiting job for the scheduling loop; `position` is its place in line, from 1."""

    id: int
    uid: str
    epoch: int
    version: int
    queue: str
    priority: int
    creator: str
    workers: int
    gpus_per_worker: int
    cpus_per_worker: int
    not_before_us: int
    waiting_us: int
    pending: bytes | None
    position: int

    @property
    def slots_per_worker(self) -> int:
        """Slots of one worker."""
        return self.gpus_per_worker or self.cpus_per_worker


class LineJob(NamedTuple):
    """The columns of a waiting job that decide whether it starts."""

    priority: int
    id: int
    not_before_us: int
    workers: int
    gpus_per_worker: int
    cpus_per_worker: int


class HeldSlots(NamedTuple):
    """The slots of a live attempt: (node, workers on it) pairs, and the slots of a worker."""

    job_uid: str
    epoch: int
    slots_per_worker: int
    placement: tuple[tuple[str, int], ...]


class CreatedJob(NamedTuple):
    """The job of a submission; `existed`: the same request had made it before."""

    job: JobRecord
    existed: bool


@dataclass(frozen=True)
class EventDraft:
    """An event without a sequence yet: `payload` is a JobEvent with only its payload set."""

    kind: EventKind
    payload: bytes
    attempt: int = 0


@dataclass(frozen=True)
class EventRecord:
    """An event of a job: `sequence` is dense in the job, `position` rises over the whole store."""

    position: int
    job_uid: str
    sequence: int
    time_us: int
    attempt: int
    kind: EventKind
    payload: bytes


class LoggedEvent(NamedTuple):
    """An event and the job that it belongs to."""

    record: EventRecord
    project: str
    job_id: str

    @property
    def job_name(self) -> str:
        """`projects/{project}/jobs/{job}`."""
        return f"projects/{self.project}/jobs/{self.job_id}"


class Place(NamedTuple):
    """A place in a project's log: everything up to `position` is known, and every removal up to number `removal`."""

    position: int
    removal: int


class Moved(NamedTuple):
    """A job after a change of its state, and the event of that change."""

    job: JobRecord
    event: EventRecord


MAX_FILTERED_KEY: Final = 256
"""Characters of an annotation's key that filters find it by: PostgreSQL indexes no text of over 2,704 bytes."""


@dataclass(frozen=True)
class Condition:
    """One test of a list: `op` is one of = != < <= > >= and : (has)."""

    field: str
    op: str
    value: str | int


@dataclass(frozen=True)
class AttemptRecord:
    """One launch of a gang. `high_water` is the newest WorkerEvent that was recorded."""

    job_uid: str
    epoch: int
    state: AttemptState
    workers: int
    slots_per_worker: int
    placement: tuple[tuple[str, int], ...]
    nodes: tuple[str, ...]
    cluster_id: str
    export_uid: str
    high_water: int
    resumed_from_step: int
    last_step: int
    committed: int
    failure: bytes
    exported: int
    stop_reason: str
    released: int
    create_us: int
    end_us: int


class CheckpointState(StrEnum):
    """The states of a checkpoint; DELETING is an intention that survives a crash."""

    COMMITTED = "COMMITTED"
    DELETING = "DELETING"
    DELETED = "DELETED"
    CORRUPT = "CORRUPT"


@dataclass(frozen=True)
class CheckpointRecord:
    """A checkpoint; `metrics` is an Evaluation with only its metrics."""

    job_uid: str
    epoch: int
    step: int
    state: CheckpointState
    path: str
    size_bytes: int
    workers: int
    metrics: bytes
    create_us: int


@dataclass(frozen=True)
class MetricPoint:
    """One number of a series."""

    attempt: int
    step: int
    time_us: int
    value: float


@dataclass(frozen=True)
class MetricSeries:
    """One metric's points in the order of their steps; `total_points` before downsampling."""

    metric: str
    points: tuple[MetricPoint, ...]
    total_points: int


class ResourceKind(StrEnum):
    """Kinds of resources; the value is the collection in names."""

    MODEL = "models"
    DATASET = "datasets"


class ResourceState(StrEnum):
    """The states of a model or data set; DELETING is an intention that survives a crash."""

    UPLOADING = "UPLOADING"
    READY = "READY"
    DELETING = "DELETING"


@dataclass(frozen=True)
class FileRecord:
    """A file of a model or data set; `path` is relative."""

    path: str
    size_bytes: int
    sha256: str
    committed_bytes: int = 0


@dataclass(frozen=True)
class NewUpload:
    """A model or data set to add, with its files in the folder `path`."""

    kind: ResourceKind
    project: str
    resource_id: str
    uid: str
    path: str
    display_name: str
    request_id: str
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class ResourceRecord:
    """A model or data set. `description` is a Model with only its descriptive fields."""

    id: int
    uid: str
    kind: ResourceKind
    project: str
    resource_id: str
    state: ResourceState
    display_name: str
    creator: str
    source_job: str
    path: str
    size_bytes: int
    description: bytes
    request_id: str
    create_us: int

    @property
    def name(self) -> str:
        """`projects/{project}/models/{model}`, or datasets."""
        return f"projects/{self.project}/{self.kind.value}/{self.resource_id}"


JOB_FIELDS = tuple(field.name for field in dataclasses.fields(JobRecord))

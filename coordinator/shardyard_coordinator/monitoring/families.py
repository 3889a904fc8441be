"""Every metric of the service as data: docs/monitoring.md, the dashboard's test and the registry are made from it.

Labels have few values, all known in advance: methods, codes, reasons, states, causes. Never a job, a model, a user or a
text of one: each value is a time series that Prometheus keeps.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Buckets of calls: their longest default deadline is a minute."""

LONG_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 28_800.0, 86_400.0, 604_800.0)
"""Buckets of a job's states: from half a second to a week."""

LAG_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Kind(StrEnum):
    """Kinds of metrics, as Prometheus names them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Family(NamedTuple):
    """One metric with all its label values; `buckets` of a histogram in its unit."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


CALLS = Family(
    "shardyard_grpc_calls_total", Kind.COUNTER, "Calls that ended, by gRPC code; streams too.", ("method", "code")
)
CALL_SECONDS = Family(
    "shardyard_grpc_call_duration_seconds",
    Kind.HISTOGRAM,
    "Duration of unary calls, WaitJob excepted; of streams it says nothing.",
    ("method",),
    SHORT_S,
)
CALLS_OPEN = Family(
    "shardyard_grpc_calls_open", Kind.GAUGE, "Calls and streams open now: watchers are `WatchJob`.", ("method",)
)
REFUSALS = Family(
    "shardyard_refusals_total",
    Kind.COUNTER,
    "Calls that were refused, by the reason of errors.md; `INTERNAL` is a defect.",
    ("reason",),
)
EVENTS = Family("shardyard_events_total", Kind.COUNTER, "Events of jobs that were committed.", ("kind",))
JOBS_ENDED = Family("shardyard_jobs_ended_total", Kind.COUNTER, "Jobs that reached a terminal state.", ("state",))
JOBS_CREATED = Family("shardyard_jobs_created_total", Kind.COUNTER, "Jobs that were accepted.")
ATTEMPTS_ENDED = Family(
    "shardyard_attempts_ended_total",
    Kind.COUNTER,
    "Attempts that ended, by the cause of states.md; `none`: without a failure.",
    ("cause",),
)
STATE_SECONDS = Family(
    "shardyard_job_state_seconds",
    Kind.HISTOGRAM,
    "How long jobs were in a state when they left it: in `QUEUED`, the wait for slots; in `PREPARING`, from launch to "
    "the first steps. Entered before this process started: not counted.",
    ("state",),
    LONG_S,
)
LOOP_LAG = Family(
    "shardyard_loop_lag_seconds",
    Kind.HISTOGRAM,
    "How late the event loop ran a timer that is set every second.",
    (),
    LAG_S,
)
OBSERVED = (
    CALLS,
    CALL_SECONDS,
    CALLS_OPEN,
    REFUSALS,
    EVENTS,
    JOBS_CREATED,
    JOBS_ENDED,
    ATTEMPTS_ENDED,
    STATE_SECONDS,
    LOOP_LAG,
)
"""Counted as it happens."""

INFO = Family("shardyard_build_info", Kind.GAUGE, "Always 1; the version is a label.", ("version",))
SERVING = Family("shardyard_serving", Kind.GAUGE, "1 while health says SERVING.")
CENSUS_AGE = Family(
    "shardyard_census_age_seconds",
    Kind.GAUGE,
    "Age of the numbers of jobs, attempts, cluster and storage; it grows while store or cluster do not answer.",
)
JOBS = Family("shardyard_jobs", Kind.GAUGE, "Jobs by state, deleted ones excepted.", ("state",))
QUEUE_SLOTS = Family("shardyard_queue_slots", Kind.GAUGE, "Slots that all waiting jobs ask for.")
QUEUE_AGE = Family(
    "shardyard_queue_oldest_seconds", Kind.GAUGE, "Seconds since the oldest waiting job was created; 0: none waits."
)
ATTEMPTS = Family("shardyard_attempts_live", Kind.GAUGE, "Attempts that have not ended, and hold slots.")
RESOURCES = Family("shardyard_resources", Kind.GAUGE, "Models and data sets, unfinished uploads too.", ("kind",))
RESOURCE_BYTES = Family("shardyard_resource_bytes", Kind.GAUGE, "Bytes of models and data sets.", ("kind",))
CONNECTED = Family("shardyard_cluster_connected", Kind.GAUGE, "1 while the cluster answers.")
NODES = Family("shardyard_cluster_nodes", Kind.GAUGE, "Nodes of the cluster.")
SLOTS = Family("shardyard_slots", Kind.GAUGE, "Slots of the cluster.")
SLOTS_FREE = Family("shardyard_slots_free", Kind.GAUGE, "Slots that no gang holds.")
GPUS = Family("shardyard_gpus", Kind.GAUGE, "GPUs of the cluster.")
GPUS_USED = Family("shardyard_gpus_used", Kind.GAUGE, "GPUs that are held, according to the cluster.")
GPU_BUSY = Family(
    "shardyard_gpu_utilization_ratio",
    Kind.GAUGE,
    "Utilisation of this machine's GPUs, 0 to 1, as NVML reports it; none without GPUs.",
    ("gpu",),
)
GPU_MEMORY = Family(
    "shardyard_gpu_memory_used_bytes", Kind.GAUGE, "Memory in use on this machine's GPUs, as NVML reports it.", ("gpu",)
)
GPU_MEMORY_TOTAL = Family("shardyard_gpu_memory_bytes", Kind.GAUGE, "Memory of this machine's GPUs.", ("gpu",))
RANKS_STARTED = Family(
    "shardyard_ranks_started_total",
    Kind.COUNTER,
    "Ranks without GPUs of gangs that have met: `warm`, as forks of a process that has imported everything, or `cold`, "
    "as processes of their own; the log says why.",
    ("start",),
)
STORAGE_AVAILABLE = Family(
    "shardyard_storage_available", Kind.GAUGE, "1 while the storage is mounted, writable and has room."
)
STORAGE_FREE = Family("shardyard_storage_free_bytes", Kind.GAUGE, "Free bytes of the storage.")
STATE_FREE = Family("shardyard_state_free_bytes", Kind.GAUGE, "Free bytes of the disk with the state directory.")
STORE_BYTES = Family(
    "shardyard_store_bytes", Kind.GAUGE, "Size of SQLite's files: the database, and its write-ahead log.", ("file",)
)
WRITER_WAITING = Family("shardyard_writer_waiting_operations", Kind.GAUGE, "Writes that wait for their commit.")
WRITER_WAITING_BYTES = Family("shardyard_writer_waiting_bytes", Kind.GAUGE, "Their announced size.")
WRITER_OPERATIONS = Family("shardyard_writer_operations_total", Kind.COUNTER, "Writes that were part of a commit.")
WRITER_COMMITS = Family("shardyard_writer_commits_total", Kind.COUNTER, "Transactions of the writer.")
WRITER_FAILED = Family("shardyard_writer_failed_commits_total", Kind.COUNTER, "Transactions that failed as a whole.")
WRITER_SECONDS = Family(
    "shardyard_writer_commit_seconds_total", Kind.COUNTER, "Time in transactions; divide by the commits for the mean."
)
SAMPLED = (
    INFO,
    SERVING,
    CENSUS_AGE,
    JOBS,
    QUEUE_SLOTS,
    QUEUE_AGE,
    ATTEMPTS,
    RESOURCES,
    RESOURCE_BYTES,
    CONNECTED,
    NODES,
    SLOTS,
    SLOTS_FREE,
    GPUS,
    GPUS_USED,
    GPU_BUSY,
    GPU_MEMORY,
    GPU_MEMORY_TOTAL,
    RANKS_STARTED,
    STORAGE_AVAILABLE,
    STORAGE_FREE,
    STATE_FREE,
    STORE_BYTES,
    WRITER_WAITING,
    WRITER_WAITING_BYTES,
    WRITER_OPERATIONS,
    WRITER_COMMITS,
    WRITER_FAILED,
    WRITER_SECONDS,
)
"""Looked up when Prometheus asks, at most every few seconds."""

FAMILIES = OBSERVED + SAMPLED

"""The AttemptSpec of a launch, made from the job, its plan, and the locations on the storage."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from shardyard.v1 import job_pb2, plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.formats import adds_format, folder_of
from shardyard_coordinator.control.locations import locations
from shardyard_coordinator.control.settings import ControlSettings
from shardyard_coordinator.control.spec_walk import walk
from shardyard_coordinator.domain.records import AttemptRecord, CheckpointRecord, JobRecord, ResourceKind
from shardyard_coordinator.launch.node_shape import launch_shape
from shardyard_coordinator.launch.protocols import AttemptKey, ClusterView, Launch
from shardyard_coordinator.store import checkpoints


def build_launch(
    conn: Connection, job: JobRecord, attempt: AttemptRecord, view: ClusterView, settings: ControlSettings
) -> Launch:
    """The launch of an attempt that is recorded. Its resume points are the committed checkpoints of earlier ones.

    Raises: Refused if a model or data set that the job reads is gone.
    """
    spec = spec_pb2.JobSpec.FromString(job.resolved_spec)
    named = walk(spec)
    where = locations(
        conn,
        named.uses,
        data_roots=settings.data_roots,
        torch_hub=settings.torch_hub,
        cache_dir=str(settings.cache_dir),
        claim=settings.claim,
        remotes=[uri for _, uri in named.remotes],
        objects_dir=str(settings.objects_dir),
    )
    # Damaged ones come last: they may be intact again, and without any candidate the run would silently start over.
    found = checkpoints.committed_checkpoints(conn, job.uid) + checkpoints.corrupt_checkpoints(conn, job.uid)
    candidates = [each for each in found if each.epoch < attempt.epoch]
    attempt_spec = worker_pb2.AttemptSpec(
        job_name=job.name,
        job_uid=job.uid,
        epoch=attempt.epoch,
        spec=spec,
        plan=plan_pb2.JobPlan.FromString(job.plan),
        locations=where,
        job_dir=str(settings.job_dir(job.uid)),
        attempt_dir=str(settings.attempt_dir(job.uid, attempt.epoch)),
        export_dir=export_dir(conn, job, attempt, settings),
        resume_candidates=_paths(candidates, settings),
        world_size=attempt.workers,
        threads_per_rank=job.cpus_per_worker,
        # A file: a TCPStore listens on every interface. A launcher that spreads the gang over nodes gives another.
        rendezvous=f"file://{settings.attempt_dir(job.uid, attempt.epoch) / 'rendezvous'}",
        log_interval_s=settings.log_interval_s,
        node_shape=launch_shape(view, attempt.placement),
        traceparent=job_pb2.Job.FromString(job.description).traceparent,
    )
    return Launch(
        key=AttemptKey(job.uid, attempt.epoch),
        spec=attempt_spec.SerializeToString(),
        attempt_dir=attempt_spec.attempt_dir,
        workers=attempt.workers,
        cpus_per_worker=job.cpus_per_worker,
        gpus_per_worker=job.gpus_per_worker,
        placement=attempt.placement,
    )


_KINDS = {
    plan_pb2.JOB_OUTPUT_DATASET: ResourceKind.DATASET,
    plan_pb2.JOB_OUTPUT_METRICS: None,
    plan_pb2.JOB_OUTPUT_FORMAT: None,
    plan_pb2.JOB_OUTPUT_COPY: None,
}
"""By a plan's output; any other output, and an unset one, is a model."""


def output_kind(job: JobRecord) -> ResourceKind | None:
    """The kind of resource that the job makes; None: none."""
    return _KINDS.get(plan_pb2.JobPlan.FromString(job.plan).output, ResourceKind.MODEL)


def export_dir(conn: Connection, job: JobRecord, attempt: AttemptRecord, settings: ControlSettings) -> str:
    """A folder that belongs to the attempt alone, so that a replaced attempt that still writes damages nothing.

    Of a job that adds a format it is that format's in the model, which no other job writes meanwhile.
    Raises: Refused MODEL_NOT_FOUND if that model is gone.
    """
    if adds_format(job):
        return str(folder_of(conn, job))
    kind = output_kind(job)
    if kind is None:  # Nothing is written, and the rank gets no access to the folder of models.
        return str(settings.attempt_dir(job.uid, attempt.epoch) / "result")
    return str(settings.storage / kind.value / attempt.export_uid)


def _paths(candidates: Sequence[CheckpointRecord], settings: ControlSettings) -> list[str]:
    return [str(settings.checkpoint_dir(each.job_uid, each.epoch, each.step)) for each in candidates]

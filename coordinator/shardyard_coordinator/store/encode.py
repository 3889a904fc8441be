"""Records ↔ messages of `shardyard.v1`: how rows become answers, and messages become drafts of events."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from shardyard.v1 import (
    checkpoint_service_pb2,
    dataset_service_pb2,
    event_service_pb2,
    job_pb2,
    model_service_pb2,
    transfer_pb2,
    webhook_service_pb2,
)
from shardyard_coordinator.domain.records import (
    MAX_FILTERED_KEY,
    AttemptRecord,
    CheckpointRecord,
    CheckpointState,
    EventDraft,
    EventKind,
    EventRecord,
    FileRecord,
    JobRecord,
    LoggedEvent,
    ResourceRecord,
)
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.domain.webhooks import DeliveryRecord, WebhookRecord
from shardyard_coordinator.store import bounds

_STATES = {state: job_pb2.State.Value(f"STATE_{state.value}") for state in JobState}
_CHECKPOINT_STATES = {
    CheckpointState.COMMITTED: checkpoint_service_pb2.Checkpoint.STATE_COMMITTED,
    # No run can resume from a checkpoint that is being removed.
    CheckpointState.DELETING: checkpoint_service_pb2.Checkpoint.STATE_DELETED,
    CheckpointState.DELETED: checkpoint_service_pb2.Checkpoint.STATE_DELETED,
    CheckpointState.CORRUPT: checkpoint_service_pb2.Checkpoint.STATE_CORRUPT,
}


def event_to_proto(record: EventRecord) -> job_pb2.JobEvent:
    """The event as clients see it."""
    event = bounds.parsed(job_pb2.JobEvent, record.payload)
    event.sequence = record.sequence
    event.id = f"{record.job_uid}-{record.sequence}"
    event.attempt = record.attempt
    _set(event.time, record.time_us)
    return event


def project_event_to_proto(logged: LoggedEvent, cursor: str) -> event_service_pb2.ProjectEvent:
    """The event with its job, as those who follow a project see it."""
    return event_service_pb2.ProjectEvent(
        cursor=cursor, job=logged.job_name, job_uid=logged.record.job_uid, event=event_to_proto(logged.record)
    )


def attributes_of(job: job_pb2.Job) -> dict[str, str]:
    """What filters find in a job's description, by the filters' names: no filter names a key of more characters."""
    short = {key: value for key, value in job.annotations.items() if len(key) <= MAX_FILTERED_KEY}
    found = {f"annotations.{key}": value for key, value in short.items()}
    if job.external_uri:
        found["external_uri"] = job.external_uri
    return found


def attempt_has_ended(record: EventRecord) -> bool:
    """Whether an event about an attempt reports its end."""
    changed = bounds.parsed(job_pb2.JobEvent, record.payload).attempt_changed
    return changed.attempt.state == job_pb2.Attempt.STATE_ENDED


def job_to_proto(record: JobRecord, *, full: bool = True) -> job_pb2.Job:
    """The job as clients see it; without `full`: without spec, resolved_spec and annotations."""
    job = bounds.parsed(job_pb2.Job, record.description, as_sent=True)
    if full:
        bounds.read_into(job.spec, record.spec, as_sent=True)
        bounds.read_into(job.resolved_spec, record.resolved_spec, as_sent=True)
    else:
        job.annotations.clear()
    job.name, job.uid, job.etag = record.name, record.uid, record.etag
    job.display_name = record.display_name
    job.queue = f"queues/{record.queue}"
    job.priority = bounds.small_count(record.priority)  # type: ignore[assignment]
    job.state = _STATES[record.state]
    if record.conditions:
        job.conditions.extend(bounds.parsed(job_pb2.Job, record.conditions).conditions)
    for part, data in (
        (job.progress, record.progress),
        (job.evaluation, record.evaluation),
        (job.failure, record.failure),
        (job.pending, record.pending if record.state is JobState.QUEUED else b""),
    ):
        if data:
            bounds.read_into(part, data)
    job.attempt_count = bounds.small_count(record.epoch)
    job.latest_checkpoint, job.best_checkpoint = record.latest_checkpoint, record.best_checkpoint
    job.model, job.output_dataset = record.model, record.output_dataset
    job.last_event_sequence = record.last_sequence
    job.usage.slot_seconds, job.usage.recomputed_steps = record.slot_seconds, bounds.count(record.recomputed_steps)
    job.creator = record.creator
    for field, value in (
        (job.create_time, record.create_us),
        (job.start_time, record.start_us),
        (job.end_time, record.end_us),
        (job.update_time, record.update_us),
    ):
        _set(field, value)
    return job


def attempt_to_proto(job: JobRecord, record: AttemptRecord) -> job_pb2.Attempt:
    """The attempt as clients see it."""
    attempt = job_pb2.Attempt(
        name=f"{job.name}/attempts/{record.epoch}",
        state=job_pb2.Attempt.State.Value(f"STATE_{record.state.value}"),
        workers=bounds.small_count(record.workers),
        nodes=record.nodes,
        resumed_from_step=bounds.count(record.resumed_from_step),
        last_step=bounds.count(record.last_step),
    )
    if record.failure:
        bounds.read_into(attempt.failure, record.failure)
    _set(attempt.create_time, record.create_us)
    _set(attempt.end_time, record.end_us)
    return attempt


def checkpoint_to_proto(job: JobRecord, record: CheckpointRecord) -> checkpoint_service_pb2.Checkpoint:
    """The checkpoint as clients see it."""
    checkpoint = checkpoint_service_pb2.Checkpoint(
        name=job.checkpoint_name(record.epoch, record.step),
        state=_CHECKPOINT_STATES[record.state],
        attempt=record.epoch,
        step=record.step,
        size_bytes=bounds.count(record.size_bytes),
        metrics=bounds.parsed(job_pb2.Evaluation, record.metrics).metrics,
        path=record.path,
        workers=bounds.small_count(record.workers),
    )
    _set(checkpoint.create_time, record.create_us)
    return checkpoint


def resource_to_model(record: ResourceRecord, files: Sequence[FileRecord] = ()) -> model_service_pb2.Model:
    """The model as clients see it; lists leave out the files."""
    model = bounds.parsed(model_service_pb2.Model, record.description)
    del model.files[:]
    model.name, model.uid = record.name, record.uid
    model.state = model_service_pb2.Model.State.Value(f"STATE_{record.state.value}")
    model.files.extend(files_to_proto(files))
    model.size_bytes = record.size_bytes
    model.display_name, model.source_job, model.path = record.display_name, record.source_job, record.path
    model.creator = record.creator
    _set(model.create_time, record.create_us)
    return model


def with_export(description: bytes, export: model_service_pb2.ModelExport) -> bytes:
    """A model's description with one more format, in place of the same one before."""
    model = bounds.parsed(model_service_pb2.Model, description)
    kept = [each for each in model.exports if each.format != export.format]
    del model.exports[:]
    model.exports.extend([*kept, export])
    return model.SerializeToString()


def resource_to_dataset(record: ResourceRecord, files: Sequence[FileRecord] = ()) -> dataset_service_pb2.Dataset:
    """The data set as clients see it; lists leave out the files."""
    dataset = dataset_service_pb2.Dataset(
        name=record.name,
        uid=record.uid,
        state=dataset_service_pb2.Dataset.State.Value(f"STATE_{record.state.value}"),
        files=files_to_proto(files),
        size_bytes=record.size_bytes,
        display_name=record.display_name,
        source_job=record.source_job,
        creator=record.creator,
    )
    _set(dataset.create_time, record.create_us)
    return dataset


def webhook_to_proto(record: WebhookRecord, cursor: str) -> webhook_service_pb2.Webhook:
    """The webhook as clients see it, without its secret; `cursor` is its place."""
    state = webhook_service_pb2.Webhook.STATE_ACTIVE
    if record.disabled_us:
        state = webhook_service_pb2.Webhook.STATE_DISABLED
    elif record.suspended_us:
        state = webhook_service_pb2.Webhook.STATE_SUSPENDED
    elif record.failures:
        state = webhook_service_pb2.Webhook.STATE_FAILING
    webhook = webhook_service_pb2.Webhook(
        name=record.name,
        uid=record.uid,
        etag=record.etag,
        url=record.url,
        kinds=sorted(record.kinds),  # type: ignore[arg-type]
        disabled=bool(record.disabled_us),
        state=state,
        message=record.message,
        cursor=cursor,
        failures=bounds.small_count(record.failures),
        creator=record.creator,
    )
    for field, value in (
        (webhook.failing_since, record.failing_since_us),
        (webhook.next_attempt_time, 0 if record.disabled_us or record.suspended_us else record.next_attempt_us),
        (webhook.last_delivery_time, record.last_delivery_us),
        (webhook.create_time, record.create_us),
        (webhook.update_time, record.update_us),
    ):
        _set(field, value)
    return webhook


def delivery_to_proto(record: DeliveryRecord) -> webhook_service_pb2.Delivery:
    """The attempt as clients see it."""
    delivery = webhook_service_pb2.Delivery(
        number=record.number,
        event_id=record.event_id,
        type=record.type,
        attempt=bounds.small_count(record.attempt),
        delivered=record.delivered,
        status=record.status,
        message=record.message,
    )
    _set(delivery.time, record.time_us)
    delivery.duration.FromMicroseconds(max(record.duration_us, 0))
    return delivery


def state_changed(source: JobState | None, target: JobState, *, failure: bytes = b"", message: str = "") -> EventDraft:
    """The event of a change of state; without `source` it is a job's first."""
    change = job_pb2.StateChanged(to=_STATES[target], message=message)
    if source is not None:
        setattr(change, "from", _STATES[source])
    if failure:
        change.failure.ParseFromString(failure)
    return draft(EventKind.STATE, job_pb2.JobEvent(state=change))


def state_after(payload: bytes) -> JobState:
    """The new state in a state event."""
    return JobState(job_pb2.State.Name(job_pb2.JobEvent.FromString(payload).state.to).removeprefix("STATE_"))


def draft(kind: EventKind, event: job_pb2.JobEvent, attempt: int = 0) -> EventDraft:
    """An event to append; only the payload of `event` is used."""
    return EventDraft(kind, event.SerializeToString(), attempt)


def timestamp(us: int) -> Timestamp:
    """Microseconds as a timestamp that every client can read."""
    time = Timestamp()
    _set(time, us)
    return time


def _set(field: Timestamp, us: int) -> None:
    if us:
        seconds, rest = divmod(min(max(us, 0), bounds.MAX_TIME_US), 1_000_000)
        field.seconds, field.nanos = seconds, rest * 1000


def files_to_proto(files: Sequence[FileRecord]) -> list[transfer_pb2.StoredFile]:
    """The files of a model or data set."""
    return [
        transfer_pb2.StoredFile(
            path=file.path, size_bytes=file.size_bytes, sha256=file.sha256, committed_bytes=file.committed_bytes
        )
        for file in sorted(files, key=lambda file: file.path)
    ]

"""Rules of each request: which field holds which name, and rules that the protos cannot express."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

from google.protobuf.message import Message

from shardyard.v1 import choosing_pb2, job_pb2
from shardyard.v1 import dataset_service_pb2 as datasets
from shardyard.v1 import job_service_pb2 as jobs
from shardyard.v1 import metric_service_pb2 as metrics
from shardyard.v1 import model_service_pb2 as models
from shardyard_coordinator.domain.errors import FieldViolation, refused_fields
from shardyard_coordinator.serve.validation import (
    access,
    batches,
    choosing,
    rules,
    sources,
    spec,
    updates,
    uploads,
    walk,
)
from shardyard_coordinator.serve.validation.counts import Counts
from shardyard_coordinator.serve.validation.names import name_complaint
from shardyard_coordinator.serve.validation.naming import NAMES, named
from shardyard_coordinator.serve.validation.text import (
    UID,
    control_complaint,
    id_complaint,
    request_id_complaint,
    show,
)

MAX_ANNOTATION_BYTES: Final = 64 * 1024
MAX_INSTANCE_BYTES: Final = 64 * 1024
MAX_IMAGE_BYTES: Final = 4_000_000
MAX_SHOWN_INSTANCES: Final = 100
_MAX_BATCH: Final = 100
_INPUTS: Final = tuple(field.name for field in models.Instance.DESCRIPTOR.oneofs_by_name["input"].fields)

OUTPUT_ONLY: Final = (
    "name",
    "uid",
    "etag",
    "resolved_spec",
    "state",
    "progress",
    "conditions",
    "pending",
    "failure",
    "attempt_count",
    "latest_checkpoint",
    "best_checkpoint",
    "model",
    "output_dataset",
    "last_event_sequence",
    "usage",
    "creator",
    "create_time",
    "start_time",
    "end_time",
    "update_time",
    "evaluation",
    "traceparent",
)

Found = list[FieldViolation]
_UPLOADS: Final = (models.CreateModelRequest, datasets.CreateDatasetRequest)
# Other checks look at their texts.
_WALKED_BY_THEIR_CHECK: Final = (
    models.PredictRequest,
    models.EmbedRequest,
    models.ExplainPredictionRequest,
    *_UPLOADS,
)
_COUNTS: Final = Counts()
_OURS: Final = "shardyard.v1."


def validate(request: Message) -> None:
    """Raises Refused with every violation of the request; clears what only the server sets."""
    if not request.DESCRIPTOR.full_name.startswith(_OURS):
        return
    for _, each in _with_jobs(request):
        if each.HasField("job"):
            clear_output_only(each.job)
    if found := _COUNTS.violations(request):
        raise refused_fields(found)
    if isinstance(request, jobs.UpdateJobRequest) and (found := updates.narrow_job(request, OUTPUT_ONLY)):
        raise refused_fields(found)
    if found := _sizes(request):
        raise refused_fields(found)
    found = _rules(request)
    if not isinstance(request, _WALKED_BY_THEIR_CHECK):
        found += walk.violations(request)
    _check_name(request, found)
    check = _CHECKS.get(request.DESCRIPTOR.name)
    if check is not None:
        check(request, found)
    if found:
        raise refused_fields(_one_each(found))


def clear_output_only(job: job_pb2.Job) -> None:
    """Drops what only the server sets, so that a job that was read can be submitted again."""
    for name in OUTPUT_ONLY:
        job.ClearField(name)


def _one_each(found: Found) -> Found:
    """The first violation of each field."""
    first: dict[str, FieldViolation] = {}
    for violation in found:
        first.setdefault(violation.field, violation)
    return list(first.values())


def _rules(request: Message) -> Found:
    """The rules of the protos."""
    if isinstance(request, _UPLOADS):
        return uploads.rules_of_upload(request)
    found = rules.violations(request)
    if isinstance(request, jobs.UpdateJobRequest):
        # Of the spec there is only what changes.
        changed = {f"job.{path}" for path in updates.LIVE}
        found = [each for each in found if not each.field.startswith("job.spec") or each.field in changed]
    return found


def _with_jobs(request: Message) -> list[tuple[str, jobs.CreateJobRequest | jobs.PlanJobRequest]]:
    """The jobs to be that a request has, each with the beginning of its fields' paths; of too many the first ones."""
    if isinstance(request, jobs.CreateJobRequest | jobs.PlanJobRequest):
        return [("", request)]
    if isinstance(request, jobs.BatchCreateJobsRequest):
        return [(f"requests[{at}].", each) for at, each in enumerate(request.requests[:_MAX_BATCH])]
    return []


def _sizes(request: Message) -> Found:
    """Messages that are too large to be checked."""
    if isinstance(request, models.ExportModelRequest) and (size := request.data.ByteSize()) > spec.MAX_SPEC_BYTES:
        text = f"{size:,} bytes; data has at most {spec.MAX_SPEC_BYTES:,}; leave out what is not needed"
        return [FieldViolation("data", text)]
    if isinstance(request, jobs.UpdateJobRequest):
        return annotation_sizes(request.job)
    found: Found = []
    for prefix, each in _with_jobs(request):
        if (size := each.job.spec.ByteSize()) > spec.MAX_SPEC_BYTES:
            text = f"{size:,} bytes; a spec has at most {spec.MAX_SPEC_BYTES:,}; leave out what is not needed"
            found.append(FieldViolation(f"{prefix}job.spec", text))
        found += annotation_sizes(each.job, prefix)
    return found


def annotation_sizes(job: job_pb2.Job, prefix: str = "") -> Found:
    """The violation of annotations that are too large, if they are."""
    size = sum(len(key.encode()) + len(value.encode()) for key, value in job.annotations.items())
    if size <= MAX_ANNOTATION_BYTES:
        return []
    text = f"{size:,} bytes; annotations have at most {MAX_ANNOTATION_BYTES:,} in all; shorten them"
    return [FieldViolation(f"{prefix}job.annotations", text)]


def _check_name(request: Message, found: Found) -> None:
    known = NAMES.get(request.DESCRIPTOR.name)
    if known is not None and (complaint := name_complaint(known[1], named(request, known[0]))):
        found.append(FieldViolation(known[0], complaint))


def _check_create(request: jobs.CreateJobRequest, found: Found) -> None:
    if request.HasField("job_id") and (complaint := id_complaint(request.job_id)):
        found.append(FieldViolation("job_id", f"{complaint}; or leave job_id out to have one made"))
    if complaint := request_id_complaint(request.request_id, required=False):
        found.append(FieldViolation("request_id", complaint))
    _check_job(request, found)


def _check_job(request: jobs.CreateJobRequest | jobs.PlanJobRequest, found: Found) -> None:
    if not request.HasField("job"):
        return
    _check_described(request.job, found)
    if request.job.HasField("spec"):
        found += spec.violations(request.job.spec)


def _check_update(request: jobs.UpdateJobRequest, found: Found) -> None:
    if not request.HasField("job"):
        return
    _check_described(request.job, found)
    spec.check_run_time(request.job.spec, "job.spec", found)


def _check_described(job: job_pb2.Job, found: Found) -> None:
    """A job's fields beside its spec."""
    if complaint := control_complaint(job.display_name):
        found.append(FieldViolation("job.display_name", complaint))
    for key, value in job.labels.items():
        if complaint := control_complaint(key) or control_complaint(value):
            found.append(FieldViolation(f'job.labels["{_plain(key)}"]', complaint))
    if job.external_uri and (complaint := _uri_complaint(job.external_uri)):
        found.append(FieldViolation("job.external_uri", complaint))
    if job.queue and (complaint := id_complaint(job.queue.removeprefix("queues/"))):
        found.append(FieldViolation("job.queue", f"{complaint}; or leave it out for `queues/default`"))


def _check_batch_create(request: jobs.BatchCreateJobsRequest, found: Found) -> None:
    batches.check_batch_create(request, found, _check_create)


def _plain(text: str) -> str:
    return "".join("�" if not each.isprintable() else each for each in text[:64])


def _uri_complaint(uri: str) -> str | None:
    rule = "it must be an http or https link with a host, such as `https://example.org/runs/1`"
    if complaint := control_complaint(uri):
        return complaint
    try:
        parts = urlsplit(uri)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        good = False
    return None if good and " " not in uri else f"{show(uri)} is not allowed: {rule}; correct it"


def _check_list_jobs(request: jobs.ListJobsRequest, found: Found) -> None:
    if complaint := control_complaint(request.filter):
        found.append(FieldViolation("filter", complaint))


def _check_watch(request: jobs.WatchJobRequest, found: Found) -> None:
    if request.job_uid and not UID.fullmatch(request.job_uid):
        text = f"{show(request.job_uid)} is not a uid of 32 lower-case hexadecimal digits; use that of the first answer"
        found.append(FieldViolation("job_uid", text))


def _check_wait(request: jobs.WaitJobRequest, found: Found) -> None:
    if request.timeout.seconds < 0 or request.timeout.nanos < 0:
        seconds = request.timeout.seconds + request.timeout.nanos / 1e9
        text = f"`{seconds:g} s` is under 0; give 0 to 60 s, or leave it out for 60 s"
        found.append(FieldViolation("timeout", text))


def _check_metrics(request: metrics.QueryMetricsRequest | metrics.WatchMetricsRequest, found: Found) -> None:
    for at, name in enumerate(request.metrics):
        if not re.fullmatch(r"[A-Za-z0-9_./-]{1,128}", name):
            text = f"{show(name)} is not a metric's name of 1 to 128 of a-z, A-Z, 0-9 and _ . / -; correct it"
            found.append(FieldViolation(f"metrics[{at}]", text))
    if not isinstance(request, metrics.QueryMetricsRequest):
        return
    if request.HasField("max_points") and request.max_points < 3:
        text = f"{show(request.max_points)} is under 3 (minimum, maximum and last); give 3 or more, or leave it out"
        found.append(FieldViolation("max_points", text))
    if request.max_step and request.max_step < request.min_step:
        text = f"{show(request.max_step)} is under min_step {request.min_step}; give at least that, or 0 for no end"
        found.append(FieldViolation("max_step", text))


def _check_instances(request: models.PredictRequest | models.EmbedRequest, found: Found) -> None:
    before = len(found)
    for at, instance in enumerate(request.instances):
        if complaint := _instance_complaint(instance):
            found.append(FieldViolation(f"instances[{at}]", complaint))
            if len(found) - before >= MAX_SHOWN_INSTANCES:
                return


def _check_instance(request: models.ExplainPredictionRequest, found: Found) -> None:
    if request.HasField("instance") and (complaint := _instance_complaint(request.instance)):
        found.append(FieldViolation("instance", complaint))


def _instance_complaint(instance: models.Instance) -> str | None:
    kind = instance.WhichOneof("input")
    if kind is None:
        return f"has no input; set one of {', '.join(_INPUTS)}"
    size = instance.ByteSize()
    if kind == "image":
        if (size := len(instance.image)) > MAX_IMAGE_BYTES:
            return f"{size:,} bytes; a picture has at most {MAX_IMAGE_BYTES:,}; make it smaller"
    elif size > MAX_INSTANCE_BYTES:
        return f"{size:,} bytes; an instance has at most {MAX_INSTANCE_BYTES:,} (64 KiB); split or shorten it"
    return None


def _check_export(request: models.ExportModelRequest, found: Found) -> None:
    if request.HasField("job_id") and (complaint := id_complaint(request.job_id)):
        found.append(FieldViolation("job_id", f"{complaint}; or leave job_id out to have one made"))
    if complaint := request_id_complaint(request.request_id, required=False):
        found.append(FieldViolation("request_id", complaint))
    if request.HasField("data"):
        found += spec.data_violations(request, "data")


def _check_copy(request: models.CopyModelRequest, found: Found) -> None:
    if request.HasField("job_id") and (complaint := id_complaint(request.job_id)):
        found.append(FieldViolation("job_id", f"{complaint}; or leave job_id out to have one made"))
    if complaint := request_id_complaint(request.request_id, required=False):
        found.append(FieldViolation("request_id", complaint))
    found += sources.check_target("uri", request.uri)


def _check_choosing(request: choosing_pb2.RecommendModelsRequest, found: Found) -> None:
    found += choosing.violations(request)


def _check_download(request: Any, found: Found) -> None:
    if not request.path:
        found.append(FieldViolation("path", "is missing; name one of the files that Get lists"))
    elif complaint := sources.relative_path_complaint(request.path):
        found.append(FieldViolation("path", complaint))


_CHECKS: Final[dict[str, Callable[[Any, Found], None]]] = {
    "CreateJobRequest": _check_create,
    "PlanJobRequest": _check_job,
    "UpdateJobRequest": _check_update,
    "BatchCreateJobsRequest": _check_batch_create,
    "BatchCancelJobsRequest": batches.check_batch_cancel,
    "WatchEventsRequest": batches.check_watch_events,
    "CreateWebhookRequest": batches.check_create_webhook,
    "UpdateWebhookRequest": batches.check_update_webhook,
    "ListJobsRequest": _check_list_jobs,
    "WatchJobRequest": _check_watch,
    "WaitJobRequest": _check_wait,
    "QueryMetricsRequest": _check_metrics,
    "WatchMetricsRequest": _check_metrics,
    "PredictRequest": _check_instances,
    "EmbedRequest": _check_instances,
    "ExplainPredictionRequest": _check_instance,
    "ExportModelRequest": _check_export,
    "CopyModelRequest": _check_copy,
    "RecommendModelsRequest": _check_choosing,
    "DownloadModelRequest": _check_download,
    "DownloadDatasetRequest": _check_download,
    **access.CHECKS,
    "CreateModelRequest": uploads.check_upload,
    "CreateDatasetRequest": uploads.check_upload,
}

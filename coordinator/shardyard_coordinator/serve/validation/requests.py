"""Rules of each request: which field holds which name, and rules that the protos cannot express."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

from google.protobuf.message import Message

from shardyard.v1 import choosing_pb2, job_pb2, transfer_pb2
from shardyard.v1 import dataset_service_pb2 as datasets
from shardyard.v1 import job_service_pb2 as jobs
from shardyard.v1 import metric_service_pb2 as metrics
from shardyard.v1 import model_service_pb2 as models
from shardyard_coordinator.domain.errors import FieldViolation, refused_fields
from shardyard_coordinator.serve.validation import choosing, rules, spec, walk
from shardyard_coordinator.serve.validation.counts import Counts
from shardyard_coordinator.serve.validation.names import name_complaint
from shardyard_coordinator.serve.validation.sources import relative_path_complaint
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
_INPUTS: Final = tuple(field.name for field in models.Instance.DESCRIPTOR.oneofs_by_name["input"].fields)
# The answer lists the same files with their progress, and clients accept 4 MiB.
MAX_HEADER_BYTES: Final = 3 * 1024 * 1024
MAX_HEADER_VIOLATIONS: Final = 100
_FILES_AT_ONCE: Final = 50

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
)

_NAMES: Final[dict[str, tuple[str, str]]] = {
    "CreateJobRequest": ("parent", "project"),
    "GetJobRequest": ("name", "job"),
    "ListJobsRequest": ("parent", "project"),
    "DeleteJobRequest": ("name", "job"),
    "PlanJobRequest": ("parent", "project"),
    "WaitJobRequest": ("name", "job"),
    "CancelJobRequest": ("name", "job"),
    "PauseJobRequest": ("name", "job"),
    "ResumeJobRequest": ("name", "job"),
    "WatchJobRequest": ("name", "job"),
    "ListAttemptsRequest": ("parent", "job"),
    "TailLogsRequest": ("name", "job"),
    "QueryMetricsRequest": ("name", "job"),
    "WatchMetricsRequest": ("name", "job"),
    "GetCheckpointRequest": ("name", "checkpoint"),
    "ListCheckpointsRequest": ("parent", "job"),
    "GetModelRequest": ("name", "model"),
    "ListModelsRequest": ("parent", "project"),
    "DeleteModelRequest": ("name", "model"),
    "DownloadModelRequest": ("name", "model"),
    "PredictRequest": ("model", "model"),
    "EmbedRequest": ("model", "model"),
    "ExplainPredictionRequest": ("model", "model"),
    "ExportModelRequest": ("model", "model"),
    "RecommendModelsRequest": ("parent", "project"),
    "GetDatasetRequest": ("name", "dataset"),
    "ListDatasetsRequest": ("parent", "project"),
    "DeleteDatasetRequest": ("name", "dataset"),
    "DownloadDatasetRequest": ("name", "dataset"),
}

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
    if isinstance(request, jobs.CreateJobRequest | jobs.PlanJobRequest) and request.HasField("job"):
        clear_output_only(request.job)
    if found := _COUNTS.violations(request):
        raise refused_fields(found)
    if found := _sizes(request):
        raise refused_fields(found)
    found = _rules_of_upload(request) if isinstance(request, _UPLOADS) else rules.violations(request)
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


def _sizes(request: Message) -> Found:
    """Messages that are too large to be checked."""
    if isinstance(request, models.ExportModelRequest) and (size := request.data.ByteSize()) > spec.MAX_SPEC_BYTES:
        text = f"{size:,} bytes; data has at most {spec.MAX_SPEC_BYTES:,}; leave out what is not needed"
        return [FieldViolation("data", text)]
    if not isinstance(request, jobs.CreateJobRequest | jobs.PlanJobRequest) or not request.HasField("job"):
        return []
    found = []
    if (size := request.job.spec.ByteSize()) > spec.MAX_SPEC_BYTES:
        text = f"{size:,} bytes; a spec has at most {spec.MAX_SPEC_BYTES:,}; leave out what is not needed"
        found.append(FieldViolation("job.spec", text))
    annotations = sum(len(key.encode()) + len(value.encode()) for key, value in request.job.annotations.items())
    if annotations > MAX_ANNOTATION_BYTES:
        text = f"{annotations:,} bytes; annotations have at most {MAX_ANNOTATION_BYTES:,} in all; shorten them"
        found.append(FieldViolation("job.annotations", text))
    return found


def _check_name(request: Message, found: Found) -> None:
    known = _NAMES.get(request.DESCRIPTOR.name)
    if known is not None and (complaint := name_complaint(known[1], getattr(request, known[0]))):
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
    job = request.job
    if complaint := control_complaint(job.display_name):
        found.append(FieldViolation("job.display_name", complaint))
    for key, value in job.labels.items():
        if complaint := control_complaint(key) or control_complaint(value):
            found.append(FieldViolation(f'job.labels["{_plain(key)}"]', complaint))
    if job.external_uri and (complaint := _uri_complaint(job.external_uri)):
        found.append(FieldViolation("job.external_uri", complaint))
    if job.queue and (complaint := id_complaint(job.queue.removeprefix("queues/"))):
        found.append(FieldViolation("job.queue", f"{complaint}; or leave it out for `queues/default`"))
    if job.HasField("spec"):
        found += spec.violations(job.spec)


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


def _check_choosing(request: choosing_pb2.RecommendModelsRequest, found: Found) -> None:
    found += choosing.violations(request)


def _check_download(request: Any, found: Found) -> None:
    if not request.path:
        found.append(FieldViolation("path", "is missing; name one of the files that Get lists"))
    elif complaint := relative_path_complaint(request.path):
        found.append(FieldViolation("path", complaint))


def _rules_of_upload(request: models.CreateModelRequest | datasets.CreateDatasetRequest) -> Found:
    """The rules of the protos, of a few files at a time: reporting the errors of 100,000 files takes seconds.

    The first 100 violations are enough.
    """
    files = request.header.files
    if len(files) <= _FILES_AT_ONCE:
        return rules.violations(request)
    if (size := request.header.ByteSize()) > MAX_HEADER_BYTES:
        text = f"{size:,} bytes in {len(files):,} files; a header has at most {MAX_HEADER_BYTES:,} (3 MiB); "
        return [FieldViolation("header.files", text + "join small files into fewer")]
    found: Found = []
    for at in range(0, len(files), _FILES_AT_ONCE):
        part = transfer_pb2.UploadHeader(files=files[at : at + _FILES_AT_ONCE])
        if at == 0:
            part.display_name = request.header.display_name
        found += [_shifted(each, at) for each in rules.violations(part)]
        if len(found) >= MAX_HEADER_VIOLATIONS:
            return found[:MAX_HEADER_VIOLATIONS]
    return found


def _shifted(violation: FieldViolation, at: int) -> FieldViolation:
    """Moves the index of a violation from a part of the header to the whole header."""
    field = _FILE_INDEX.sub(lambda index: f"files[{int(index[1]) + at}]", violation.field)
    return dataclasses.replace(violation, field=f"header.{field}")


_FILE_INDEX: Final = re.compile(r"^files\[([0-9]+)\]")


def _check_upload(request: models.CreateModelRequest | datasets.CreateDatasetRequest, found: Found) -> None:
    if request.WhichOneof("message") == "header":
        _check_header(request.header, found)


def _check_header(header: transfer_pb2.UploadHeader, found: Found) -> None:
    if complaint := name_complaint("project", header.parent):
        found.append(FieldViolation("header.parent", complaint))
    if complaint := id_complaint(header.resource_id):
        found.append(FieldViolation("header.resource_id", complaint))
    if complaint := request_id_complaint(header.request_id, required=True):
        found.append(FieldViolation("header.request_id", complaint))
    if complaint := control_complaint(header.display_name):
        found.append(FieldViolation("header.display_name", complaint))
    if len(found) >= MAX_HEADER_VIOLATIONS or any(each.field == "header.files" for each in found):
        return
    seen: set[str] = set()
    folders = {parent for file in header.files for parent in _parents(file.path)}
    for at, file in enumerate(header.files):
        complaint = relative_path_complaint(file.path) if file.path else None
        if complaint is None and file.path in seen:
            complaint = f"duplicate path {show(file.path)}; leave one out"
        if complaint is None and file.path in folders:
            complaint = f"{show(file.path)} is a file and a folder at once; rename one"
        if complaint is not None:
            found.append(FieldViolation(f"header.files[{at}].path", complaint))
            if len(found) >= MAX_HEADER_VIOLATIONS:
                return
        seen.add(file.path)


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: at + 1]) for at in range(min(len(parts), 64))]


_CHECKS: Final[dict[str, Callable[[Any, Found], None]]] = {
    "CreateJobRequest": _check_create,
    "PlanJobRequest": _check_job,
    "ListJobsRequest": _check_list_jobs,
    "WatchJobRequest": _check_watch,
    "WaitJobRequest": _check_wait,
    "QueryMetricsRequest": _check_metrics,
    "WatchMetricsRequest": _check_metrics,
    "PredictRequest": _check_instances,
    "EmbedRequest": _check_instances,
    "ExplainPredictionRequest": _check_instance,
    "ExportModelRequest": _check_export,
    "RecommendModelsRequest": _check_choosing,
    "DownloadModelRequest": _check_download,
    "DownloadDatasetRequest": _check_download,
    "CreateModelRequest": _check_upload,
    "CreateDatasetRequest": _check_upload,
}

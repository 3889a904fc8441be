"""Rows of the catalogue of bad inputs: a request, and what it must be answered with."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf import duration_pb2

from helpers.service import PARENT, a_spec, create
from shardyard.v1 import job_pb2, spec_pb2
from shardyard.v1 import job_service_pb2 as jobs

IA, NF, PD = "INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED"
OUT, FP, ABORTED = "OUT_OF_RANGE", "FAILED_PRECONDITION", "ABORTED"
CORPUS = f"{PARENT}/datasets/corpus"
STORY = f"{PARENT}/jobs/story"


def job(**changes: Any) -> job_pb2.Job:
    return a_spec(**{"spec__train_data__dataset": CORPUS, **changes})


def submission(job_id: str | None = None, request_id: str = "", **changes: Any) -> jobs.CreateJobRequest:
    return create(job_id, job(**changes), request_id=request_id)


@dataclass(frozen=True)
class Row:
    """A request, and what it must be answered with. `words` must stand in the violation's message."""

    request: Callable[[], Any]
    code: str
    reason: str
    field: str | None
    words: tuple[str, ...] = ()


def spec_row(field: str, *words: str, reason: str = "SPEC_INVALID", code: str = IA, **changes: Any) -> Row:
    """A job with changes, refused for one field of the request."""
    return Row(lambda: submission(**changes), code, reason, field, words)


def edited(edit: Callable[[job_pb2.Job], object], field: str, *words: str, reason: str = "SPEC_INVALID") -> Row:
    """A job that was edited by a function."""

    def make() -> jobs.CreateJobRequest:
        request = submission()
        edit(request.job)
        return request

    return Row(make, IA, reason, field, words)


def id_row(job_id: str, *words: str) -> Row:
    return Row(lambda: submission(job_id), IA, "SPEC_INVALID", "job_id", words)


def uri_row(uri: str, *words: str, reason: str = "PATH_NOT_ALLOWED") -> Row:
    return edited(lambda made: setattr(made.spec.model, "uri", uri), "job.spec.model.uri", *words, reason=reason)


def get_row(name: str, *words: str, code: str = IA, reason: str = "SPEC_INVALID", field: str | None = "name") -> Row:
    return Row(lambda: jobs.GetJobRequest(name=name), code, reason, field, words)


def number(path: str, value: Any, *words: str) -> Row:
    return spec_row("job.spec." + path.replace("__", "."), *words, **{"spec__" + path: value})


def model_row(field: str, *words: str, reason: str = "SPEC_INVALID", **source: Any) -> Row:
    model = spec_pb2.ModelSource(**source)
    return edited(lambda made: made.spec.model.CopyFrom(model), f"job.spec.model.{field}", *words, reason=reason)


def hub_row(field: str, *words: str, reason: str = "SPEC_INVALID", **values: str) -> Row:
    model = spec_pb2.TorchHubModel(**{"repo": "/hub", "entrypoint": "resnet18", **values})
    return model_row(f"torch_hub.{field}", *words, reason=reason, torch_hub=model)


def adapter_row(field: str, *words: str, reason: str = "SPEC_INVALID", **parts: Any) -> Row:
    return model_row(f"adapter.{field}", *words, reason=reason, adapter=spec_pb2.AdaptedModel(**parts))


def deep(levels: int) -> spec_pb2.Architecture:
    made = spec_pb2.Architecture(model_type="gpt2")
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    made.overrides.update(value)
    return made


def labelled(count: int, key: str = "", value: str = "v") -> Callable[[job_pb2.Job], None]:
    def edit(made: job_pb2.Job) -> None:
        for at in range(count):
            made.labels[key if count == 1 else f"k{at}"] = value

    return edit


def remove(path: str) -> Callable[[job_pb2.Job], None]:
    def edit(made: job_pb2.Job) -> None:
        *above, last = path.split(".")
        owner: Any = made
        for name in above:
            owner = getattr(owner, name)
        owner.ClearField(last)

    return edit


def extraction(made: job_pb2.Job) -> None:
    made.spec.feature_extraction.data.dataset = CORPUS


def classification(**fields: Any) -> dict[str, Any]:
    return {"spec__fine_tuning__text_classification": spec_pb2.TextClassification(**fields)}


ROWS: dict[str, Row] = {
    # Ids and names.
    "1 an empty id": id_row("", "empty", "leave job_id out"),
    "2 upper case": id_row("A-job", "`A-job`", "upper case A", "`a-job`"),
    "3 dash first": id_row("-job", "`-job`", "first or last", "`job`"),
    "3 dash last": id_row("job-", "first or last"),
    "4 digit first": id_row("1job", "begins with 1", "letter"),
    "5 64 characters": id_row("a" * 64, "64 characters", "63"),
    "6 a path": id_row("../../etc/passwd", "U+002E"),
    "7 percent": id_row("job%2f..", "U+0025"),
    "8 NUL": id_row("job\x00x", "U+0000"),
    "9 line break": id_row("job\r\nx-evil: 1", "U+000D"),
    "10 an umlaut": id_row("jöb", "U+00F6"),
    "10 Cyrillic": id_row("јob", "U+0458"),
    "11 a taken id": Row(lambda: submission("story"), "ALREADY_EXISTS", "JOB_EXISTS", None, ("story",)),
    "12 no right": Row(lambda: jobs.ListJobsRequest(parent="projects/nope"), PD, "ACCESS_DENIED", None, ("nope",)),
    "12 no right, by name": get_row("projects/nope/jobs/x", code=PD, reason="ACCESS_DENIED", field=None),
    "13 parent without collection": Row(
        lambda: jobs.ListJobsRequest(parent="default"), IA, "SPEC_INVALID", "parent", ("`default`", "projects/")
    ),
    "14 a name with more": get_row(STORY + "/extra", "projects/{project}/jobs/{job}"),
    "15 100 kB": get_row("projects/" + "p" * 100_000, "…"),
    "a name that is not there": get_row(
        f"{PARENT}/jobs/nope", "nope", code=NF, reason="JOB_NOT_FOUND", field=None
    ),
    "16 a long display name": spec_row("job.display_name", "1000 characters", "128", display_name="x" * 1000),
    "17 ESC": spec_row("job.display_name", "U+001B", display_name="\x1b[31mred"),
    "19 65 labels": edited(labelled(65), "job.labels", "65", "64"),
    "20 an empty key": edited(labelled(1), 'job.labels[""]'),
    "21 a long value": edited(labelled(1, "team", "v" * 64), 'job.labels["team"]', "64 characters", "63"),
    "22 annotations": edited(
        lambda made: made.annotations.update({f"k{at}": "v" * 1024 for at in range(65)}), "job.annotations", "65,536"
    ),
    "23 javascript": spec_row("job.external_uri", "javascript", "http", external_uri="javascript:alert(1)"),
    "24 no such queue": spec_row("job.queue", "nope", reason="QUEUE_NOT_FOUND", code=NF, queue="nope"),
    # Request ids.
    "26 not a UUID": Row(lambda: submission(request_id="abc"), IA, "SPEC_INVALID", "request_id", ("`abc`", "UUID")),
    "27 nil": Row(lambda: submission(request_id=str(uuid.UUID(int=0))), IA, "SPEC_INVALID", "request_id", ("UUID",)),
    "31 a stale etag": Row(
        lambda: jobs.CancelJobRequest(name=STORY, etag="other"), ABORTED, "ETAG_MISMATCH", None, ("other",)
    ),
    "38 delete while queued": Row(
        lambda: jobs.DeleteJobRequest(name=STORY), FP, "INVALID_STATE", None, ("QUEUED", "cancel")
    ),
    "40 resume what is not there": Row(
        lambda: jobs.ResumeJobRequest(name=f"{PARENT}/jobs/nope"), NF, "JOB_NOT_FOUND", None, ("nope",)
    ),
    "40 resume without a name": Row(jobs.ResumeJobRequest, IA, "SPEC_INVALID", "name", ("missing", "jobs/my-job")),
    "41 pause with a stale etag": Row(
        lambda: jobs.PauseJobRequest(name=STORY, etag="other"), ABORTED, "ETAG_MISMATCH", None, ("other",)
    ),
    "41 pause in another project": Row(
        lambda: jobs.PauseJobRequest(name="projects/nope/jobs/x"), PD, "ACCESS_DENIED", None, ("nope",)
    ),
    # Task and model.
    "no job": Row(lambda: jobs.CreateJobRequest(parent=PARENT), IA, "SPEC_INVALID", "job", ("required",)),
    "no spec": Row(lambda: create(job=job_pb2.Job(display_name="x")), IA, "SPEC_INVALID", "job.spec", ("required",)),
    "44 no task": edited(remove("spec.pretraining"), "job.spec.task", "pretraining, fine_tuning, feature_extraction"),
    "44 no objective": edited(
        remove("spec.pretraining.causal_lm"), "job.spec.pretraining.objective", "causal_lm, masked_lm"
    ),
    "46 an unknown enum value": spec_row("job.priority", "unknown value 99", "PRIORITY_HIGH", priority=99),
    "47 no model": edited(remove("spec.model"), "job.spec.model", "hub, uri, model, architecture"),
    "47 no source": edited(remove("spec.model.architecture"), "job.spec.model.source"),
    "48 a hub id": number("model__hub__id", "a/b/c", "`a/b/c`", "owner/name"),
    "48 a hub id that climbs": number("model__hub__id", "../x", "owner/name"),
    "52 a local path": uri_row("/etc/passwd", "/etc/passwd", "data root"),
    "53 dots": uri_row("/data/../etc", ".."),
    "54 file": uri_row("file:///etc/passwd"),
    "56 a device": uri_row("/dev/zero"),
    "57 an address": uri_row("http://169.254.169.254/", "http", reason="ADDRESS_NOT_ALLOWED"),
    "57 a bucket": uri_row("s3://bucket/x", "s3", reason="ADDRESS_NOT_ALLOWED"),
    "58 chained": uri_row("simplecache::s3://bucket/x", "chained", reason="ADDRESS_NOT_ALLOWED"),
    "a relative path": uri_row("data/x", "absolute"),
    "82 a model of another project": Row(
        lambda: submission(spec__model__model="projects/nope/models/m"), PD, "ACCESS_DENIED", "job.spec.model.model",
        ("nope",),
    ),
    "a model that is not there": Row(
        lambda: submission(spec__model__model=f"{PARENT}/models/nope"), NF, "MODEL_NOT_FOUND", "job.spec.model.model",
        ("nope", "upload it first"),
    ),
    "a model's name": number("model__model", "bert", "`bert`", "projects/{project}/models/{model}"),
    "a hub repository without a commit": hub_row("repo", "`main` is not a commit", repo="owner/name:main"),
    "a hub repository of two commits": hub_row("revision", "leave one", repo="a/b:" + "1" * 40, revision="2" * 40),
    "a hub repository that is nowhere": hub_row("repo", "`resnet`", "owner/name:commit", repo="resnet"),
    "a hub folder that climbs": hub_row("repo", "..", reason="PATH_NOT_ALLOWED", repo="/data/../hub"),
    "a hub function that is hidden": hub_row("entrypoint", "`_make`", "torch.hub", repo="/hub", entrypoint="_make"),
    "a hub function on two lines": hub_row("entrypoint", "control character", repo="/hub", entrypoint="a\nb"),
    "no model type": number("model__architecture__model_type", "", "fill"),
    "125 overrides 17 deep": spec_row(
        "job.spec.model.architecture.overrides", "17 levels", "16", spec__model__architecture=deep(17)
    ),
    "125 overrides of 65 KiB": Row(
        lambda: submission(spec__model__architecture=_wide()), IA, "SPEC_INVALID",
        "job.spec.model.architecture.overrides", ("65,536",),
    ),
    "a spec of 300 KiB": spec_row(
        "job.spec", "262,144", **classification(labels=[f"{at:064}" for at in range(4_500)])
    ),
    # Numbers.
    "86 a negative learning rate": number("optimization__learning_rate", -1e-4, "`-0.0001`", "0"),
    "87 NaN": number("optimization__learning_rate", math.nan, "`nan`", "finite"),
    "88 infinity": number("optimization__learning_rate", math.inf, "`inf`", "finite"),
    "91 no steps": number("optimization__max_steps", 0, "`0`", "1"),
    "92 negative steps": number("optimization__max_steps", -1, "`-1`"),
    "94 no duration": edited(
        remove("spec.optimization"), "job.spec.optimization.duration", "max_steps, epochs"
    ),
    "96 an empty batch": number("optimization__global_batch_size", 0, "1"),
    "101 warm-up": number("optimization__warmup_ratio", 1.5, "`1.5`", "1"),
    "102 weight decay": number("optimization__weight_decay", -1.0),
    "104 seed": number("optimization__seed", -1),
    "105 fp16": spec_row(
        "job.spec.optimization.precision", "bf16", reason="PRECISION_UNSUPPORTED",
        spec__optimization__precision=spec_pb2.PRECISION_FP16,
    ),
    "108 max_length": spec_row(
        "job.spec.fine_tuning.text_classification.max_length", "`0`", **classification(max_length=0)
    ),
    "109 smoothing": spec_row(
        "job.spec.fine_tuning.text_classification.label_smoothing", "`1`", **classification(label_smoothing=1.0)
    ),
    "110 mask probability": spec_row(
        "job.spec.pretraining.masked_lm.mask_probability",
        spec__pretraining=spec_pb2.Pretraining(masked_lm=spec_pb2.MaskedLm(mask_probability=0)),
    ),
    "111 no workers": number("resources__workers", 0, "1"),
    "112 too many workers": Row(
        lambda: submission(spec__resources__workers=10_000), FP, "TOO_LARGE_FOR_CLUSTER",
        "job.spec.resources.workers", ("10000", "8"),
    ),
    "113 too many GPUs": Row(
        lambda: submission(spec__resources__gpus_per_worker=16), FP, "TOO_LARGE_FOR_CLUSTER",
        "job.spec.resources.gpus_per_worker", ("16 GPUs",),
    ),
    "116 no run time": number("max_run_time", duration_pb2.Duration(), "10 years"),
    "116 negative run time": number("max_run_time", duration_pb2.Duration(seconds=-1), "10 years"),
    "116 400 years": number("max_run_time", duration_pb2.Duration(seconds=400 * 366 * 86_400), "10 years"),
    "117 signs": number("max_run_time", duration_pb2.Duration(seconds=1, nanos=-1), "sign"),
    "an adapter without a base": adapter_row("base", "it is required", folder=spec_pb2.AdapterFolder(uri="/lora")),
    "an adapter without a folder": adapter_row("folder", "it is required", base=spec_pb2.BaseModel(uri="/base")),
    "an adapter of nothing": adapter_row(
        "folder.source", "hub, uri, dataset", folder=spec_pb2.AdapterFolder(), base=spec_pb2.BaseModel(uri="/base")
    ),
    "an adapter's path": adapter_row(
        "folder.uri", "`lora`", reason="PATH_NOT_ALLOWED",
        folder=spec_pb2.AdapterFolder(uri="lora"), base=spec_pb2.BaseModel(uri="/base"),
    ),
    "a base's name": adapter_row(
        "base.model", "`mine`", folder=spec_pb2.AdapterFolder(uri="/lora"), base=spec_pb2.BaseModel(model="mine")
    ),
    "a base of the Hub": adapter_row(
        "base.hub.id", "is not a Hub id", folder=spec_pb2.AdapterFolder(uri="/lora"),
        base=spec_pb2.BaseModel(hub=spec_pb2.HubModel(id="a/b/c")),
    ),
    "118 checkpoints.every": number("checkpoints__every", 0),
    "119 keep_last": number("checkpoints__keep_last", 0),
    "120 retry.max": number("retry__max", -1),
    "120 retry.max, large": number("retry__max", 1_000_000, "100"),
    "121 priority 7": spec_row("job.priority", "unknown value 7", priority=7),
    "zero stage": number("parallelism__zero_stage", 4, "3"),
    "a vocabulary under the bytes": number("tokenizer__train__vocab_size", 100, "259"),
    # Data.
    "no training data": edited(remove("spec.train_data"), "job.spec.train_data", "required"),
    "no data source": edited(remove("spec.train_data.dataset"), "job.spec.train_data.source", "uri, dataset"),
    "data set that is not there": Row(
        lambda: submission(spec__train_data__dataset=f"{PARENT}/datasets/nope"), NF, "DATASET_NOT_FOUND",
        "job.spec.train_data.dataset", ("nope", "upload it first"),
    ),
    "133 one column twice": edited(
        lambda made: made.spec.train_data.columns.update(text="x", label="x"),
        "job.spec.train_data.columns.text", "`x`",
    ),
    "144 duplicate labels": spec_row(
        "job.spec.fine_tuning.text_classification.labels", "`a`", "duplicate", **classification(labels=["a", "a"])
    ),
    "a path in a data set": number("train_data__path", "../x", "`../x`", "relative"),
    "a delimiter of two": number("train_data__delimiter", "ab"),
    "extraction with training data": edited(extraction, "job.spec.train_data", "feature_extraction.data"),
}  # fmt: skip


def _wide() -> spec_pb2.Architecture:
    made = spec_pb2.Architecture(model_type="gpt2")
    made.overrides.update({f"k{at}": "v" * 1000 for at in range(70)})
    return made

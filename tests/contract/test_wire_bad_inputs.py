"""The catalogue of bad inputs: a row a test. Code, reason, field, and a message with value, rule and next step.

After every row the service still serves and nothing was written.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from helpers import bad_calls, bad_inputs
from helpers.bad_inputs import STORY, classification, submission
from helpers.service import PARENT, Service, refused, serving
from helpers.uploads import send_dataset
from shardyard.v1 import job_pb2
from shardyard.v1 import job_service_pb2 as jobs
from shardyard.v1 import model_service_pb2 as models

ROWS = bad_inputs.ROWS | bad_calls.ROWS


@pytest.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    (folder / "data").mkdir()
    (folder / "data" / "a.txt").write_text("hello\n")
    (folder / "data" / "out").symlink_to("/etc/passwd")
    async with serving(folder, data_roots=(str(folder / "data"),)) as running:
        await send_dataset(running, "corpus", {"a.txt": b"hello\n"})
        await running.jobs.CreateJob(submission("story"))
        yield running


def call(service: Service, request: Any) -> Any:
    """The call that takes such a request; of a stream, its first answer."""
    name = type(request).__name__.removesuffix("Request")
    for stub in (service.jobs, service.logs, service.metrics, service.checkpoints, service.models, service.datasets):
        if hasattr(stub, name):
            made = getattr(stub, name)(request)
            return made.read() if hasattr(made, "read") else made
    raise AssertionError(f"no method takes {name}")


@pytest.mark.parametrize("row", ROWS)
async def test_a_bad_input_is_refused(service: Service, row: str) -> None:
    expected = ROWS[row]
    before = await service.store.read(_rows)
    failure = await refused(call(service, expected.request()))
    assert (failure.code.name, failure.reason) == (expected.code, expected.reason), failure
    message = failure.message
    if expected.field is not None:
        assert expected.field in failure.violations, failure
        message = failure.violations[expected.field]
        assert len(failure.violations) == 1, failure
    for word in expected.words:
        assert word in message
    assert await service.store.read(_rows) == before
    assert (await service.jobs.GetJob(jobs.GetJobRequest(name=STORY))).name == STORY


def _rows(conn: Any) -> list[int]:
    tables = ("job", "event", "request", "resource", "resource_file")
    return [conn.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar() for table in tables]


ACCEPTED = {
    "18 markup": {"display_name": "<script>"},
    "85 a learning rate of 0": {"spec__optimization__learning_rate": 0.0},
    "89 a subnormal": {"spec__optimization__learning_rate": 1e-320},
    "103 no clipping": {"spec__optimization__clip": 0.0},
    "99 any batch without a micro batch": {"spec__resources__workers": 3, "spec__optimization__global_batch_size": 64},
    "seconds and nanos": {"spec__max_run_time": duration_pb2.Duration(seconds=1, nanos=1)},
    "a queue by name": {"queue": "queues/default"},
}


@pytest.mark.parametrize("row", ACCEPTED)
async def test_what_is_right_is_accepted(service: Service, row: str) -> None:
    request = submission(**ACCEPTED[row])
    request.validate_only = True
    made = await service.jobs.CreateJob(request)
    assert made.spec == request.job.spec and made.uid == ""


@pytest.mark.parametrize("job_id", ["con", "nul", "a", "a" * 63, "x-1"])
async def test_ids_that_are_right_are_accepted(service: Service, job_id: str) -> None:
    request = submission(job_id)
    request.validate_only = True
    assert (await service.jobs.CreateJob(request)).name == f"{PARENT}/jobs/{job_id}"


async def test_a_link_out_of_the_data_root_is_refused(service: Service) -> None:
    root = service.parts.data_roots[0]
    failure = await refused(service.jobs.CreateJob(submission(spec__train_data__uri=f"{root}/out")))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PATH_NOT_ALLOWED")
    inside = submission(spec__train_data__uri=f"{root}/a.txt")
    inside.validate_only = True
    await service.jobs.CreateJob(inside)


async def test_a_name_that_is_not_utf8_affects_no_other_call(service: Service) -> None:
    folder = Path(service.parts.data_roots[0], "odd")
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("x\n")
    request = submission(spec__train_data__uri=str(folder))
    request.validate_only = True
    made = await service.jobs.CreateJob(request)
    assert made.resolved_spec.train_data.uri == str(folder)  # What is in the files is the planner's business.


async def test_the_allowed_root_is_not_revealed(service: Service) -> None:
    failure = await refused(service.jobs.CreateJob(submission(spec__train_data__uri="/etc/passwd")))
    assert service.parts.data_roots[0] not in str(failure)


async def test_all_violations_come_at_once(service: Service) -> None:
    request = submission("A", spec__optimization__learning_rate=math.nan, spec__resources__workers=0)
    request.job.spec.ClearField("model")
    request.parent = "default"
    failure = await refused(service.jobs.CreateJob(request))
    assert set(failure.violations) == {
        "parent",
        "job_id",
        "job.spec.model",
        "job.spec.optimization.learning_rate",
        "job.spec.resources.workers",
    }
    assert failure.metadata["violations_total"] == "5"


async def test_everything_that_cannot_be_read_is_reported_together(service: Service) -> None:
    request = submission(spec__train_data__dataset=f"{PARENT}/datasets/nope", spec__model__model=f"{PARENT}/models/no")
    request.job.spec.eval_data.uri = "/etc/passwd"
    failure = await refused(service.jobs.CreateJob(request))
    assert failure.reasons == {
        "job.spec.model.model": "MODEL_NOT_FOUND",
        "job.spec.train_data.dataset": "DATASET_NOT_FOUND",
        "job.spec.eval_data.uri": "PATH_NOT_ALLOWED",
    }


async def test_control_characters_reach_no_terminal(service: Service) -> None:
    request = submission()
    request.job.annotations["\x1b[31m"] = "\0"
    failure = await refused(service.jobs.CreateJob(request))
    assert list(failure.violations) == ['job.annotations["U+001B[31m"]'] and "\x1b" not in failure.message


async def test_four_hundred_violations_fit_into_the_details(service: Service) -> None:
    request = models.PredictRequest(model="m", instances=[models.Instance() for _ in range(400)])
    failure = await refused(service.models.Predict(request))
    assert failure.reason == "SPEC_INVALID" and failure.violations
    request = submission(**classification(labels=[""] * 400))
    failure = await refused(service.jobs.CreateJob(request))
    assert int(failure.metadata["violations_total"]) == 401 and 0 < len(failure.violations) < 400


async def test_names_of_other_projects_are_answered_alike_whether_they_exist_or_not(service: Service) -> None:
    answers = [
        await refused(service.jobs.GetJob(jobs.GetJobRequest(name=f"projects/{project}/jobs/x")))
        for project in ("nope", "secret")
    ]
    assert len({answer.message.replace("secret", "nope") for answer in answers}) == 1


async def test_a_count_over_its_limit_is_found_without_looking_at_the_items(service: Service) -> None:
    request = models.PredictRequest(model="m", instances=[models.Instance() for _ in range(200_000)])
    failure = await refused(service.models.Predict(request))
    assert list(failure.violations) == ["instances"]


def raw(service: Service, path: str) -> Callable[..., Any]:
    return service.channel.unary_unary(path, request_serializer=None, response_deserializer=None)


def nested(levels: int) -> bytes:
    """A CreateJobRequest with an override of so many levels."""
    data = b""
    for number in [1, 6] * (levels // 2) + [2]:
        data = field(number, data)
    for number in (1, 2, 4, 10, 10, 3):
        data = field(number, data)
    return data


def field(number: int, data: bytes) -> bytes:
    size, length = len(data), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


@pytest.mark.parametrize("data", [b"\xff" * 40, b"\x0a\x02\xff\xfe", b"\x0a\x7f", b"\x0b" * 200, nested(200)])
async def test_bytes_that_are_not_a_message_are_refused(service: Service, data: bytes) -> None:
    for method in ("CreateJob", "GetJob"):
        failure = await refused(raw(service, f"/shardyard.v1.JobService/{method}")(data))
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failure.reason == "MALFORMED_REQUEST" or (method, len(data) > 300) == ("GetJob", True)


async def test_an_unknown_method_is_unimplemented(service: Service) -> None:
    for path in ("/shardyard.v1.JobService/Nope", "/nope/Nope"):
        failure = await refused(raw(service, path)(b""))
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNIMPLEMENTED, "METHOD_UNKNOWN")


async def test_an_unknown_field_is_ignored(service: Service) -> None:
    data = jobs.GetJobRequest(name=STORY).SerializeToString() + b"\xfa\x3f\x03abc"
    answer = await raw(service, "/shardyard.v1.JobService/GetJob")(data)
    assert job_pb2.Job.FromString(answer).name == STORY


async def test_a_message_over_four_mebibytes_is_refused_by_the_transport(service: Service) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.jobs.GetJob(jobs.GetJobRequest(name="x" * 5 * 1024 * 1024))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_deadline_in_the_past_has_no_effect(service: Service) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.jobs.CreateJob(submission("late"), timeout=-1)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gone = await refused(service.jobs.GetJob(jobs.GetJobRequest(name=f"{PARENT}/jobs/late")))
    assert gone.reason == "JOB_NOT_FOUND"


async def test_a_defect_is_reported_by_an_id_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_request: bytes) -> bytes:
        raise RuntimeError("secret")

    async with serving(tmp_path, answers={"shardyard_trainer.planning.plan:plan": broken}) as service:
        await send_dataset(service, "corpus", {"a.txt": b"hello\n"})
        failure = await refused(service.jobs.CreateJob(submission("story")))
        assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert "secret" not in str(failure) and failure.metadata["error_id"] in caplog.text

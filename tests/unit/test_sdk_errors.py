"""Errors, retries, names and numbers: the parts of the SDK that need no connection."""

from __future__ import annotations

import base64
from datetime import datetime, timedelta

import pytest
from google.rpc import error_details_pb2, status_pb2

from shardyard import errors
from shardyard._files import package
from shardyard._lines import curve, metrics_line, moment, printable, size, span
from shardyard._names import full_name
from shardyard._requests import batches, set_parameters
from shardyard._retry import Patience, is_loopback, retry_delay
from shardyard.types import FailureReport, StateChanged


class RpcError(Exception):
    """What a call raises, in the shape of grpc.RpcError."""

    def __init__(self, code: str, trailers: object) -> None:
        self._code = type("Code", (), {"name": code})()
        self._trailers = trailers

    def code(self) -> object:
        return self._code

    def details(self) -> str:
        return "words"

    def trailing_metadata(self) -> object:
        return self._trailers


def trailer(*details: object) -> tuple[str, bytes]:
    status = status_pb2.Status(code=3, message="words")
    for detail in details:
        status.details.add().Pack(detail)  # type: ignore[arg-type]
    return errors.STATUS_DETAILS_KEY, status.SerializeToString()


def test_every_code_has_a_class_of_its_own() -> None:
    codes = ["INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "PERMISSION_DENIED",
             "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "ABORTED", "OUT_OF_RANGE", "DATA_LOSS", "DEADLINE_EXCEEDED",
             "CANCELLED", "UNIMPLEMENTED", "UNAVAILABLE", "INTERNAL"]  # fmt: skip
    for code in codes:
        made = errors.from_rpc(RpcError(code, ()))
        assert made.code == code and type(made) is not errors.RequestError
    assert type(errors.from_rpc(RpcError("UNKNOWN", None))) is errors.RequestError


def test_all_details_of_a_status_are_read() -> None:
    info = error_details_pb2.ErrorInfo(reason="SPEC_INVALID", metadata={"a": "b"})
    request = error_details_pb2.BadRequest()
    request.field_violations.add(field="job.spec", description="required", reason="SPEC_INVALID")
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    made = errors.from_rpc(RpcError("INVALID_ARGUMENT", (trailer(info, request, retry),)))
    assert (made.reason, made.metadata, made.retry_after) == ("SPEC_INVALID", {"a": "b"}, 1.5)
    assert made.violations == (errors.Violation("job.spec", "required", "SPEC_INVALID"),)
    assert made.to_dict()["violations"][0]["field"] == "job.spec"


@pytest.mark.parametrize("value", [b"\xff\xff", "not base64!", base64.b64encode(b"\xff").decode()])
def test_details_that_are_none_leave_code_and_message(value: object) -> None:
    made = errors.from_rpc(RpcError("NOT_FOUND", ((errors.STATUS_DETAILS_KEY, value),)))
    assert (made.message, made.reason) == ("words", "")


def test_the_tree_has_three_levels() -> None:
    for name in ("InvalidArgument", "Unavailable", "JobFailed"):
        kind = getattr(errors, name)
        assert kind.__mro__.index(errors.ShardyardError) == 2


def test_patience_waits_as_long_as_requested_and_restarts_after_progress() -> None:
    patience = Patience(60, "here")
    asked = errors.ResourceExhausted("x", reason="TOO_MANY_WATCHERS", retry_after=7)
    assert patience.after(asked) >= 7
    for _ in range(30):
        assert patience.after(errors.Unavailable("x")) <= 10
    patience.progressed()
    assert patience.after(errors.Unavailable("x")) <= 0.1


@pytest.mark.parametrize(
    "error",
    [
        errors.NotFound("x", reason="JOB_NOT_FOUND"),
        errors.Internal("x", reason="INTERNAL"),
        errors.ResourceExhausted("x", reason="QUOTA_EXCEEDED"),
        errors.ResourceExhausted("x"),
    ],
)
def test_an_error_that_another_try_cannot_fix_is_raised_at_once(error: errors.RequestError) -> None:
    with pytest.raises(type(error)):
        Patience(60, "here").after(error)


def test_a_broken_transport_is_tried_again() -> None:
    assert Patience(60, "here").after(errors.Internal("RST_STREAM")) >= 0


def test_a_unary_call_is_repeated_only_when_the_service_says_when() -> None:
    away = errors.Unavailable("x", reason="INSPECTION_UNAVAILABLE", retry_after=2)
    assert 2 <= (retry_delay(away, 0, 60) or 0) <= 2.5
    assert retry_delay(away, 59, 60) is None
    assert retry_delay(away, 59, 300) is None, "whoever waits for one call has to hear of it"
    assert retry_delay(errors.Unavailable("x", reason="DRAINING"), 0, 60) is None


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/x", "unix-abstract:x", "127.9.9.9:1"]
)
def test_addresses_of_this_machine(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["10.0.0.1:1", "example.com:1", "0.0.0.0:1", "localhost.example.com:1", "[::]:1"])
def test_addresses_of_others(address: str) -> None:
    assert not is_loopback(address)


def test_names_are_read_short_and_in_full() -> None:
    assert full_name("p", "jobs", "j") == "projects/p/jobs/j"
    assert full_name("p", "jobs", "projects/q/jobs/j") == "projects/q/jobs/j"
    with pytest.raises(errors.InvalidArgument):
        full_name("p", "jobs", "projects/q/models/j")


def test_an_upload_id_is_of_the_content_alone(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "a.txt").write_text("same")
    assert package(folder / "one", "datasets").resource_id == package(folder / "two", "datasets").resource_id
    (folder / "two" / "a.txt").write_text("other")
    assert package(folder / "one", "datasets").resource_id != package(folder / "two", "datasets").resource_id


def test_batches_keep_the_order_and_their_limits() -> None:
    found = list(batches(["x"] * 2500))
    assert [(start, len(batch)) for start, batch in found] == [(0, 1000), (1000, 1000), (2000, 500)]


def test_predict_options_of_two_tasks_are_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="do not go together"):
        from shardyard.v1 import model_service_pb2

        set_parameters(model_service_pb2.PredictRequest(), {"threshold": 0.1, "temperature": 0.5})


def test_lines_for_people() -> None:
    assert curve([3.0, 2.0, 1.0]) == "█▅▁" or curve([3.0, 2.0, 1.0])[0] == "█"
    assert curve([1.0, 1.0]) == "▁▁" and curve([]) == ""
    assert curve([1.0, float("nan"), 2.0, float("inf"), -float("inf"), 1e308, -1e308]) == "▁█"
    assert curve([float("nan")]) == ""
    assert (span(3723), span(42), size(1536), size(3)) == ("1:02:03", "0:42", "1.5 KiB", "3 B")
    assert printable("a\x1b[31mb") == "a\\x1b[31mb"


def test_a_time_of_another_day_has_its_date() -> None:
    noon = datetime(2026, 3, 4, 12).astimezone()
    assert moment(noon, now=noon + timedelta(hours=3)) == "12:00:00"
    assert moment(noon, now=noon + timedelta(hours=13)) == "2026-03-04 12:00:00"
    assert moment(None) == "--:--:--"


def test_a_failure_in_an_event_names_rank_and_step() -> None:
    from shardyard._lines import describe
    from shardyard.types import Event

    failure = FailureReport("WORKER_LOST", "It is gone.", "It goes on.", 1, 1, 40, "", {})
    event = Event(3, "x-3", None, 1, "state", StateChanged("running", "recovering", failure, ""))
    assert describe(event) == "running → recovering (WORKER_LOST on rank 1 at step 40: It is gone. It goes on.)"


def test_a_requested_wait_is_reported_at_once_and_not_started_if_it_is_longer_than_the_patience(
    caplog: pytest.LogCaptureFixture,
) -> None:
    full = errors.Unavailable("the storage has 0 free", reason="STORAGE_FULL", retry_after=60.0)
    assert Patience(300, "here").after(full) >= 60
    [told] = caplog.messages
    assert "the storage has 0 free" in told and "300 s" in told
    with pytest.raises(errors.Unavailable):
        Patience(5, "here").after(full)


def test_of_many_metrics_those_of_single_classes_are_only_counted() -> None:
    by_class = {f"f1_{name}": 0.5 for name in "ABCDEFGHIJKL"}
    assert metrics_line({"f1": 0.7, "loss": 0.25, **by_class}) == "f1 0.7  loss 0.25  and 12 more"
    assert metrics_line({"f1": 0.7, "f1_A": 0.5}) == "f1 0.7  f1_A 0.5"

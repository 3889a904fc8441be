"""Submitting, listing, waiting, asking, and what errors carry."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format

from helpers.script import Failure, Script
from helpers.scripted_service import a_job, serving
from helpers.served import free_port
from helpers.slow_link import slow_link
from shardyard import (
    AsyncClient,
    Client,
    Data,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    JobCancelled,
    JobFailed,
    JobSpec,
    NotFound,
    Optimization,
    Prediction,
    Resources,
    TextClassification,
    Unavailable,
)
from shardyard.types import TokenCandidate
from shardyard.v1 import job_pb2, log_service_pb2, metric_service_pb2, model_service_pb2


def submit(client: Client, **options: object) -> object:
    return client.submit(
        TextClassification(pooling="mean"),
        model="hub:owner/bert@abc",
        train_data=Data("server:/data/train.csv", text="review"),
        optimization=Optimization(epochs=2),
        resources=Resources(workers=2),
        **options,  # type: ignore[arg-type]
    )


def test_a_submitted_spec_arrives_with_a_request_id_that_makes_it_safe_to_repeat() -> None:
    script = Script()
    with serving(script) as address, Client(address) as client:
        job = submit(client, job_id="mine", priority="high", labels={"team": "nlp"})
    request = script.asked("CreateJob")[0]
    assert job.name == "projects/default/jobs/mine"  # type: ignore[attr-defined]
    assert uuid.UUID(request.request_id).version == 4
    assert request.job.priority == job_pb2.PRIORITY_HIGH
    assert request.job.spec.model.hub.revision == "abc"
    assert request.job.spec.train_data.uri == "/data/train.csv"
    assert request.job.spec.resources.workers == 2
    assert dict(request.job.labels) == {"team": "nlp"}


def test_an_unset_job_id_is_not_sent() -> None:
    script = Script()
    with serving(script) as address, Client(address) as client:
        submit(client)
    assert not script.asked("CreateJob")[0].HasField("job_id")


def test_inspection_that_is_not_ready_is_waited_for_with_the_same_request_id() -> None:
    away = Failure(grpc.StatusCode.UNAVAILABLE, "INSPECTION_UNAVAILABLE", retry_after_s=0.01)
    script = Script(failures={"CreateJob": [away] * 12})
    with serving(script) as address, Client(address) as client:
        submit(client)
    assert len({request.request_id for request in script.asked("CreateJob")}) == 1
    assert len(script.asked("CreateJob")) == 13


def test_every_violation_of_a_refused_job_is_carried() -> None:
    failure = Failure(
        grpc.StatusCode.INVALID_ARGUMENT,
        "SPEC_INVALID",
        "job.spec.optimization.epochs: 0 (and 1 more)",
        violations=[
            ("job.spec.optimization.epochs", "`0` is not over 0", "SPEC_INVALID"),
            ("job.spec.model", "required", "SPEC_INVALID"),
        ],
    )
    script = Script(failures={"CreateJob": [failure]})
    with serving(script) as address, Client(address) as client, pytest.raises(InvalidArgument) as caught:
        submit(client)
    assert [violation.field for violation in caught.value.violations] == [
        "job.spec.optimization.epochs",
        "job.spec.model",
    ]
    assert caught.value.reason == "SPEC_INVALID"


def test_jobs_come_from_all_pages_with_filter_and_order() -> None:
    script = Script(jobs=[a_job(f"projects/default/jobs/j{number}") for number in range(5)])
    with serving(script) as address, Client(address) as client:
        found = [job.id for job in client.jobs(filter="state = running", order_by="create_time desc")]
    assert found == ["j0", "j1", "j2", "j3", "j4"]
    assert {(request.filter, request.order_by) for request in script.asked("ListJobs")} == {
        ("state = running", "create_time desc")
    }


async def test_the_async_client_does_the_same() -> None:
    script = Script(jobs=[a_job(f"projects/default/jobs/j{number}") for number in range(3)])
    with serving(script) as address:
        async with AsyncClient(address) as client:
            job = await client.submit(JobSpec(TextClassification(), model="hub:bert"), job_id="mine")
            assert job.state == "queued"
            assert [found.id async for found in client.jobs()] == ["j0", "j1", "j2"]
            assert (await client.server_info()).version == "0.1.0"


def test_waiting_returns_the_job_that_succeeded() -> None:
    script = Script(job=a_job(state=job_pb2.STATE_SUCCEEDED))
    with serving(script) as address, Client(address) as client:
        assert client.job("story").wait().state == "succeeded"


def test_waiting_for_a_job_that_fails_raises_its_reason() -> None:
    job = a_job(state=job_pb2.STATE_FAILED)
    job.failure.reason, job.failure.message, job.failure.next_step = "DATA_CHANGED", "It changed.", "Submit again."
    with serving(Script(job=job)) as address, Client(address) as client:
        with pytest.raises(JobFailed, match=r"DATA_CHANGED: It changed\. Submit again\.") as caught:
            client.job("story").wait()
        assert client.job("story").wait(check=False).state == "failed"
    assert caught.value.reason == "DATA_CHANGED"


def test_waiting_for_a_cancelled_job_says_so() -> None:
    script = Script(job=a_job(state=job_pb2.STATE_CANCELLED))
    with serving(script) as address, Client(address) as client, pytest.raises(JobCancelled):
        client.job("story").wait()


def test_waiting_gives_up_after_its_timeout() -> None:
    with serving(Script(job=a_job())) as address, Client(address) as client, pytest.raises(DeadlineExceeded):
        client.job("story").wait(timeout=0.05)


def test_a_missing_job_is_not_found() -> None:
    with serving(Script(job=a_job())) as address, Client(address) as client, pytest.raises(NotFound) as caught:
        client.job("nope")
    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "JOB_NOT_FOUND")


def test_the_error_of_a_missing_service_says_what_to_start() -> None:
    with Client("127.0.0.1:1", reconnect_for=0) as client, pytest.raises(Unavailable, match="shardyard serve"):
        client.server_info()


def test_logs_continue_at_their_cursor_after_a_cut() -> None:
    lines = [log_service_pb2.LogLine(attempt=1, rank=0, text=f"line {n}", stream=1, level=2) for n in range(5)]
    script = Script(job=a_job(), log_lines=lines, log_cuts=[2, 1])
    with serving(script) as address, Client(address) as client:
        found = [line.text for line in client.job("story").logs(follow=True, level="info", tail=5)]
    assert found == [f"line {n}" for n in range(5)]
    asked = script.asked("TailLogs")
    assert [request.cursor for request in asked] == ["", "2", "3"]
    assert [request.tail_lines for request in asked] == [5, 0, 0]


def test_metrics_attempts_and_checkpoints_read_as_data() -> None:
    series = metric_service_pb2.MetricSeries(metric="loss", total_points=1)
    series.points.add(attempt=1, step=3, value=0.5)
    with serving(Script(job=a_job(), series=[series])) as address, Client(address) as client:
        job = client.job("story")
        assert job.metrics("loss")["loss"].points[0].value == 0.5
        assert next(iter(job.watch_metrics())).metric == "loss"
        assert job.attempts()[0].state == "ended"
        assert job.checkpoints()[0].step == 10
        assert job.cancel().state == "cancelling"
        job.delete()


def _answers_at_once_after(outage_s: float) -> bool:
    port, script = free_port(), Script()
    with Client(f"127.0.0.1:{port}") as client:
        with serving(script, port=port):
            client.server_info()
        with pytest.raises(Unavailable):
            client.server_info()
        time.sleep(outage_s)
        with serving(script, port=port):
            return client.server_info().version == "0.1.0"


def test_a_call_right_after_a_restart_has_its_answer_however_long_the_service_was_away() -> None:
    # Many, because a channel that waits long between two tries may have one at the right moment.
    outages_s = [0.0, *(5.0 + tenth / 10 for tenth in range(0, 45, 4))]
    with ThreadPoolExecutor(len(outages_s)) as pool:
        assert all(pool.map(_answers_at_once_after, outages_s))


def test_a_service_behind_a_slow_link_is_reached() -> None:
    # gRPC ends a try to connect after `grpc.min_reconnect_backoff_ms`, which is longer than this.
    with (
        serving(Script()) as address,
        slow_link(address, first_answer_s=0.8) as far,
        Client(far, reconnect_for=0) as client,
    ):
        assert client.server_info().version == "0.1.0"


@pytest.mark.parametrize("text_bytes", [1_000, 2_000_000])
def test_a_call_is_repeated_however_large_its_request_is(text_bytes: int) -> None:
    away = [Failure(grpc.StatusCode.UNAVAILABLE)] * 2
    script = Script(ready={"m"}, predict=classify, failures={"Predict": away})
    with serving(script) as address, Client(address) as client:
        assert len(client.model("m").predict(["x" * text_bytes])) == 1
    assert len(script.asked("Predict")) == 3


def test_a_plan_reads_as_data() -> None:
    with serving(Script()) as address, Client(address) as client:
        plan = client.plan(TextClassification(), model="hub:bert", optimization=Optimization(max_steps=10))
    assert plan.batch is not None and plan.batch.global_batch_size == 32
    assert plan.memory is not None and plan.memory.verdict == "fits"
    assert plan.resolved_spec is not None and plan.resolved_spec["optimization"] == {"max_steps": 10}


def classify(instance: model_service_pb2.Instance) -> model_service_pb2.Prediction:
    made = model_service_pb2.Prediction(logits=[0.0, 1.0])
    made.classification.label = "good" if "cute" in instance.text else "bad"
    made.classification.scores.add(label="good", score=0.75)
    return made


def test_predictions_come_in_the_order_asked_over_split_calls() -> None:
    script = Script(ready={"m"}, predict=classify, most_instances=3)
    with serving(script) as address, Client(address) as client:
        model = client.model("m")
        answers = model.predict(["so cute", "no"] * 5)
    assert [answer.label for answer in answers] == ["good", "bad"] * 5
    assert answers[0].score == 0.75
    assert len(script.asked("Predict")) > 3


def output_of(text: str) -> dict[str, object]:
    """What a model of another task answers to each text."""
    return {
        "multi": {"classification": {"labels": ["b", "a"], "scores": [{"label": "b", "score": 0.9}, {"label": "a"}]}},
        "none": {"classification": {"scores": [{"label": "a", "score": 0.25}]}},
        "zero": {"regression": {}, "logits": [0.5]},
        "silent": {"generated_text": ""},
        "masks": {"masked_tokens": {"masks": [{"candidates": [{"token": "x", "token_id": 3, "score": 0.5}]}, {}]}},
        "newer": {},
    }[text]


def test_the_answers_of_every_task_are_read_into_their_fields() -> None:
    def predict(instance: model_service_pb2.Instance) -> model_service_pb2.Prediction:
        return json_format.ParseDict(output_of(instance.text), model_service_pb2.Prediction())

    with serving(Script(ready={"m"}, predict=predict)) as address, Client(address) as client:
        answers = client.model("m").predict(["multi", "none", "zero", "silent", "masks", "newer"])
    assert answers == [
        Prediction(labels=("b", "a"), scores={"b": 0.9, "a": 0.0}),
        Prediction(scores={"a": 0.25}),
        Prediction(value=0.0, logits=(0.5,)),
        Prediction(text=""),
        Prediction(masks=((TokenCandidate("x", 3, 0.5),), ())),
        Prediction(),
    ]
    assert list(answers[0].scores) == ["b", "a"]


def test_large_inputs_are_split_under_the_message_limit() -> None:
    script = Script(ready={"m"}, predict=classify)
    with serving(script) as address, Client(address) as client:
        answers = client.model("m").predict(["x" * 60_000] * 120)
    assert len(answers) == 120
    assert len(script.asked("Predict")) == 3


def test_a_bad_instance_is_named_by_the_callers_index() -> None:
    bad = Failure(
        grpc.StatusCode.INVALID_ARGUMENT,
        "SPEC_INVALID",
        "instances[7]: too long",
        violations=[("instances[7].text", "too long", "SPEC_INVALID")],
    )
    script = Script(ready={"m"}, predict=classify, failures={"Predict": []})
    with serving(script) as address, Client(address) as client:
        model = client.model("m")
        model.predict(["warm"])
        script.failures["Predict"] = [Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "RESPONSE_TOO_LARGE")]
        script.most_instances = 10
        script.failures["Predict"].append(bad)
        with pytest.raises(InvalidArgument) as caught:
            model.predict(["a"] * 20)
    assert caught.value.violations[0].field == "instances[7].text"


def test_pairs_and_parameters_arrive() -> None:
    script = Script(ready={"m"}, predict=classify)
    with serving(script) as address, Client(address) as client:
        client.model("m").predict([("a", "b")], temperature=0.0, max_new_tokens=3)
        with pytest.raises(InvalidArgument, match="do not go together"):
            client.model("m").predict(["a"], temperature=0.5, threshold=0.5)
        with pytest.raises(TypeError, match="no parameter `topk`; there are exclude_seen, "):
            client.model("m").predict(["a"], topk=3)  # type: ignore[call-arg]
        with pytest.raises(InvalidArgument, match=r"instances\[1\]"):
            client.model("m").predict(["a", 3])  # type: ignore[list-item]
        assert client.model("m").predict([]) == []
    request = script.asked("Predict")[0]
    assert request.instances[0].pair.text_pair == "b"
    assert request.generation.HasField("temperature") and request.generation.temperature == 0.0


def test_embeddings_have_rows() -> None:
    with serving(Script(ready={"m"})) as address, Client(address) as client:
        found = client.model("m").embed(["abc", "de"], pooling="mean", normalize=True)
    assert [vector.values for vector in found] == [(3.0, 1.0), (2.0, 1.0)]
    assert found[0].rows() == ((3.0, 1.0),)


def test_the_model_of_a_job_without_one_is_not_ready() -> None:
    script = Script(job=a_job())
    with serving(script) as address, Client(address) as client, pytest.raises(FailedPrecondition, match="no model"):
        client.job("story").model()


def test_a_token_goes_along_to_this_machine_and_nowhere_else() -> None:
    script = Script()
    with serving(script) as address, Client(address, token="secret") as client:
        client.server_info()
    assert script.metadata[0]["authorization"] == "Bearer secret"
    with pytest.raises(InvalidArgument, match="not encrypted"):
        Client("train.example.com:7400", token="secret")


def test_the_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHARDYARD_ADDRESS", "127.0.0.1:7999")
    client = Client()
    assert client.address == "127.0.0.1:7999"
    client.close()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:7400/", "give HOST:PORT alone: `127.0.0.1:7400`"),
        ("localhost", "`localhost` has no port"),
        ("[::1]", "has no port"),
    ],
)
def test_an_invalid_address_is_refused_before_it_is_called(address: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        Client(address)
    assert words in str(refused.value)
    with Client("unix:/tmp/socket"), Client("[::1]:7400"):
        pass


def test_a_closed_client_says_that_it_is() -> None:
    with serving(Script(job=a_job())) as address:
        with Client(address) as client:
            job = client.job("story")
        with pytest.raises(FailedPrecondition, match="the client is closed"):
            list(client.jobs())
        with pytest.raises(FailedPrecondition, match="the client is closed"):
            next(iter(job.watch()))

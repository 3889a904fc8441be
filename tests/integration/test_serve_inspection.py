"""The errors of callers when a process that opens their files ends: the input's fault, or the system's."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from helpers.scripted_compute import ScriptedCompute
from helpers.service import ANSWERS, PARENT, Service, a_spec, create, refused, serving
from helpers.uploads import model_messages
from shardyard.v1 import job_pb2, job_service_pb2, model_service_pb2
from shardyard_coordinator.domain.access import LOCAL
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.launch.protocols import ComputeFailed, InputFailed
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.inspection import Questions, Subject
from shardyard_coordinator.serve.limits import Limits

PLAN = "shardyard_trainer.planning.plan:plan"
INSPECT = "shardyard_trainer.answering.inspect:inspect_model"
PREDICT = "shardyard_trainer.answering.infer:predict"
SUBJECT = Subject("model", "the model", Reason.MODEL_INVALID)


def raising(error: Exception) -> Callable[[bytes], bytes]:
    def answer(_request: bytes) -> bytes:
        raise error

    return answer


def died(field: str, what: str, reason: str) -> InputFailed:
    return InputFailed("takes more than 30 s", note={"field": field, "what": what, "reason": reason})


def job_in(folder: Path) -> job_pb2.Job:
    (folder / "corpus.txt").write_text("to be or not to be\n")
    return a_spec(spec__train_data__uri=str(folder / "corpus.txt"))


def calls(service: Service, function: str) -> int:
    return sum(name == function for name, _ in service.compute.calls)


async def test_a_plan_that_ends_its_process_is_refused_by_its_field_and_not_run_again(tmp_path: Path) -> None:
    answers = {**ANSWERS, PLAN: raising(died("spec.train_data", "corpus.txt", "DATA_INVALID"))}
    async with serving(tmp_path, answers=answers, data_roots=(str(tmp_path),)) as service:
        asked = job_service_pb2.PlanJobRequest(parent=PARENT, job=job_in(tmp_path))
        for call in (service.jobs.PlanJob(asked), service.jobs.CreateJob(create("first", asked.job))):
            failure = await refused(call)
            assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DATA_INVALID")
            (text,) = failure.violations.values()
            assert "job.spec.train_data" in failure.violations
            assert text == "reading corpus.txt takes more than 30 s; give fewer, smaller or simpler files"
        assert calls(service, PLAN) == 1
        (tmp_path / "corpus.txt").write_text("something else, which is another question\n")
        await refused(service.jobs.PlanJob(asked))
        assert calls(service, PLAN) == 2


async def test_what_the_system_failed_may_be_tried_again(tmp_path: Path) -> None:
    answers = {**ANSWERS, PLAN: raising(ComputeFailed("OSError: the disk"))}
    async with serving(tmp_path, answers=answers, data_roots=(str(tmp_path),)) as service:
        for number in (1, 2):
            failure = await refused(service.jobs.CreateJob(create("first", job_in(tmp_path))))
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "INSPECTION_UNAVAILABLE")
            assert failure.retry_after_s and "the disk" not in failure.message
            assert calls(service, PLAN) == number


async def test_an_upload_that_ends_its_process_keeps_nothing_and_is_known_by_its_content(tmp_path: Path) -> None:
    answers = {**ANSWERS, INSPECT: raising(died("files", "tokenizer.json", "MODEL_INVALID"))}
    async with serving(tmp_path, answers=answers) as service:
        for _ in range(2):
            failure = await refused(service.models.CreateModel(model_messages("bert")))
            assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MODEL_INVALID")
            assert failure.violations["files"].startswith("reading tokenizer.json takes more than 30 s; use another")
        assert calls(service, INSPECT) == 1
        assert not list((tmp_path / "storage" / "models").iterdir())


async def test_a_question_that_ends_a_models_process_is_one_about_the_model(tmp_path: Path) -> None:
    answers = {**ANSWERS, PREDICT: raising(InputFailed("ends its process (ended by SIGSEGV)", note={}))}
    async with serving(tmp_path, answers=answers) as service:
        made = await service.models.CreateModel(model_messages("bert"))
        for text, number in (("a", 1), ("a", 1), ("b", 2)):
            instances = [model_service_pb2.Instance(text=text)]
            asked = model_service_pb2.PredictRequest(model=made.name, instances=instances)
            failure = await refused(service.models.Predict(asked))
            assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MODEL_INVALID")
            assert list(failure.violations) == ["model"]
            assert calls(service, PREDICT) == number


async def left(service: Service, call: Any, function: str, times: int) -> None:
    """Cancels a call once its question is being looked into, and waits until that has ended."""
    asked = asyncio.ensure_future(call)
    async with asyncio.timeout(5):
        while calls(service, function) < times:
            await asyncio.sleep(0.005)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asked
    await asyncio.sleep(0.2)


@pytest.mark.parametrize("ends", ["the process", "well"])
async def test_a_caller_that_left_finds_what_came_of_it_when_it_asks_again(tmp_path: Path, ends: str) -> None:
    spoilt = died("spec.train_data", "corpus.txt", "DATA_INVALID")
    no_model = died("files", "tokenizer.json", "MODEL_INVALID")
    answers = {**ANSWERS, PLAN: raising(spoilt), INSPECT: raising(no_model)}
    compute = ScriptedCompute(ANSWERS if ends == "well" else answers)
    async with serving(tmp_path, compute=compute, data_roots=(str(tmp_path),)) as service:
        plan = job_service_pb2.PlanJobRequest(parent=PARENT, job=job_in(tmp_path))
        upload = list(model_messages("bert", request_id=str(uuid.uuid4())))
        asks: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            PLAN: (lambda: service.jobs.PlanJob(plan), lambda: service.jobs.PlanJob(plan)),
            # All bytes have arrived: asking again sends none.
            INSPECT: (
                lambda: service.models.CreateModel(iter(upload)),
                lambda: service.models.CreateModel(iter(upload[:1])),
            ),
        }
        for function, (ask, ask_again) in asks.items():
            service.compute.answer_after(0.1)
            await left(service, ask(), function, 1)
            service.compute.answer_after(30)
            async with asyncio.timeout(5):
                if ends == "well":
                    assert await ask_again()
                else:
                    assert (await refused(ask_again())).reason in ("DATA_INVALID", "MODEL_INVALID")
            assert calls(service, function) == 1, function


async def test_more_data_may_be_read_for_longer_and_a_file_that_only_says_so_may_not(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "long.txt").write_bytes(b"to be or not to be\n" * 200_000)
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.truncate(2**40)
    async with serving(tmp_path, data_roots=(str(tmp_path),)) as service:
        for uri in (tmp_path / "sparse.txt", data, data / "long.txt"):
            job = a_spec(spec__train_data__uri=str(uri))
            await service.jobs.PlanJob(job_service_pb2.PlanJobRequest(parent=PARENT, job=job))
        sparse_s, *long_s = service.compute.limits_s
    assert sparse_s == service.parts.limits.inspection_s
    assert all(sparse_s + 10 < limit_s < sparse_s + 20 for limit_s in long_s)


async def test_a_remembered_verdict_keeps_no_call_in_memory() -> None:
    def fail(_request: bytes) -> bytes:
        raise InputFailed("takes more than 30 s", note={})

    compute = ScriptedCompute({PREDICT: fail})
    questions = Questions(compute, Limits())
    calls = [Call("/Predict", LOCAL, str(number), None) for number in range(3)]
    seen = [weakref.ref(call) for call in calls]
    while calls:
        with contextlib.suppress(Refused):
            await questions.ask(PREDICT, "/models/a", b"instances", calls.pop(), subject=SUBJECT)
    await asyncio.sleep(0)  # Until then the loop holds what woke this test: the last answer.
    gc.collect()
    assert len(compute.calls) == 1
    assert [call() for call in seen] == [None, None, None]

"""The reporter: in order, in batches, durable when it says so."""

from __future__ import annotations

import io
import threading

from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.training.report import PrintingReporter, SendingReporter


class Supervisor:
    def __init__(self) -> None:
        self.requests: list[worker_pb2.ReportRequest] = []
        self.reply = worker_pb2.ReportReply()
        self.asked = threading.Semaphore(0)
        self.may_answer = threading.Event()
        self.may_answer.set()

    def send(self, request: bytes) -> bytes:
        self.may_answer.wait()
        self.requests.append(worker_pb2.ReportRequest.FromString(request))
        self.asked.release()
        return self.reply.SerializeToString()

    def steps(self) -> list[int]:
        return [event.progress.step for request in self.requests for event in request.events]


def progress(step: int) -> worker_pb2.WorkerEvent:
    return worker_pb2.WorkerEvent(progress=job_pb2.Progress(step=step))


def test_events_arrive_in_order_and_in_fewer_requests_than_events() -> None:
    supervisor = Supervisor()
    reporter = SendingReporter(supervisor.send, epoch=4, rank=2)
    for step in range(500):
        reporter.emit(progress(step))
    reporter.close()
    assert supervisor.steps() == list(range(500))
    assert len(supervisor.requests) < 100
    assert {(request.epoch, request.rank) for request in supervisor.requests} == {(4, 2)}
    assert all(
        event.time.seconds > 0 and event.rank == 2 for request in supervisor.requests for event in request.events
    )


def test_a_durable_event_is_on_disk_when_emit_returns_with_everything_before_it() -> None:
    supervisor = Supervisor()
    reporter = SendingReporter(supervisor.send, epoch=1, rank=0)
    reporter.emit(progress(1))
    reporter.emit(progress(2), durable=True)
    assert supervisor.steps() == [1, 2]
    assert supervisor.requests[-1].durable
    reporter.close()


def test_what_was_sent_before_without_waiting_is_on_disk_once_it_is_settled() -> None:
    supervisor = Supervisor()
    reporter = SendingReporter(supervisor.send, epoch=1, rank=0, poll_s=0.01)
    reporter.emit(progress(1))
    while not supervisor.steps():
        assert supervisor.asked.acquire(timeout=5)
    assert not any(request.durable for request in supervisor.requests)
    reporter.settle()
    reporter.settle()
    assert supervisor.steps() == [1]
    assert sum(request.durable for request in supervisor.requests) == 1, "nothing is asked for what is on disk already"
    reporter.close()


def test_progress_does_not_wait_for_the_supervisor() -> None:
    supervisor = Supervisor()
    supervisor.may_answer.clear()
    reporter = SendingReporter(supervisor.send, epoch=1, rank=0, poll_s=0.001)
    for step in range(100):
        reporter.emit(progress(step))
    supervisor.may_answer.set()
    reporter.close()
    assert supervisor.steps() == list(range(100))


def test_a_directive_is_learnt_without_events() -> None:
    supervisor = Supervisor()
    supervisor.reply.directive.action = worker_pb2.Directive.ACTION_STOP
    reporter = SendingReporter(supervisor.send, epoch=1, rank=0, poll_s=0.001)
    assert supervisor.asked.acquire(timeout=5) and supervisor.asked.acquire(timeout=5)
    assert reporter.directive.action == worker_pb2.Directive.ACTION_STOP
    reporter.close()


def test_a_rank_that_is_not_the_first_asks_only_with_events() -> None:
    supervisor = Supervisor()
    reporter = SendingReporter(supervisor.send, epoch=1, rank=1, poll_s=None)
    reporter.emit(progress(1), durable=True)
    reporter.close()
    assert len(supervisor.requests) == 1


def test_the_null_twin_prints_what_happened_and_leaves_out_single_steps() -> None:
    out = io.StringIO()
    reporter = PrintingReporter(out)
    reporter.emit(progress(7), durable=True)
    reporter.emit(worker_pb2.WorkerEvent(metrics=worker_pb2.Metrics()))
    reporter.close()
    (line,) = out.getvalue().splitlines()
    assert 'progress {"step": "7"}' in line
    assert reporter.directive.action == worker_pb2.Directive.ACTION_UNSPECIFIED

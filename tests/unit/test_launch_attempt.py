"""The supervisor core: numbers, directives, the fence, and which failure is the cause."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from helpers.clock import ManualClock
from helpers.full_disk import no_room_for
from helpers.launches import kinds
from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.launch.attempt import Attempt, read_tail
from shardyard_coordinator.launch.memory import OutOfMemory
from shardyard_coordinator.launch.protocols import AttemptKey
from shardyard_coordinator.launch.rank_exit import RankExit
from shardyard_coordinator.launch.spool import Spool, read_spool


class Gang:
    """An attempt whose ranks are the test's lines; `kill` ends those that still run."""

    def __init__(self, folder: Path, ranks: int = 2) -> None:
        self.path = folder / "spool.bin"
        self.spool = Spool(self.path)
        self.clock = ManualClock()
        self.attempt = Attempt(
            AttemptKey("job", 3),
            ranks=ranks,
            spool=self.spool,
            logs=folder / "logs",
            clock=self.clock,
            settle_s=0.05,
        )
        self.running = set(range(ranks))
        self.killed: list[int] = []
        self.task = asyncio.create_task(self.attempt.supervise(self._kill))

    async def say(
        self, *events: worker_pb2.WorkerEvent, rank: int = 0, epoch: int = 3, durable: bool = True
    ) -> worker_pb2.ReportReply:
        request = worker_pb2.ReportRequest(epoch=epoch, rank=rank, events=events, durable=durable)
        return worker_pb2.ReportReply.FromString(await self.attempt.report(request.SerializeToString()))

    def exit(self, rank: int, how: RankExit) -> None:
        self.running.discard(rank)
        self.attempt.rank_exited(rank, how)

    async def events(self) -> list[worker_pb2.WorkerEvent]:
        """All of them, when it is over."""
        await self.task
        return [worker_pb2.WorkerEvent.FromString(raw) for raw in read_spool(self.path, after=0)]

    async def told(self, after: int = 0) -> list[worker_pb2.WorkerEvent]:
        """What the coordinator can read by now."""
        found = await self.attempt.events_after(after, timeout_s=5, limit=99)
        return [worker_pb2.WorkerEvent.FromString(raw) for raw in found]

    async def _kill(self) -> None:
        for rank in sorted(self.running):
            self.killed.append(rank)
            self.exit(rank, RankExit(None, signal.SIGKILL))


def progress(step: int) -> worker_pb2.WorkerEvent:
    event = worker_pb2.WorkerEvent()
    event.progress.step = step
    return event


def failure(reason: str, rank: int) -> worker_pb2.WorkerEvent:
    event = worker_pb2.WorkerEvent()
    event.failure.reason = reason
    event.failure.message = f"{reason} of rank {rank}"
    event.failure.rank = rank
    return event


GOOD = RankExit(0)
BAD = RankExit(1)
LOST = RankExit(None, signal.SIGKILL)
ABORTED = RankExit(None, signal.SIGABRT)


async def test_events_are_numbered_densely_and_the_end_is_the_last(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    await gang.say(progress(1), progress(2))
    await gang.say(worker_pb2.WorkerEvent(warning={"reason": "SLOW"}), rank=1)  # type: ignore[arg-type]
    gang.exit(0, GOOD)
    gang.clock.advance(7.5)
    gang.exit(1, GOOD)
    events = await gang.events()
    assert [(event.sequence, event.rank) for event in events] == [(1, 0), (2, 0), (3, 1), (4, -1)]
    assert kinds(events) == ["progress", "progress", "warning", "ended"]
    assert events[-1].ended.ok
    assert events[-1].ended.duration.ToTimedelta().total_seconds() == 7.5


async def test_a_symptom_waits_longer_for_its_cause(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    report = asyncio.create_task(gang.say(failure("UNKNOWN", 0), rank=0))
    await asyncio.sleep(0.15)  # Three times as long as a cause waits for a better one.
    assert not report.done()
    gang.exit(1, RankExit(None, detail="node n is gone", cause=Cause.NODE_LOST))
    [cause] = [event.failure for event in await gang.events() if event.HasField("failure")]
    assert (cause.reason, cause.rank) == ("NODE_LOST", 1)


async def test_symptoms_of_all_ranks_end_the_wait(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    reports = [asyncio.create_task(gang.say(failure("UNKNOWN", rank), rank=rank)) for rank in (0, 1)]
    async with asyncio.timeout(0.2):  # Less than the cause of a symptom is waited for.
        await asyncio.gather(*reports)
    [cause] = [event.failure for event in await gang.events() if event.HasField("failure")]
    assert (cause.reason, cause.rank) == ("UNKNOWN", 0)


async def test_no_symptom_is_taken_for_the_cause_while_a_lost_rank_is_asked_about(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    with gang.attempt.asking_why():
        report = asyncio.create_task(gang.say(failure("UNKNOWN", 0), rank=0))
        await asyncio.sleep(0.15)  # Three times as long as the gang waits for better explanations.
        assert not report.done()
    gang.exit(1, RankExit(None, memory=OutOfMemory(1 << 30, 1 << 30)))
    [cause] = [event.failure for event in await gang.events() if event.HasField("failure")]
    assert (cause.reason, cause.rank) == ("HOST_OOM", 1)


CAUSES = [
    ("the first of two reports", [(0, "DATA_ERROR"), (1, "STORAGE_FULL")], "DATA_ERROR", 0),
    ("a lost rank over the symptom before it", [(0, "UNKNOWN"), (1, LOST)], "WORKER_LOST", 1),
    ("a lost rank over the symptom after it", [(1, LOST), (0, "UNKNOWN")], "WORKER_LOST", 1),
    ("a definite report over the loss after it", [(0, "CUDA_OOM"), (1, LOST)], "CUDA_OOM", 0),
    ("a report over an abort before it", [(1, ABORTED), (0, "UNKNOWN")], "WORKER_LOST", 1),
    ("a definite report over an abort before it", [(1, ABORTED), (0, "DATA_ERROR")], "DATA_ERROR", 0),
    ("an exit without a report over a symptom", [(0, "NCCL_TIMEOUT"), (1, RankExit(3))], "UNKNOWN", 1),
    ("the first of two symptoms", [(1, "UNKNOWN"), (0, "UNKNOWN")], "UNKNOWN", 1),
]


@pytest.mark.parametrize(("troubles", "reason", "rank"), [row[1:] for row in CAUSES], ids=[row[0] for row in CAUSES])
async def test_the_cause_is_chosen_among_all_that_happened(
    tmp_path: Path, troubles: list[tuple[int, str | RankExit]], reason: str, rank: int
) -> None:
    gang = Gang(tmp_path)
    await gang.say(progress(41))
    says = []
    for who, what in troubles:
        if isinstance(what, RankExit):
            gang.exit(who, what)
        else:
            says.append(asyncio.create_task(gang.say(failure(what, who), rank=who)))
            await asyncio.sleep(0)
    events = await gang.events()
    await asyncio.gather(*says)
    assert kinds(events) == ["progress", "failure", "warning", "ended"]
    cause = events[1].failure
    assert (cause.reason, cause.rank, cause.step, cause.attempt) == (reason, rank, 41, 3)
    assert events[2].rank == 1 - rank
    assert not events[-1].ended.ok


async def test_a_failed_gang_is_ended_and_its_other_ranks_are_not_failures(tmp_path: Path) -> None:
    gang = Gang(tmp_path, ranks=4)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-2.stderr.log").write_text("\n".join(f"line {n}" for n in range(200)))
    gang.exit(2, LOST)
    events = await gang.events()
    assert gang.killed == [0, 1, 3]
    assert kinds(events) == ["failure", "ended"]
    assert events[0].failure.metadata["signal"] == "SIGKILL"
    assert events[0].failure.log_tail.split("\n") == [f"line {n}" for n in range(150, 200)]


async def test_a_rank_that_exits_after_its_report_is_not_another_failure(tmp_path: Path) -> None:
    gang = Gang(tmp_path, ranks=1)
    said = asyncio.create_task(gang.say(failure("DATA_ERROR", 0)))
    await asyncio.sleep(0)
    gang.exit(0, BAD)
    assert kinds(await gang.events()) == ["failure", "ended"]
    # A reply that comes when the gang is over says so.
    assert (await said).fenced


async def test_another_epoch_and_a_fenced_gang_are_asked_to_stop(tmp_path: Path) -> None:
    gang = Gang(tmp_path, ranks=1)
    assert (await gang.say(progress(1), epoch=2)).fenced
    assert not (await gang.say(progress(1))).fenced
    gang.attempt.fence()
    assert (await gang.say(progress(2))).fenced
    gang.exit(0, LOST)
    # Whoever fenced it says why it ended.
    assert kinds(await gang.events()) == ["progress"]


async def test_a_directive_comes_with_each_reply_after_it(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    assert not (await gang.say()).HasField("directive")
    stop = worker_pb2.Directive(action=worker_pb2.Directive.ACTION_CHECKPOINT_AND_STOP, reason="PREEMPTED")
    gang.attempt.direct(stop.SerializeToString())
    for rank in range(2):
        assert (await gang.say(rank=rank)).directive == stop
    gang.task.cancel()


async def test_a_poll_waits_for_the_next_event_and_no_longer(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    assert await gang.attempt.events_after(0, timeout_s=0.01, limit=10) == []
    poll = asyncio.create_task(gang.attempt.events_after(1, timeout_s=10, limit=10))
    await gang.say(progress(1))
    assert not poll.done()
    await gang.say(progress(2))
    assert [worker_pb2.WorkerEvent.FromString(raw).sequence for raw in await poll] == [2]
    gang.task.cancel()


async def test_reports_wait_for_room_and_the_pressure_is_reported_at_once(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    await gang.say(progress(1))
    with no_room_for(gang.path):
        waits = [asyncio.create_task(gang.say(progress(2), rank=rank)) for rank in (0, 1)]
        (raw,) = await gang.attempt.events_after(1, timeout_s=5, limit=10)
        told = worker_pb2.WorkerEvent.FromString(raw)
        assert (told.rank, told.sequence, told.condition.active) == (-1, 2, True)
        assert told.condition.type == job_pb2.Condition.TYPE_DISK_PRESSURE and "No space" in told.condition.message
        assert not any(task.done() for task in waits) and not gang.killed
    await asyncio.gather(*waits)
    for rank in (0, 1):
        gang.exit(rank, GOOD)
    events = await gang.events()
    assert kinds(events) == ["progress", "condition", "progress", "progress", "condition", "ended"]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6]
    assert not events[4].condition.active and events[-1].ended.ok and not gang.killed


@pytest.mark.parametrize(
    ("patience_s", "instead", "cause"), [(600.0, "/dev/full", "STORAGE_FULL"), (60.0, "gone", "STORAGE_NOT_WRITABLE")]
)
async def test_a_gang_whose_reports_waited_too_long_ends_for_what_they_waited_for(
    tmp_path: Path, patience_s: float, instead: str, cause: str
) -> None:
    gang = Gang(tmp_path)
    await gang.say(progress(7))
    (tmp_path / "gone").touch()
    with no_room_for(gang.path, instead if instead.startswith("/") else str(tmp_path / instead), flags=os.O_RDONLY):
        waits = asyncio.create_task(gang.say(progress(8)))
        await gang.attempt.events_after(1, timeout_s=5, limit=10)
        gang.clock.advance(patience_s)
        await gang.task
        told = [
            worker_pb2.WorkerEvent.FromString(raw) for raw in await gang.attempt.events_after(1, timeout_s=5, limit=9)
        ]
        assert kinds(told) == ["condition", "failure", "ended"]
        failure_of_all = told[1].failure
        assert (failure_of_all.reason, failure_of_all.step) == (cause, 8)
        assert "spool" in failure_of_all.message and not told[-1].ended.ok
        assert gang.killed == [0, 1]
        await waits


def test_a_log_that_is_not_there_has_no_tail(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "rank-0.stderr.log") == ""


async def test_a_cause_that_has_no_room_on_the_disk_is_reported_from_memory(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    with no_room_for(gang.path):
        gang.exit(1, LOST)
        await gang.task
        told = [
            worker_pb2.WorkerEvent.FromString(raw) for raw in await gang.attempt.events_after(0, timeout_s=5, limit=9)
        ]
    assert kinds(told) == ["failure", "ended"] and told[0].failure.reason == "WORKER_LOST"
    assert gang.killed == [0]


async def test_pressure_of_checkpoints_and_of_the_spool_begins_once_ends_once_and_says_what_for(
    tmp_path: Path,
) -> None:
    gang = Gang(tmp_path)
    skipped = "checkpoint at step 800 skipped"
    await gang.say(pressure(skipped))
    await gang.say(pressure(skipped))
    with no_room_for(gang.path):
        waits = asyncio.create_task(gang.say(progress(1), rank=1))
        await gang.attempt.events_after(1, timeout_s=5, limit=10)
    await waits
    await gang.say(pressure(None))
    for rank in (0, 1):
        gang.exit(rank, GOOD)
    events = await gang.events()
    assert kinds(events) == ["condition", "condition", "progress", "condition", "condition", "ended"]
    told = [event.condition for event in events if event.HasField("condition")]
    assert [each.active for each in told] == [True, True, True, False]
    assert told[0].message == told[2].message == skipped
    assert told[1].message.startswith("reports wait: the attempt's spool cannot be written")


async def test_after_a_skipped_checkpoint_waiting_reports_are_delivered_and_end_the_gang(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    await gang.say(pressure("checkpoint at step 800 skipped"))
    with no_room_for(gang.path):
        waits = asyncio.create_task(gang.say(progress(1000), rank=1))
        await gang.attempt.events_after(1, timeout_s=5, limit=10)
        gang.clock.advance(599)
        await gang.say(durable=False)  # As rank 0 asks for directives.
        assert not gang.killed
        gang.clock.advance(1)
        await gang.say(durable=False)
        await gang.task
        await waits
        told = await gang.told(after=1)
    assert kinds(told) == ["condition", "failure", "ended"]
    assert "reports wait" in told[0].condition.message
    assert (told[1].failure.reason, gang.killed) == ("STORAGE_FULL", [0, 1])


async def test_what_need_not_be_durable_is_read_at_once_and_written_when_there_is_room(tmp_path: Path) -> None:
    gang = Gang(tmp_path, ranks=1)
    with no_room_for(gang.path):
        for step in (1, 2):
            await gang.say(progress(step), durable=False)
        assert kinds(await gang.told()) == ["condition", "progress", "progress"]
        assert read_spool(gang.path, after=0) == []
    await gang.say(durable=False)
    assert len(read_spool(gang.path, after=0)) == 4
    assert [event.condition.active for event in await gang.told() if event.HasField("condition")] == [True, False]
    gang.exit(0, GOOD)
    assert kinds(await gang.events()) == ["condition", "progress", "progress", "condition", "ended"]


async def test_a_durable_report_without_events_waits_until_earlier_reports_are_written(tmp_path: Path) -> None:
    gang = Gang(tmp_path, ranks=1)
    with no_room_for(gang.path):
        await gang.say(progress(1), durable=False)
        settled = asyncio.create_task(gang.say())
        await asyncio.sleep(0.05)
        assert not settled.done() and read_spool(gang.path, after=0) == []
    await settled
    assert len(read_spool(gang.path, after=0)) >= 2
    gang.exit(0, GOOD)
    await gang.events()


async def test_no_more_is_kept_in_memory_than_a_bound(tmp_path: Path) -> None:
    gang = Gang(tmp_path, ranks=1)
    large = worker_pb2.WorkerEvent(warning=job_pb2.Warning(message="x" * (5 << 20)))
    with no_room_for(gang.path):
        for _ in range(2):
            await gang.say(large, durable=False)
        waits = asyncio.create_task(gang.say(large, durable=False))
        await asyncio.sleep(0.05)
        assert not waits.done() and gang.spool.last == 3
    await waits
    gang.exit(0, GOOD)
    assert kinds(await gang.events()) == ["condition", "warning", "warning", "warning", "condition", "ended"]


async def test_a_failure_does_not_wait_for_the_room_of_what_was_said_before_it(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    with no_room_for(gang.path):
        await gang.say(progress(1000), failure("DATA_ERROR", 0))
        await gang.task
        told = await gang.told()
    assert kinds(told) == ["progress", "failure", "ended"]
    assert (told[1].failure.reason, told[1].failure.step) == ("DATA_ERROR", 1000)


def pressure(message: str | None) -> worker_pb2.WorkerEvent:
    """The condition of a checkpoint that was skipped; None: it is over."""
    condition = job_pb2.Condition(
        type=job_pb2.Condition.TYPE_DISK_PRESSURE, active=message is not None, message=message or ""
    )
    return worker_pb2.WorkerEvent(condition=condition)


async def test_reports_that_need_not_be_durable_are_brought_to_the_disk_before_they_fill_the_memory(
    tmp_path: Path,
) -> None:
    gang = Gang(tmp_path)
    event = worker_pb2.WorkerEvent()
    event.warning.message = "x" * 1024 * 1024
    for _ in range(12):
        await gang.say(event, durable=False)
        assert gang.spool.unsynced_bytes < 6 * 1024 * 1024
    assert gang.spool.last == 12
    for rank in (0, 1):
        gang.exit(rank, RankExit(0))
    assert len(await gang.events()) == 13

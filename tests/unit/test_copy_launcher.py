"""An attempt that copies is followed like a gang: its events, its end, a cancellation, a pause, and a service's end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from shardyard.remote_uris import parse
from shardyard.v1 import plan_pb2, spec_pb2, transfer_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.copying import CopyLauncher
from shardyard_coordinator.control.remote import Remote, RemoteRoot
from shardyard_coordinator.launch.protocols import AttemptKey, ComputeUnavailable, Launch, Presence
from shardyard_coordinator.seams import SystemClock

KEY = AttemptKey("a" * 32, 1)
MODEL = "projects/p/models/m"
ROOT = RemoteRoot(parse("s3://lake/models"), "lake")
RULES = Remote(export_roots=(ROOT,), secrets={"lake": frozenset({"p"})})
Answer = Callable[[worker_pb2.CopyRequest], worker_pb2.CopyResult]


class Asked:
    """Compute processes that answer as a test says."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[worker_pb2.CopyRequest] = []
        self.secrets: list[Sequence[str]] = []
        self.holds = asyncio.Event()
        self.holds.set()

    async def inspect(self, function: str, request: bytes, *, secrets: Sequence[str] = (), **_: Any) -> bytes:
        assert function == "shardyard_trainer.remote.copying:copy"
        self.requests.append(worker_pb2.CopyRequest.FromString(request))
        self.secrets.append(secrets)
        await self.holds.wait()
        return self.answer(self.requests[-1]).SerializeToString()


class Others:
    """The launcher of all other attempts; notes what it is asked."""

    name = "ray"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        async def note(*_: Any, **__: Any) -> Any:
            self.asked.append(name)
            return Presence.ABSENT if name == "lookup" else None

        return note


def launch(folder: Path, output: plan_pb2.JobOutput.ValueType = plan_pb2.JOB_OUTPUT_COPY) -> Launch:
    (folder / "job").mkdir(exist_ok=True)
    spec = spec_pb2.JobSpec(
        model_copy=spec_pb2.ModelCopy(uri="s3://lake/models/m"), model=spec_pb2.ModelSource(model=MODEL)
    )
    attempt = worker_pb2.AttemptSpec(
        job_name="projects/p/jobs/j",
        job_uid=KEY.job_uid,
        epoch=KEY.epoch,
        spec=spec,
        plan=plan_pb2.JobPlan(output=output, total_steps=3),
        attempt_dir=str(folder / "job" / "e000001"),
        job_dir=str(folder / "job"),
    )
    attempt.locations.folders[MODEL] = "/models/m"
    attempt.locations.known_files["/models/m"].files.append(
        transfer_pb2.StoredFile(path="config.json", size_bytes=2, sha256="0" * 64)
    )
    return Launch(KEY, attempt.SerializeToString(), attempt.attempt_dir, 1, 1, 0, ())


def launcher(folder: Path, asked: Asked, rules: Remote = RULES, others: Others | None = None) -> CopyLauncher:
    inner: Any = others or Others()
    compute: Any = asked
    return CopyLauncher(inner, compute, rules, SystemClock(), storage=folder, settle_s=0.01, pause_s=0.001)


async def ended(of: CopyLauncher) -> list[worker_pb2.WorkerEvent]:
    """All events, once the last one is there."""
    found: list[worker_pb2.WorkerEvent] = []
    async with asyncio.timeout(20):
        while not found or not found[-1].HasField("ended"):
            more = await of.events_after(KEY, len(found), timeout_s=5, limit=100)
            found += map(worker_pb2.WorkerEvent.FromString, more)
    return found


def kinds(events: Sequence[worker_pb2.WorkerEvent]) -> list[str]:
    return [str(event.WhichOneof("payload")) for event in events]


def steps(*done: int) -> Answer:
    """Answers with so many MiB, and is done with the last."""
    left = list(done)

    def answer(_: worker_pb2.CopyRequest) -> worker_pb2.CopyResult:
        now = left.pop(0)
        return worker_pb2.CopyResult(done_bytes=now * 2**20, all_bytes=done[-1] * 2**20, is_done=not left)

    return answer


async def test_it_is_asked_until_it_is_done_and_says_how_far_it_is(tmp_path: Path) -> None:
    asked = Asked(steps(1, 2, 3))
    of = launcher(tmp_path, asked)
    await of.ensure(launch(tmp_path))
    await of.ensure(launch(tmp_path))
    events = await ended(of)
    assert kinds(events) == [*("ready", "canary", "progress", "progress", "progress", "finished", "exported", "ended")]
    assert [event.progress.step for event in events if event.HasField("progress")] == [1, 2, 3]
    assert events[-1].ended.ok and [event.sequence for event in events] == list(range(1, 9))
    first = asked.requests[0]
    assert (first.uri, first.folder, first.secret, first.model) == ("s3://lake/models/m", "/models/m", "lake", MODEL)
    assert len(asked.requests) == 3 and asked.secrets[0] == ["lake"]
    assert await of.lookup(KEY) is Presence.ALIVE
    await of.kill(KEY)
    assert await of.lookup(KEY) is Presence.DEAD and len(asked.requests) == 3


async def test_other_attempts_go_to_the_other_launcher(tmp_path: Path) -> None:
    others = Others()
    of = launcher(tmp_path, Asked(steps(1)), others=others)
    await of.ensure(launch(tmp_path, plan_pb2.JOB_OUTPUT_MODEL))
    assert await of.lookup(KEY) is Presence.ABSENT
    await of.direct(KEY, b"")
    await of.kill(KEY)
    assert others.asked == ["ensure", "lookup", "direct", "kill"]


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("OBJECT_EXISTS", "OBJECT_EXISTS"),
        ("OBJECT_STORE_UNREACHABLE", "OBJECT_STORE_UNREACHABLE"),
        ("MODEL_CHANGED", "MODEL_CHANGED"),
        ("QUOTA_EXCEEDED", "USER_CONFIG"),
    ],
)
async def test_a_refusal_is_the_failure_of_the_attempt(tmp_path: Path, reason: str, cause: str) -> None:
    wrong = worker_pb2.Violation(field="spec.model_copy.uri", reason=reason, message="no", metadata={"object": "k"})
    of = launcher(tmp_path, Asked(lambda _: worker_pb2.CopyResult(violations=[wrong])))
    await of.ensure(launch(tmp_path))
    events = await ended(of)
    assert kinds(events) == ["ready", "canary", "failure", "ended"] and not events[-1].ended.ok
    failure = events[2].failure
    assert (failure.reason, failure.message, failure.metadata["object"]) == (cause, "no", "k")


async def test_who_may_not_write_there_any_more_writes_nothing(tmp_path: Path) -> None:
    asked = Asked(steps(1))
    of = launcher(tmp_path, asked, Remote(export_roots=(ROOT,)))
    await of.ensure(launch(tmp_path))
    events = await ended(of)
    assert events[2].failure.reason == "USER_CONFIG" and not asked.requests


@pytest.mark.parametrize(
    ("action", "removes"),
    [(worker_pb2.Directive.ACTION_STOP, True), (worker_pb2.Directive.ACTION_CHECKPOINT_AND_STOP, False)],
)
async def test_parts_stay_for_a_paused_job_and_go_with_a_cancelled_one(
    tmp_path: Path, action: worker_pb2.Directive.Action.ValueType, removes: bool
) -> None:
    asked = Asked(lambda request: worker_pb2.CopyResult(done_bytes=len(asked.requests) * 2**20, all_bytes=2**30))
    of = launcher(tmp_path, asked)
    await of.ensure(launch(tmp_path))
    directive = worker_pb2.Directive(action=action, reason="CANCELLED")
    await of.direct(KEY, directive.SerializeToString())
    events = await ended(of)
    assert "stopped" in kinds(events) and events[-1].ended.ok and "exported" not in kinds(events)
    assert asked.requests[-1].abort is removes
    await of.kill(KEY)
    assert sum(request.abort for request in asked.requests) == int(removes)


async def test_a_cancelled_job_that_is_ended_by_force_waits_for_its_process_and_removes_the_parts(
    tmp_path: Path,
) -> None:
    asked = Asked(lambda _: worker_pb2.CopyResult(done_bytes=1, all_bytes=2**30))
    asked.holds.clear()
    of = launcher(tmp_path, asked)
    await of.ensure(launch(tmp_path))
    while not asked.requests:
        await asyncio.sleep(0.01)
    await of.direct(KEY, worker_pb2.Directive(action=worker_pb2.Directive.ACTION_STOP).SerializeToString())
    killing = asyncio.create_task(of.kill(KEY))
    await asyncio.sleep(0.05)
    assert not killing.done() and len(asked.requests) == 1
    asked.holds.set()
    await killing
    assert [request.abort for request in asked.requests] == [False, True]
    assert await of.lookup(KEY) is Presence.DEAD


async def test_a_service_that_ends_is_no_failure_of_the_job(tmp_path: Path) -> None:
    """The processes end first, and the next service finds an attempt that said nothing of an end."""
    asked = Asked(steps(1))
    asked.holds.clear()
    of = launcher(tmp_path, asked)
    await of.ensure(launch(tmp_path))
    while not asked.requests:
        await asyncio.sleep(0.01)
    call = of._copies[KEY].call
    assert call is not None
    call.cancel()
    await asyncio.sleep(0.05)
    await of.close(stop_cluster=False)
    spool = (tmp_path / "job" / "e000001" / "spool.bin").read_bytes()
    assert b"WORKER_LOST" not in spool and b"UNKNOWN" not in spool
    assert not any(request.abort for request in asked.requests)


async def test_processes_that_do_not_answer_are_asked_again_and_not_forever(tmp_path: Path) -> None:
    turns: dict[str, int] = {"left": 5}

    def answer(_: worker_pb2.CopyRequest) -> worker_pb2.CopyResult:
        turns["left"] -= 1
        if turns["left"] > 0:
            raise ComputeUnavailable("none is free")
        return worker_pb2.CopyResult(is_done=turns["left"] == 0, done_bytes=1, all_bytes=1)

    of = launcher(tmp_path, Asked(answer))
    await of.ensure(launch(tmp_path))
    assert kinds(await ended(of))[-2:] == ["exported", "ended"]
    await of.kill(KEY)
    never: Mapping[str, Any] = {"done_bytes": 0, "all_bytes": 5}
    of = launcher(tmp_path / "again", Asked(lambda _: worker_pb2.CopyResult(**never)))
    (tmp_path / "again").mkdir()
    await of.ensure(launch(tmp_path / "again"))
    assert (await ended(of))[-2].failure.reason == "EXPORT_FAILED"

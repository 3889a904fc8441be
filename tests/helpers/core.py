"""The coordinator's core with real parts (store, loop, collector) over a scripted launcher."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import Connection

from helpers.stores import store_at
from shardyard.v1 import job_pb2, plan_pb2, spec_pb2
from shardyard_coordinator.control import intentions
from shardyard_coordinator.control.collector import Collector
from shardyard_coordinator.control.recovery import recover
from shardyard_coordinator.control.settings import ControlSettings
from shardyard_coordinator.control.storage_claim import claim_storage
from shardyard_coordinator.domain.records import JobRecord, NewJob, NewUpload, ResourceKind
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.launch.protocols import Launcher
from shardyard_coordinator.scheduling.loop import SchedulingLoop
from shardyard_coordinator.seams import Actor, Clock, NullTrace, SystemClock, Trace
from shardyard_coordinator.store import attempts, encode, events, jobs, listing, resources, submissions
from shardyard_coordinator.store.store import Store, open_store

ACTOR = Actor("local", "CreateJob")
TERMINAL = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


def new_job(job_id: str = "job", *, workers: int = 1, **overrides: object) -> NewJob:
    """A job that the store takes; `spec` overrides are a JobSpec."""
    spec = overrides.pop("spec", None) or spec_pb2.JobSpec()
    assert isinstance(spec, spec_pb2.JobSpec)
    blob = spec.SerializeToString()
    made = NewJob(
        project="default",
        job_id=job_id,
        uid=uuid.uuid4().hex,
        request_id="",
        fingerprint=b"",
        display_name="",
        labels={},
        description=b"",
        queue="default",
        priority=job_pb2.PRIORITY_NORMAL,
        task="text_classification",
        spec=blob,
        resolved_spec=blob,
        plan=plan_pb2.JobPlan(total_steps=10).SerializeToString(),
        workers=workers,
        gpus_per_worker=0,
        cpus_per_worker=1,
    )
    return replace(made, **overrides)  # type: ignore[arg-type]


def add_model(conn: Connection, resource_id: str = "m") -> str:
    """A model that is ready; answers its name."""
    uid = f"{abs(hash(resource_id)):032x}"
    new = NewUpload(ResourceKind.MODEL, "default", resource_id, uid, f"/models/{uid}", "", "", ())
    made = resources.register_output(conn, new, source_job="", creator="local", description=b"", now_us=1)
    return made.name


class NoWait(random.Random):
    """Draws no back-off."""

    def uniform(self, a: float, b: float) -> float:
        return min(a, b)


@dataclass
class Core:
    """The parts, and questions to them."""

    store: Store
    collector: Collector
    loop: SchedulingLoop
    launcher: Launcher
    clock: Clock

    async def submit(self, new: NewJob) -> JobRecord:
        write = lambda conn: submissions.create_job(conn, new, ACTOR, self.clock.now_us())  # noqa: E731
        return (await self.store.write(write, ACTOR)).job

    async def all_jobs(self) -> list[JobRecord]:
        return await self.store.read(lambda conn: listing.list_jobs(conn, "default"))

    async def cancel(self, job: JobRecord, *, lost: bool = False) -> JobRecord:
        return await self._wish(intentions.declare_lost if lost else jobs.request_cancel, job)

    async def pause(self, job: JobRecord) -> JobRecord:
        return await self._wish(intentions.request_pause, job)

    async def resume(self, job: JobRecord) -> JobRecord:
        return await self._wish(intentions.request_resume, job)

    async def _wish(self, record: Callable[..., JobRecord], job: JobRecord) -> JobRecord:
        def write(conn: Connection) -> JobRecord:
            return record(conn, job.project, job.job_id, "", actor=ACTOR, now_us=self.clock.now_us())

        return await self.store.write(write, ACTOR)

    async def job(self, uid: str) -> JobRecord:
        found = await self.store.read(lambda conn: jobs.get_job_by_uid(conn, uid))
        assert found is not None
        return found

    async def events(self, uid: str) -> list[job_pb2.JobEvent]:
        records = await self.store.read(lambda conn: events.events_after(conn, uid, 0, 100_000))
        return [encode.event_to_proto(record) for record in records]

    async def attempts(self, uid: str) -> list[attempts.AttemptRecord]:
        return await self.store.read(lambda conn: attempts.list_attempts(conn, uid))

    async def until(self, uid: str, *states: JobState, timeout_s: float = 20.0) -> JobRecord:
        """The job once it is in one of the states."""
        return await self.when(uid, lambda job: job.state in states, timeout_s=timeout_s)

    async def when(self, uid: str, test: Callable[[JobRecord], bool], *, timeout_s: float = 20.0) -> JobRecord:
        """The job once the test holds; woken by commits, never by time."""
        changed = asyncio.Event()

        def hear(_records: object) -> None:
            changed.set()

        unsubscribe = self.store.subscribe(hear)
        try:
            async with asyncio.timeout(timeout_s):
                while not test(job := await self.job(uid)):
                    await changed.wait()
                    changed.clear()
                return job
        finally:
            unsubscribe()


@contextlib.asynccontextmanager
async def running_core(
    folder: Path,
    launcher: Launcher,
    *,
    clock: Clock | None = None,
    trace: Trace | None = None,
    schedule: bool = True,
    rng: random.Random | None = None,
    **settings: float,
) -> AsyncIterator[Core]:
    """A coordinator's core on `folder`, as it starts and stops."""
    clock, trace = clock or SystemClock(), trace or NullTrace()
    store = await open_store(store_at(folder), clock, trace)
    await claim_storage(folder / "storage", store)
    quick = {"poll_s": 0.2, "retry_min_s": 0.01, "retry_max_s": 0.05, **settings}
    made = ControlSettings(storage=folder / "storage", store_id=store.store_id, **quick)
    collector = Collector(store, launcher, clock, trace, made, rng=rng or NoWait())
    loop = SchedulingLoop(store, launcher, collector, clock, trace)
    try:
        await recover(store, collector, trace)
        if schedule:
            loop.start()
        yield Core(store, collector, loop, launcher, clock)
    finally:
        await loop.close()
        await collector.close()
        await store.close()


def shown(event: job_pb2.JobEvent) -> str:
    """An event in a word or two, for comparing whole logs."""
    if event.HasField("state"):
        return job_pb2.State.Name(event.state.to).removeprefix("STATE_")
    if event.HasField("attempt_changed"):
        state = job_pb2.Attempt.State.Name(event.attempt_changed.attempt.state)
        return f"attempt {state.removeprefix('STATE_')}"
    return str(event.WhichOneof("payload"))


def assert_dense(log: list[job_pb2.JobEvent]) -> None:
    """The promise of the event log."""
    assert [event.sequence for event in log] == list(range(1, len(log) + 1))


def states(log: list[job_pb2.JobEvent]) -> list[str]:
    """The steps of the state."""
    return [shown(event) for event in log if event.HasField("state")]

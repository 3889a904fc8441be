"""Pauses, resumes, cancels, losses, failures and restarts in any order: the states keep their promises, and it ends."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.core import Core, assert_dense, new_job, running_core, shown
from helpers.scripted_launcher import ScriptedLauncher, whole_run
from shardyard.v1 import job_pb2
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.records import JobRecord
from shardyard_coordinator.domain.states import JobState, may_move
from shardyard_coordinator.launch.protocols import Presence
from shardyard_coordinator.store import attempts

WISHES = ("pause", "resume", "cancel", "lost")
GANG = ("canary", "progress", "checkpoint", "failure", "storage", "die", "finish")
ACTIONS = (*WISHES, "pause", "resume", *GANG, "unreachable", "reachable", "deaf", "restart")
QUICK = {"poll_s": 0.01, "unbegun_grace_s": 0.02, "stop_grace_s": 0.02, "pause_grace_s": 0.02, "failure_grace_s": 0.02}
STILL = (JobState.PAUSED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=14))
def test_whatever_is_asked_in_whatever_order_the_job_ends_and_its_log_is_legal(actions: list[str]) -> None:
    log = asyncio.run(_play(actions))
    assert_dense(log)
    assert _end_of(log).is_terminal


async def _play(actions: list[str]) -> list[job_pb2.JobEvent]:
    launcher = ScriptedLauncher()
    with tempfile.TemporaryDirectory() as folder:
        async with running_core(Path(folder), launcher, **QUICK) as core:
            job = await core.submit(new_job())
        lives = " ".join(actions).split("restart")
        for life in lives:
            async with running_core(Path(folder), launcher, **QUICK) as core:
                for action in life.split():
                    await _act(core, launcher, job, action)
        launcher.unreachable, launcher.ignores_directives, launcher.script = False, False, whole_run
        for gang in launcher.gangs.values():
            gang.die()
        async with running_core(Path(folder), launcher, **QUICK) as core:
            while (job := await core.until(job.uid, *STILL)).state is JobState.PAUSED:
                assert await core.store.read(attempts.live_attempts) == []
                await core.resume(job)
            return await core.events(job.uid)


async def _act(core: Core, launcher: ScriptedLauncher, job: JobRecord, action: str) -> None:
    if action in WISHES:
        with contextlib.suppress(Refused):
            await (core.cancel(job, lost=True) if action == "lost" else getattr(core, action)(job))
    elif action in ("unreachable", "reachable"):
        launcher.unreachable = action == "unreachable"
    elif action == "deaf":
        launcher.ignores_directives = not launcher.ignores_directives
    elif launcher.gangs and launcher.newest().presence is Presence.ALIVE:
        gang = launcher.newest()
        if action == "progress":
            gang.progress(len(gang.events) + 1)
        elif action == "checkpoint":
            gang.checkpoint(len(gang.events) + 1)
        elif action in ("failure", "storage"):
            gang.failure("UNKNOWN" if action == "failure" else "STORAGE_NOT_WRITABLE", step=len(gang.events))
            gang.ended(ok=False)
        elif action == "finish":
            gang.finished(9)
            gang.exported()
            gang.ended()
        else:
            getattr(gang, action)()
    await asyncio.sleep(0.02)


def _end_of(log: list[job_pb2.JobEvent]) -> JobState:
    """The last state, to which only legal steps led."""
    state, live, unreachable = JobState.QUEUED, False, False
    for event in log[1:]:
        if event.HasField("state"):
            before, state = state, JobState(shown(event))
            assert may_move(before, state), (before, state)
            assert not (live and state in STILL), f"{state} while a gang holds its slots"
        elif event.HasField("attempt_changed"):
            live = shown(event) != "attempt ENDED"
        elif event.HasField("condition"):
            assert event.condition.active is not unreachable, "a condition begins once, and ends once"
            unreachable = event.condition.active
    assert not unreachable
    return state

"""Runs a job through the core until a named point kills the process: `python -m helpers.crashing_run FOLDER POINT`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from sqlalchemy import Connection

from helpers.core import ACTOR, new_job, running_core
from helpers.crashing_trace import CrashingTrace
from helpers.scripted_launcher import ScriptedGang, ScriptedLauncher, whole_run
from shardyard.v1 import spec_pb2
from shardyard_coordinator.domain.records import CreatedJob
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.store import submissions

SPEC = spec_pb2.JobSpec(checkpoints=spec_pb2.CheckpointPolicy(keep_last=1))


def run_with_checkpoints(gang: ScriptedGang) -> None:
    """A whole run that makes two checkpoints more, of which one is one too many."""
    for step in (1, 2):
        folder = Path(gang.launch.attempt_dir) / f"step-{step:09}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text("{}")
        gang.checkpoint(step)
    whole_run(gang)


async def main(folder: Path, point: str) -> None:
    trace = CrashingTrace(point)
    async with running_core(folder, ScriptedLauncher(script=run_with_checkpoints), trace=trace) as core:
        new = new_job(request_id="r-1", fingerprint=b"same", spec=SPEC)

        def create(conn: Connection) -> CreatedJob:
            created = submissions.create_job(conn, new, ACTOR, core.clock.now_us())
            trace.point("job.inserted")
            return created

        job = (await core.store.write(create, ACTOR)).job
        trace.point("job.committed")
        await core.until(job.uid, JobState.SUCCEEDED)
        await core.collector.retention.thin(job.uid)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))

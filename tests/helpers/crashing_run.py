"""Runs a job through the core until a named point kills the process: `python -m helpers.crashing_run FOLDER POINT`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from sqlalchemy import Connection

from helpers.core import ACTOR, new_job, running_core
from helpers.crashing_trace import CrashingTrace
from helpers.scripted_launcher import ScriptedLauncher, whole_run
from shardyard_coordinator.domain.records import CreatedJob
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.store import jobs


async def main(folder: Path, point: str) -> None:
    trace = CrashingTrace(point)
    async with running_core(folder, ScriptedLauncher(script=whole_run), trace=trace) as core:
        new = new_job(request_id="r-1", fingerprint=b"same")

        def create(conn: Connection) -> CreatedJob:
            created = jobs.create_job(conn, new, ACTOR, core.clock.now_us())
            trace.point("job.inserted")
            return created

        job = (await core.store.write(create, ACTOR)).job
        trace.point("job.committed")
        await core.until(job.uid, JobState.SUCCEEDED)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))

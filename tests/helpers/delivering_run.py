"""Serves a folder and delivers its webhook, until it is killed, by itself at a point of the code or from outside.

`python -m helpers.delivering_run FOLDER URL POINT NTH` begins with a job of 30 events and a webhook, if there is none;
POINT `-` is none.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from helpers.crashing_trace import CrashingTrace
from helpers.service import PARENT, create, serving
from helpers.uploads import send_dataset
from shardyard.v1 import job_pb2, job_service_pb2
from shardyard.v1 import webhook_service_pb2 as pb
from shardyard_coordinator.domain.records import EventKind
from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.store import encode, events


async def main(folder: Path, url: str, point: str, nth: int) -> None:
    """Runs until the process is killed."""
    async with serving(folder, trace=CrashingTrace(point, nth), webhook_allow=("127.0.0.1",)) as service:
        if not (await service.jobs.ListJobs(job_service_pb2.ListJobsRequest(parent=PARENT))).jobs:
            await send_dataset(service, "corpus", {"a.txt": b"x\n"})
            webhook = pb.Webhook(url=url)
            await service.webhooks.CreateWebhook(
                pb.CreateWebhookRequest(parent=PARENT, webhook_id="hook", webhook=webhook)
            )
            request = create("story")
            request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
            job = await service.jobs.CreateJob(request)
            drafts = [
                encode.draft(EventKind.PROGRESS, job_pb2.JobEvent(progress=job_pb2.Progress(step=step)), 1)
                for step in range(29)
            ]
            await service.store.write(lambda conn: events.append(conn, job.uid, drafts, 1), SYSTEM)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])))

"""The async client: follow all running jobs at once and print each evaluation: `python examples/follow_many.py`."""

import asyncio

import shardyard


async def follow(job: shardyard.AsyncJob) -> None:
    """Print a job's evaluations until it has ended."""
    async for event in job.watch(kinds=["evaluation", "state"]):
        if event.evaluation is not None:
            print(job.id, event.evaluation.step, dict(event.evaluation.metrics))


async def main() -> None:
    """Follow every job that runs now."""
    async with shardyard.AsyncClient() as client, asyncio.TaskGroup() as tasks:
        async for job in client.jobs(filter="state = RUNNING"):
            tasks.create_task(follow(job))


if __name__ == "__main__":
    asyncio.run(main())

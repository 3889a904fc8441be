"""A whole coordinator for `bench/submit.py`, real except for its cluster: one node on which every gang runs forever.

    python bench/submit_server.py STATE_DIR

Prints its address, and that of a second server in the same loop: there `CreateJob` passes the same guard (parsing and
validation included) and does nothing. The cluster is the tests' scripted one, so that what is measured is the
coordinator alone: the door, the store with its fsyncs, and the scheduling passes over a growing queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.scripted_compute import ScriptedCompute
from helpers.scripted_launcher import ScriptedLauncher
from helpers.service import ANSWERS
from shardyard.v1 import job_pb2, job_service_pb2
from shardyard_coordinator.launch.protocols import Compute, Launcher, Node
from shardyard_coordinator.main import Coordinator
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.call import Call, method_of
from shardyard_coordinator.serve.guard import GuardedServer
from shardyard_coordinator.serve.limits import Limits
from shardyard_coordinator.serve.protection import Authentication
from shardyard_coordinator.serve.validation.requests import validate
from shardyard_coordinator.settings import LauncherKind, Settings


class OnScriptedCluster(Coordinator):
    """The composition root with other doors to the cluster, and with a door behind which nothing is."""

    def _doors(self) -> tuple[Launcher, Compute]:
        node = Node("node-1", "127.0.0.1", cpus=2, gpus=0, memory_bytes=16 << 30)
        return ScriptedLauncher(nodes=(node,)), ScriptedCompute(ANSWERS)

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[Any]:
        async with super()._running() as running:
            descriptor = job_service_pb2.DESCRIPTOR.services_by_name["JobService"].methods_by_name["CreateJob"]
            nothing = GuardedServer(
                [method_of(descriptor, job_service_pb2.CreateJobRequest, do_nothing)],
                validate,
                Limits(),
                Access(Authentication(), self._clock),
            )
            print(f"does nothing on 127.0.0.1:{nothing.bind('127.0.0.1:0')};", file=self._output, flush=True)
            await nothing.start()
            try:
                yield running
            finally:
                await nothing.stop(0)


async def do_nothing(_request: job_service_pb2.CreateJobRequest, _call: Call) -> job_pb2.Job:
    """The service behind the guard of the second server."""
    return job_pb2.Job()


if __name__ == "__main__":
    folder = sys.argv[1]
    roots = (folder, *filter(None, os.environ.get("SHARDYARD_DATA_ROOTS", "").split(",")))
    settings = Settings(state_dir=Path(folder), listen="127.0.0.1:0", launcher=LauncherKind.LOCAL, data_roots=roots)
    sys.exit(asyncio.run(OnScriptedCluster(settings, output=sys.stdout, errors=sys.stderr).run()))

"""A whole coordinator for `bench/submit.py`, real but for its cluster: one node on which every gang goes on for ever.

    python bench/submit_server.py STATE_DIR

Prints its address. The cluster is the tests' scripted one, so that what is measured is the coordinator alone: the
door, the store with its fsyncs, and the scheduling passes over a growing queue.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.scripted_compute import ScriptedCompute
from helpers.scripted_launcher import ScriptedLauncher
from helpers.service import ANSWERS
from shardyard_coordinator.launch.protocols import Compute, Launcher, Node
from shardyard_coordinator.main import Coordinator
from shardyard_coordinator.settings import LauncherKind, Settings


class OnScriptedCluster(Coordinator):
    """The composition root with other doors to the cluster."""

    def _doors(self) -> tuple[Launcher, Compute]:
        node = Node("node-1", "127.0.0.1", cpus=2, gpus=0, memory_bytes=16 << 30)
        return ScriptedLauncher(nodes=(node,)), ScriptedCompute(ANSWERS)


if __name__ == "__main__":
    import asyncio

    folder = sys.argv[1]
    settings = Settings(state_dir=Path(folder), listen="127.0.0.1:0", launcher=LauncherKind.LOCAL, data_roots=(folder,))
    sys.exit(asyncio.run(OnScriptedCluster(settings, output=sys.stdout, errors=sys.stderr).run()))

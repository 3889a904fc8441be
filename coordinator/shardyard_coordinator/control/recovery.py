"""Start-up is recovery: what was live is followed again, what was begun is finished (docs/reliability.md).

Every step may be repeated, so a crash in here is one more start.
"""

from __future__ import annotations

from shardyard_coordinator.control.collector import Collector
from shardyard_coordinator.launch.protocols import AttemptKey
from shardyard_coordinator.seams import Trace
from shardyard_coordinator.store import attempts
from shardyard_coordinator.store.store import Store


async def recover(store: Store, collector: Collector, trace: Trace) -> int:
    """Takes up every attempt that has not ended, or whose supervisor has not been let go; answers how many are live.

    It does not wait for the cluster: each attempt's follower asks until it is answered. The scheduling loop may start
    once this has returned, for all slots that are held are rows.
    """
    live = await store.read(attempts.live_attempts)
    ended = await store.read(attempts.unreleased_attempts)
    for count, attempt in enumerate([*live, *ended]):
        collector.follow(AttemptKey(attempt.job_uid, attempt.epoch))
        if count == len(live) // 2:
            trace.point("reconcile.half")
    collector.retention.start()
    return len(live)

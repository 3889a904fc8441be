"""Start-up is recovery: live attempts are followed again, and interrupted work is finished (docs/reliability.md).

Every step may be repeated, so a crash in here only means another start.
"""

from __future__ import annotations

from shardyard_coordinator.control.collector import Collector
from shardyard_coordinator.launch.protocols import AttemptKey
from shardyard_coordinator.seams import Trace
from shardyard_coordinator.store import attempts
from shardyard_coordinator.store.store import Store


async def recover(store: Store, collector: Collector, trace: Trace) -> int:
    """Follows every attempt that is live, or whose supervisor was not released; returns how many are live.

    It does not wait for the cluster: each follower asks until it gets an answer. The scheduling loop may start
    once this has returned, because every held slot is a row.
    """
    live = await store.read(attempts.live_attempts)
    ended = await store.read(attempts.unreleased_attempts)
    for count, attempt in enumerate([*live, *ended]):
        collector.follow(AttemptKey(attempt.job_uid, attempt.epoch))
        if count == len(live) // 2:
            trace.point("reconcile.half")
    collector.retention.start()
    return len(live)

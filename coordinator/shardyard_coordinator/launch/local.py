"""Runs gangs as subprocesses of the coordinator, without Ray: for laptops and tests.

A gang always ends with its coordinator. Its reports are in its spool, which `read_spool` reads by path.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.allowed import warm_folder
from shardyard_coordinator.launch.attempt import Attempt
from shardyard_coordinator.launch.folder import make_attempt_folder
from shardyard_coordinator.launch.forks import StopWatch
from shardyard_coordinator.launch.gpus import gpu_facts, usable_gpus
from shardyard_coordinator.launch.memory import usable_bytes
from shardyard_coordinator.launch.node_shape import GPU
from shardyard_coordinator.launch.protocols import AttemptKey, ClusterView, Launch, Node, Presence, StorageFailed
from shardyard_coordinator.launch.rank_env import rank_environment, rank_rights
from shardyard_coordinator.launch.rank_exit import RankExit
from shardyard_coordinator.launch.rank_process import TRAINER, RankOrders, RankProcess, write_spec
from shardyard_coordinator.launch.service_memory import ServiceMemory
from shardyard_coordinator.launch.spool import SPOOL_NAME, Spool
from shardyard_coordinator.seams import Clock

NODE_ID = "local"
_STOP_LOOK_S = 1.0


@dataclass
class _Gang:
    """A gang's supervisor core and processes."""

    attempt: Attempt
    spool: Spool
    gpus: list[str]
    ranks: list[RankProcess] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class LocalLauncher:
    """A Launcher on this machine alone.

    `program` is a module that takes the arguments of `python -m shardyard_trainer`; `environment` is added to that of
    the ranks, which cannot see the whole of `hidden`, the state folder; `patience_s` is how long their reports wait for
    a spool that cannot be written.
    """

    name = "local"

    def __init__(
        self,
        *,
        clock: Clock,
        cpus: int | None = None,
        gpus: int | None = None,
        program: str = TRAINER,
        environment: Mapping[str, str] | None = None,
        hidden: str = "",
        settle_s: float = 0.5,
        patience_s: float | None = None,
    ) -> None:
        self._clock = clock
        self._hidden = hidden
        self._cpus = cpus or len(os.sched_getaffinity(0))
        self._free_gpus = usable_gpus(gpus)
        self._gpus = len(self._free_gpus)
        self._gpu_facts = asdict(gpu_facts(self._free_gpus)) if self._free_gpus else {}
        self._program = program
        self._environment = dict(environment or {})
        self._settle_s = settle_s
        self._patience_s = patience_s
        # Gangs of an earlier process are gone with it, which a new id shows.
        self._cluster_id = f"local-{uuid.uuid4().hex}"
        self._gangs: dict[AttemptKey, _Gang] = {}
        self._dead: set[AttemptKey] = set()
        self._own = ServiceMemory()

    async def start(self) -> None:
        """Does nothing: there is nothing to connect to."""

    async def close(self, *, stop_cluster: bool) -> None:
        """Ends every gang: they cannot outlive this process."""
        await asyncio.gather(*(self.kill(key) for key in list(self._gangs)))

    async def cluster(self) -> ClusterView:
        """This machine as one node."""
        kind = GPU if self._gpus else ""
        ranks = {each.pid for gang in self._gangs.values() for each in gang.ranks}
        own = await self._own.reserved_bytes(ranks, now_s=self._clock.monotonic_s())
        node = Node(NODE_ID, "127.0.0.1", self._cpus, self._gpus, usable_bytes(), kind, own, **self._gpu_facts)
        return ClusterView(True, self._cluster_id, "local", (node,))

    async def ensure(self, launch: Launch) -> None:
        """Starts the gang unless it was started before, in this process."""
        if launch.key in self._gangs or launch.key in self._dead:
            return
        folder = Path(launch.attempt_dir)
        try:
            spool = await asyncio.to_thread(_prepare, worker_pb2.AttemptSpec.FromString(launch.spec))
        except OSError as error:
            raise StorageFailed.of(error) from error
        if launch.key in self._gangs:
            spool.close()
            return
        attempt = Attempt(
            launch.key,
            ranks=launch.workers,
            spool=spool,
            logs=folder / "logs",
            clock=self._clock,
            settle_s=self._settle_s,
            patience_s=self._patience_s,
        )
        needed = launch.workers * launch.gpus_per_worker
        gpus, self._free_gpus = self._free_gpus[:needed], self._free_gpus[needed:]
        gang = self._gangs[launch.key] = _Gang(attempt, spool, gpus)
        starting = asyncio.create_task(self._start_ranks(gang, launch))
        gang.tasks += [starting, asyncio.create_task(self._supervise(gang))]
        # Even if the caller leaves, every rank must be started and its end reported, or the gang would never end.
        await asyncio.shield(starting)

    async def lookup(self, key: AttemptKey) -> Presence:
        """ALIVE until killed, its end included; gangs of a former process are ABSENT."""
        if key in self._gangs:
            return Presence.ALIVE
        return Presence.DEAD if key in self._dead else Presence.ABSENT

    async def events_after(self, key: AttemptKey, after: int, *, timeout_s: float, limit: int) -> list[bytes]:
        """WorkerEvents with a sequence over `after`; LookupError if the gang is ABSENT or DEAD."""
        return await self._gang(key).attempt.events_after(after, timeout_s=timeout_s, limit=limit)

    async def direct(self, key: AttemptKey, directive: bytes) -> None:
        """Gives the gang a Directive; LookupError if the gang is ABSENT or DEAD."""
        self._gang(key).attempt.direct(directive)

    async def kill(self, key: AttemptKey) -> None:
        """Ends the gang's processes and waits for them; no error if there are none."""
        gang = self._gangs.get(key)
        if gang is None:
            return
        gang.attempt.fence()
        await _kill_ranks(gang)
        # Not gather: its cancellation would cancel the tasks that report ends. Ranks that start now bring new tasks.
        while pending := [task for task in gang.tasks if not task.done()]:
            await asyncio.wait(pending)
        if self._gangs.pop(key, None) is not None:
            self._dead.add(key)
            gang.spool.close()

    def _gang(self, key: AttemptKey) -> _Gang:
        if key not in self._gangs:
            raise LookupError(f"no gang of {key.job_uid} epoch {key.epoch} here")
        return self._gangs[key]

    async def _supervise(self, gang: _Gang) -> None:
        await gang.attempt.supervise(lambda: _kill_ranks(gang))
        self._free_gpus.extend(gang.gpus)

    async def _start_ranks(self, gang: _Gang, launch: Launch) -> None:
        # All at once: each may have to wait until the warm process has imported everything.
        await asyncio.gather(*(self._start_or_report(gang, launch, rank) for rank in range(launch.workers)))

    async def _start_or_report(self, gang: _Gang, launch: Launch, rank: int) -> None:
        if gang.attempt.doomed:
            gang.attempt.rank_exited(rank, RankExit(None))
            return
        try:
            if launch.workers * launch.gpus_per_worker > len(gang.gpus):
                raise OSError("its GPUs are still held by another gang")
            await self._start_rank(gang, launch, rank)
        except OSError as error:
            gang.attempt.rank_exited(rank, RankExit(None, detail=f"not started: {error}"))

    async def _start_rank(self, gang: _Gang, launch: Launch, rank: int) -> None:
        environment = rank_environment(
            launch.spec, cpus=launch.cpus_per_worker, gpus=launch.gpus_per_worker, loopback=True
        )
        if launch.gpus_per_worker:
            mine = gang.gpus[rank * launch.gpus_per_worker : (rank + 1) * launch.gpus_per_worker]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        process = await RankProcess.start(
            RankOrders(
                self._program,
                launch.attempt_dir,
                rank,
                rank,
                rights=rank_rights(launch.spec, hidden=self._hidden),
                environment=environment | self._environment,
                warm=warm_folder(self._hidden),
            )
        )
        gang.attempt.rank_started(rank, process.cold)
        gang.ranks.append(process)
        gang.tasks.append(asyncio.create_task(_watch_rank(gang.attempt, rank, process)))
        if gang.attempt.doomed:
            await _kill_ranks(gang)


async def _watch_rank(attempt: Attempt, rank: int, process: RankProcess) -> None:
    looks = asyncio.create_task(_look_whether_it_is_stopped(attempt, rank, process.pid))
    how = await process.serve(attempt.report)
    looks.cancel()
    attempt.rank_stopped(rank, None)
    attempt.rank_exited(rank, how)


async def _look_whether_it_is_stopped(attempt: Attempt, rank: int, pid: int) -> None:
    """Reports a stopped rank, which neither fails nor ends, while its peers wait for it."""
    stop = StopWatch(pid)
    while True:
        await asyncio.sleep(_STOP_LOOK_S)
        attempt.rank_stopped(rank, pid if stop.is_over() else None)


async def _kill_ranks(gang: _Gang) -> None:
    for process in gang.ranks:
        process.kill()


def _prepare(spec: worker_pb2.AttemptSpec) -> Spool:
    """Makes the attempt's folder: spec.json, logs, and the spool, an existing one being continued."""
    folder = make_attempt_folder(spec)
    write_spec(spec)
    return Spool(folder / SPOOL_NAME)

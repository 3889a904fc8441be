"""The Ray actors of one attempt: a detached supervisor, and one actor for each rank, its child process.

The supervisor outlives the coordinator and the agent; the ranks do not outlive the supervisor. Imported by Ray's
workers, so every node where they may run needs this package.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

import ray
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.launch.allowed import warm_folder
from shardyard_coordinator.launch.attempt import Attempt
from shardyard_coordinator.launch.compute_wire import answer_call, made_of
from shardyard_coordinator.launch.folder import make_attempt_folder
from shardyard_coordinator.launch.frames import Header
from shardyard_coordinator.launch.memory import MemoryWatch, OutOfMemory, monitored
from shardyard_coordinator.launch.poll import until
from shardyard_coordinator.launch.protocols import Launch, storage_cause
from shardyard_coordinator.launch.rank_env import rank_environment, rank_rights
from shardyard_coordinator.launch.rank_exit import RankExit
from shardyard_coordinator.launch.rank_process import RankOrders, RankProcess, RankSettings, write_spec
from shardyard_coordinator.launch.ray_tables import living
from shardyard_coordinator.launch.spool import SPOOL_NAME, Spool
from shardyard_coordinator.seams import SystemClock

_RESERVE_TIMEOUT_S = 60.0
_GONE_TIMEOUT_S = 10.0
_ASK_TIMEOUT_S = 2.0
# An idle node first starts a worker process.
_ASK_NODE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class _Seat:
    """A rank's place: its node, and its local rank there."""

    node: str
    local_rank: int


class Supervisor:
    """One attempt's supervisor. All its methods run in one event loop; it uses no concurrency groups.

    The first call of any method starts the gang, so a supervisor whose `ensure` call was lost still starts it.
    """

    def __init__(self, launch: Launch, ranks: RankSettings) -> None:
        self._launch = launch
        self._settings = ranks
        self._attempt: Attempt | None = None
        self._task: asyncio.Task[None] | None = None
        self._group: PlacementGroup | None = None
        self._ranks: list[Any] = []
        self._watches: list[asyncio.Task[None]] = []
        self._pids: dict[int, tuple[str, int]] = {}
        self._rank_pids: dict[int, int] = {}
        self._memory: dict[int, MemoryWatch] = {}
        self._killed: list[int] = []
        self._node = ray.get_runtime_context().get_node_id()

    async def ensure(self) -> None:
        """Starts the gang unless it was already started."""
        self._started()

    async def report(self, request: bytes) -> bytes:
        """Called by ranks: a ReportRequest in, a ReportReply out."""
        return await self._started().report(request)

    async def rank_started(self, rank: int, pid: int, cold: str | None) -> None:
        """Called by ranks' actors: a rank's process is a child of its actor only if it was started cold."""
        self._rank_pids[rank] = pid
        self._started().rank_started(rank, cold)

    async def events_after(self, after: int, timeout_s: float, limit: int) -> list[bytes]:
        """Returns WorkerEvents with sequences over `after`; waits until there is one."""
        return await self._started().events_after(after, timeout_s=timeout_s, limit=limit)

    async def direct(self, directive: bytes) -> None:
        """Passes a Directive to the gang."""
        self._started().direct(directive)

    async def answer(self) -> None:
        """Does nothing; the answer shows that this actor responds."""

    async def stop(self) -> None:
        """Ends the ranks and returns once they are confirmed gone; the caller then ends this actor."""
        self._started().fence()
        await self._kill_ranks()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_GONE_TIMEOUT_S)

    def _started(self) -> Attempt:
        if self._attempt is None:
            folder = make_attempt_folder(worker_pb2.AttemptSpec.FromString(self._launch.spec))
            self._attempt = Attempt(
                self._launch.key,
                ranks=self._launch.workers,
                spool=Spool(folder / SPOOL_NAME),
                logs=folder / "logs",
                clock=SystemClock(),
            )
            self._task = asyncio.create_task(self._run(self._attempt))
        return self._attempt

    async def _run(self, attempt: Attempt) -> None:
        supervising = asyncio.create_task(attempt.supervise(self._kill_ranks))
        try:
            try:
                await self._start_ranks(attempt)
            except ray.exceptions.RayError as error:
                self._never_started(attempt, RankExit(None, detail=str(error).partition("\n")[0][:500]))
            except OSError as error:
                detail = f"the gang was not started: {error.strerror or error}"
                self._never_started(attempt, RankExit(None, detail=detail, cause=storage_cause(error)))
            await supervising
        finally:
            if self._group is not None:
                remove_placement_group(self._group)

    def _never_started(self, attempt: Attempt, how: RankExit) -> None:
        # Ranks that are watched report their own end once the others' end has ended them.
        for rank in range(len(self._watches), self._launch.workers):
            attempt.rank_exited(rank, how)

    async def _start_ranks(self, attempt: Attempt) -> None:
        seats = _seats(self._launch)
        try:
            self._group = await self._reserve(seats)
        except TimeoutError:
            how = await self._why_not_reserved(seats)
            for rank in range(len(seats)):
                attempt.rank_exited(rank, how)
            return
        if attempt.closed:
            for rank in range(len(seats)):
                attempt.rank_exited(rank, RankExit(None))
            return
        actor = ray.remote(num_cpus=self._launch.cpus_per_worker, num_gpus=self._launch.gpus_per_worker)(RankActor)
        self._ranks = [
            actor.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            ).remote()
            for rank in range(len(seats))
        ]
        await self._write_spec(seats)
        environment = rank_environment(
            self._launch.spec,
            cpus=self._launch.cpus_per_worker,
            gpus=self._launch.gpus_per_worker,
            loopback=len({seat.node for seat in seats}) == 1,
        )
        rights = rank_rights(self._launch.spec, hidden=self._settings.hidden)
        me = ray.get_runtime_context().current_actor
        for rank, seat in enumerate(seats):
            # The order matters: an actor runs one call at a time, and the second one lasts as long as the attempt.
            where = self._ranks[rank].where.remote()
            orders = RankOrders(
                self._settings.program,
                self._launch.attempt_dir,
                rank,
                seat.local_rank,
                rights,
                environment,
                warm=warm_folder(self._settings.hidden),
            )
            run = self._ranks[rank].run.remote(orders, me)
            self._watches.append(asyncio.create_task(self._watch(attempt, rank, where, run)))

    async def _reserve(self, seats: list[_Seat]) -> PlacementGroup:
        """Reserves resources for the whole gang on the nodes chosen for it.

        Raises: TimeoutError.
        """
        bundle = {"CPU": float(max(self._launch.cpus_per_worker, 0))}
        if self._launch.gpus_per_worker:
            bundle["GPU"] = float(self._launch.gpus_per_worker)
        labels = [{"ray.io/node-id": seat.node} for seat in seats] if seats[0].node else None
        group = placement_group([dict(bundle) for _ in seats], strategy="PACK", bundle_label_selector=labels)
        self._group = group
        if not await asyncio.to_thread(group.wait, _RESERVE_TIMEOUT_S):
            raise TimeoutError
        return group

    async def _why_not_reserved(self, seats: list[_Seat]) -> RankExit:
        """A lost node is NODE_LOST; if others hold the resources, nothing is lost and the job waits in the queue."""
        alive = living(await asyncio.to_thread(ray.nodes))
        gone = next((seat.node for seat in seats if seat.node and seat.node not in alive), "")
        if gone:
            return RankExit(None, detail=f"node {gone} is gone", cause=Cause.NODE_LOST)
        detail = (
            f"the cluster did not reserve the gang's resources within {_RESERVE_TIMEOUT_S:.0f} s: others than this "
            "service hold them"
        )
        return RankExit(None, detail=detail, cause=Cause.PREEMPTED)

    async def _write_spec(self, seats: list[_Seat]) -> None:
        """Writes the ranks' spec, with the address where this gang meets. Raises: OSError."""
        spec = worker_pb2.AttemptSpec.FromString(self._launch.spec)
        if len({seat.node for seat in seats}) > 1:
            spec.rendezvous = await self._ranks[0].meeting_point.remote()
        write_spec(spec)

    async def _watch(self, attempt: Attempt, rank: int, where: Any, run: Any) -> None:
        returned = False
        try:
            node, pid, self._memory[rank] = await where
            self._pids[rank] = node, pid
            how, returned = await run, True
        except ray.exceptions.RayTaskError as error:
            how = RankExit(1, detail=str(error)[-2000:])
        except ray.exceptions.RayError as error:
            # Give the errors of its peers time to arrive, so that they are not taken for the cause.
            with attempt.asking_why():
                how = await self._how_lost(rank, error)
        attempt.rank_exited(rank, how)
        # A rank that ended well frees its actor and resources without waiting for the others.
        self._end_rank(rank, gently=returned)

    async def _how_lost(self, rank: int, error: ray.exceptions.RayError) -> RankExit:
        """The actor's error comes at once; whether the node or a lack of memory caused it, Ray's tables show later."""
        node, _ = self._pids.get(rank, ("", 0))
        detail = str(error).partition("\n")[0][:500]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ASK_TIMEOUT_S):
                nodes = await asyncio.to_thread(ray.nodes)
            if node and node not in living(nodes):
                return RankExit(None, detail=f"node {node} of rank {rank} is gone", cause=Cause.NODE_LOST)
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            said = f"rank {rank} was killed by the cluster's own memory monitor: {detail}"
            return RankExit(None, detail=said, cause=Cause.HOST_OOM, memory=monitored(str(error)))
        return RankExit(None, detail=detail, memory=await self._out_of_memory(rank, node))

    async def _out_of_memory(self, rank: int, node: str) -> OutOfMemory | None:
        """The state of the rank's memory group, read on its own node."""
        watch = self._memory.get(rank)
        if watch is None or not node:  # An actor without a node was ended by this supervisor.
            return None
        if node == self._node:
            return watch.out_of_memory()
        ask = ray.remote(num_cpus=0, max_retries=0)(MemoryWatch.out_of_memory)
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            async with asyncio.timeout(_ASK_NODE_TIMEOUT_S):
                found: OutOfMemory | None = await ask.options(scheduling_strategy=place).remote(watch)
                return found
        return None

    async def _kill_ranks(self) -> None:
        for rank in range(len(self._ranks)):
            self._end_rank(rank)
        await until(lambda: not any(_runs(pid) for pid in self._killed), timeout_s=_GONE_TIMEOUT_S)
        if self._watches:
            # For ranks on other nodes only Ray can say.
            await asyncio.wait(self._watches, timeout=_GONE_TIMEOUT_S)

    def _end_rank(self, rank: int, *, gently: bool = False) -> None:
        # Only once: the process id may belong to another process later.
        node, pid = self._pids.pop(rank, ("", 0))
        if pid and node == self._node:
            # Ray only asks a process to end: a hanging one does not react, and its children survive.
            self._killed += [*_kill_tree(pid, itself=not gently), pid]
            if not gently and (own := self._rank_pids.get(rank)):
                self._killed += _kill_tree(own, itself=True)
        ray.kill(self._ranks[rank], no_restart=True)


class ComputeActor:
    """Runs a Compute's processes on this node, the same ones that run beside a coordinator."""

    def __init__(self, settings: Header) -> None:
        self._compute = made_of(settings)

    async def start(self) -> None:
        """Starts warming up in the background."""
        await self._compute.start()

    async def call(self, payload: bytes) -> bytes:
        """Answers a call of `compute_wire`."""
        return await answer_call(self._compute, payload)

    async def confinement(self) -> Header:
        """The restrictions of the processes, in words."""
        return dict(await self._compute.confinement())


class RankActor:
    """Runs one rank as a child process that ends with it, so the trainer has none of Ray's threads and rights."""

    def where(self) -> tuple[str, int, MemoryWatch]:
        """The node, the process id, and the memory group's counters so far."""
        pid = os.getpid()
        return ray.get_runtime_context().get_node_id(), pid, MemoryWatch.of(pid)

    def meeting_point(self) -> str:
        """An address of this node where the gang can meet."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return f"tcp://{address}:{probe.getsockname()[1]}"

    def run(self, orders: RankOrders, supervisor: Any) -> RankExit:
        """Runs the rank and returns how it ended."""
        return asyncio.run(_run_rank(orders, supervisor))


async def _run_rank(orders: RankOrders, supervisor: Any) -> RankExit:
    async def report(request: bytes) -> bytes:
        try:
            reply: bytes = await supervisor.report.remote(request)
        except ray.exceptions.RayError as error:
            raise ConnectionError(str(error).partition("\n")[0]) from error
        return reply

    try:
        process = await RankProcess.start(orders)
    except OSError as error:
        return RankExit(None, detail=f"not started: {error}")
    supervisor.rank_started.remote(orders.rank, process.pid, process.cold)
    return await process.serve(report)


def _seats(launch: Launch) -> list[_Seat]:
    """The place of each rank; ranks of one node are consecutive."""
    if not launch.placement:
        return [_Seat("", rank) for rank in range(launch.workers)]
    return [_Seat(node, local_rank) for node, count in launch.placement for local_rank in range(count)]


def end_processes(pids: Sequence[int]) -> None:
    """Ends workers of this node and everything they started; returns once they are gone.

    Process ids that now belong to another kind of process are skipped. Raises: TimeoutError.
    """
    killed = [one for pid in pids if _is_worker(pid) for one in _kill_tree(pid, itself=True)]
    deadline_s = time.monotonic() + _GONE_TIMEOUT_S
    while any(_runs(pid) for pid in killed):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"processes {killed} do not end")
        time.sleep(0.01)


def _is_worker(pid: int) -> bool:
    """Recognised by the title that Ray gives its workers."""
    with contextlib.suppress(psutil.Error, IndexError):
        return psutil.Process(pid).cmdline()[0].startswith("ray::")
    return False


def _kill_tree(pid: int, *, itself: bool) -> list[int]:
    """Ends a process and everything it started; returns the process ids ended."""
    killed = []
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), *([process] if itself else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
                killed.append(one.pid)
    return killed


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

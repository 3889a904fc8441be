"""The only Ray driver: a child of the coordinator that exchanges frames with it (`agent_link`).

Ray ends a driver's whole process a minute after the cluster's control service is gone, without an exception: here that
only ends a child. Requests are answered by `agent_server`. The first frame, {"cluster_id", "address"}, says that the
cluster was reached.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ray._private import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray
from shardyard_coordinator.launch.agent_server import Methods, Unavailable, serve
from shardyard_coordinator.launch.compute_place import ComputePlace, note_error
from shardyard_coordinator.launch.frames import Header, join, pack
from shardyard_coordinator.launch.gpus import GpuFacts, gpu_facts
from shardyard_coordinator.launch.poll import until
from shardyard_coordinator.launch.protocols import AttemptKey, Launch, NodeGone, Presence, StorageFailed
from shardyard_coordinator.launch.rank_process import RankSettings
from shardyard_coordinator.launch.ray_supervisor import ComputeActor, RankActor, Supervisor, end_processes
from shardyard_coordinator.launch.ray_tables import living, node_of, place_of, processes_of

NAMESPACE = "shardyard"

_PROBE_S = 2.0
_STOP_S = 20.0
_LISTEN_S = 5.0
_GONE_S = 10.0
# A node whose workers start slowly is asked again with the next list of nodes.
_LOOK_S = 5.0
_LOOK_AT_TABLE_S = 2.0
# The server's answer to a long poll may be late by this much before the attempt counts as not answering.
_GRACE_S = 8.0

_log = logging.getLogger(__name__)


def main() -> None:
    """Connects to the cluster once, then answers until the socket is closed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--program", required=True)
    parser.add_argument("--hidden", default="")
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    _probe(arguments.address)
    ray.init(address=arguments.address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    ranks = RankSettings(arguments.program, arguments.hidden)
    asyncio.run(Agent(arguments.address, ranks).serve(socket.socket(fileno=arguments.fd)))


class Agent:
    """Answers the coordinator's requests with the help of Ray."""

    def __init__(self, address: str, ranks: RankSettings) -> None:
        self._address = address
        self._ranks = ranks
        self._handles: dict[AttemptKey, Any] = {}
        # Attempts whose processes are known to be gone.
        self._gone: set[AttemptKey] = set()
        self._compute: ComputePlace | None = None
        self._gpus: dict[str, GpuFacts] = {}
        self._methods: Methods = {
            "ping": self._ping,
            "nodes": self._nodes,
            "ensure": self._ensure,
            "lookup": self._lookup,
            "events": self._events,
            "direct": self._direct,
            "kill": self._kill,
            "warm": self._warm,
            "compute": self._call,
            "confinement": self._confinement,
        }

    async def serve(self, channel: socket.socket) -> None:
        """Answers requests until the coordinator closes the socket."""
        cluster_id = ray_state.ray._private.worker.global_worker.gcs_client.cluster_id.hex()
        hello = {"cluster_id": cluster_id, "address": self._address}
        await serve(channel, hello, self._methods, of_ray=ray.exceptions.RayError)

    async def _nodes(self, header: Header, body: bytes) -> bytes:
        await self._check_address()
        asking = asyncio.create_task(asyncio.to_thread(_nodes))
        asking.add_done_callback(note_error)  # Stop waiting for the answer once the cluster is known to be gone.
        if not (await asyncio.wait({asking}, timeout=_PROBE_S))[0]:
            # The cluster may vanish during the call: Ray itself reports that only after a minute.
            await self._check_address()
        nodes = await asking
        await asyncio.gather(*(self._look_at_gpus(node["id"]) for node in nodes if node["gpus"]))
        return pack({"nodes": [node | asdict(self._gpus.get(node["id"], GpuFacts())) for node in nodes]})

    async def _ping(self, header: Header, body: bytes) -> bytes:
        """Shows that this process runs, whatever the state of the cluster."""
        return b""

    async def _look_at_gpus(self, node: str) -> None:
        """Asks each node once about its GPUs: Ray reports how many it has, not their memory."""
        if node in self._gpus:
            return
        look = ray.remote(num_cpus=0, max_retries=0)(gpu_facts)
        try:
            async with asyncio.timeout(_LOOK_S):
                self._gpus[node] = await look.options(scheduling_strategy=_on(node)).remote()
        except (TimeoutError, ray.exceptions.RayError) as error:
            _log.warning("node %s does not report its GPUs: %s", node, error)

    async def _ensure(self, header: Header, body: bytes) -> bytes:
        key = _key(header)
        launch = Launch(
            key,
            body,
            header["attempt_dir"],
            header["workers"],
            header["cpus_per_worker"],
            header["gpus_per_worker"],
            tuple((node, count) for node, count in header["placement"]),
        )
        await asyncio.to_thread(_check_nodes, launch)
        handle = await asyncio.to_thread(_supervisor, launch, self._ranks)
        self._handles[key] = handle
        try:
            await handle.ensure.remote()
        except (ray.exceptions.ActorUnschedulableError, ray.exceptions.ActorDiedError):
            self._handles.pop(key, None)
            await asyncio.to_thread(_check_nodes, launch)
            raise
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StorageFailed):
                raise error.cause from error
            if isinstance(error.cause, OSError):
                raise StorageFailed.of(error.cause) from error
            raise
        return b""

    async def _lookup(self, header: Header, body: bytes) -> bytes:
        return (await asyncio.to_thread(_presence, _name(_key(header)))).encode()

    async def _events(self, header: Header, body: bytes) -> bytes:
        key, timeout_s = _key(header), header["timeout_s"]
        try:
            async with asyncio.timeout(timeout_s + _GRACE_S):
                events = await self._ask(
                    key, lambda handle: handle.events_after.remote(header["after"], timeout_s, header["limit"])
                )
        except TimeoutError:
            raise Unavailable(await self._why_silent(key)) from None
        return join(events)

    async def _direct(self, header: Header, body: bytes) -> bytes:
        await self._ask(_key(header), lambda handle: handle.direct.remote(body))
        return b""

    async def _kill(self, header: Header, body: bytes) -> bytes:
        key = _key(header)
        self._handles.pop(key, None)
        if key in self._gone:
            return b""
        handle, stopped = await asyncio.to_thread(_find, _name(key)), False
        if handle is not None:
            stopped = await _stop(handle)
            ray.kill(handle, no_restart=True)
            if not await until(lambda: _find(_name(key)) is None, timeout_s=_GONE_S):
                raise TimeoutError(f"supervisor {_name(key)} does not end")
        if not stopped:
            await self._end_processes(_name(key))
        self._gone.add(key)
        return b""

    async def _end_processes(self, name: str) -> None:
        """Ends the ranks of a supervisor that did not do so itself: Ray calls them dead before their processes are.

        Raises: TimeoutError; RayError.
        """
        found = await asyncio.to_thread(_processes_of, name)
        end = ray.remote(num_cpus=0, max_retries=0)(end_processes)
        async with asyncio.timeout(_GONE_S):
            await asyncio.gather(
                *(end.options(scheduling_strategy=_on(node)).remote(pids) for node, pids in found.items())
            )

    async def _ask(self, key: AttemptKey, call: Callable[[Any], Any]) -> Any:
        """Calls a supervisor and returns its answer.

        Raises: LookupError if it is ABSENT or DEAD; Unavailable, RayError, TimeoutError.
        """
        handle = self._handles.get(key) or await asyncio.to_thread(_find, _name(key))
        if handle is None:
            raise LookupError(f"there is no supervisor {_name(key)}")
        self._handles[key] = handle
        try:
            return await call(handle)
        except ray.exceptions.ActorDiedError as error:
            self._handles.pop(key, None)
            raise LookupError(f"supervisor {_name(key)} is dead") from error
        except ray.exceptions.ActorUnavailableError as error:
            raise Unavailable(await self._why_silent(key)) from error

    async def _why_silent(self, key: AttemptKey) -> str:
        """Says which does not answer: the cluster, or the attempt's supervisor, and where that is."""
        try:
            await self._check_address()
        except Unavailable as error:
            return str(error)
        where = ""
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            async with asyncio.timeout(_LOOK_AT_TABLE_S):
                where = await asyncio.to_thread(_where, _name(key))
        return f"its supervisor{where} does not answer, though the cluster does"

    async def _check_address(self) -> None:
        """Raises: Unavailable if nothing listens at the cluster's address; Ray itself would wait for a minute."""
        try:
            await asyncio.to_thread(_probe, self._address)
        except OSError as error:
            raise Unavailable(f"the cluster at {self._address} does not answer: {error.strerror or error}") from error

    async def _warm(self, header: Header, body: bytes) -> bytes:
        if self._compute is None:
            self._compute = ComputePlace(lambda: _compute_actor(header), gone=ray.exceptions.RayActorError)
        return b""

    async def _call(self, header: Header, body: bytes) -> bytes:
        if self._compute is None:
            raise Unavailable("the compute actor was not started")
        return await self._compute.call(body)

    async def _confinement(self, header: Header, body: bytes) -> bytes:
        return pack({} if self._compute is None else await self._compute.confinement())


def _probe(address: str) -> None:
    """Fails at once if nothing listens at the address; Ray itself would take most of a minute.

    Raises: OSError.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=_PROBE_S).close()


def _key(header: Header) -> AttemptKey:
    return AttemptKey(header["job_uid"], header["epoch"])


def _name(key: AttemptKey) -> str:
    return f"sy-{key.job_uid}-{key.epoch}"


def _supervisor(launch: Launch, ranks: RankSettings) -> Any:
    """The attempt's supervisor, created if it does not exist."""
    return (
        ray.remote(num_cpus=0, max_restarts=0, max_concurrency=256)(Supervisor)
        .options(
            name=_name(launch.key),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            scheduling_strategy=_on(launch.placement[0][0] if launch.placement else _node_with_cpus()),
        )
        .remote(launch, ranks)
    )


async def _compute_actor(settings: Header) -> Any:
    """A started compute actor. Raises: Unavailable."""
    try:
        actor = await asyncio.to_thread(_make_compute_actor, settings)
        await actor.start.remote()
    except ray.exceptions.RayError as error:
        _log.warning("the compute actor did not start: %s", error)
        raise Unavailable(f"the compute actor did not start: {error}".partition("\n")[0]) from error
    return actor


def _make_compute_actor(settings: Header) -> Any:
    return (
        ray.remote(num_cpus=0, max_restarts=0, max_concurrency=1000)(ComputeActor)
        .options(scheduling_strategy=_on(_node_with_cpus()))
        .remote(settings)
    )


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    """Pins an actor to a node. A hard pin: for an actor without CPUs Ray ignores a soft one and uses any node."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _check_nodes(launch: Launch) -> None:
    """Raises: NodeGone if a chosen node has left the cluster."""
    alive = living(ray.nodes())
    gone = [node for node, _ in launch.placement if node not in alive]
    if gone:
        raise NodeGone(f"node {gone[0]} is gone")


def _find(name: str) -> Any | None:
    """The handle of a living supervisor."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


async def _stop(supervisor: Any) -> bool:
    """Has the supervisor end its gang; True if it confirmed that nothing of the gang runs.

    A supervisor that does not respond at all is given less time than one that is working.
    """
    stopping = supervisor.stop.remote()
    with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
        async with asyncio.timeout(_LISTEN_S):
            await supervisor.answer.remote()
        async with asyncio.timeout(_STOP_S):
            await stopping
            return True
    return False


def _where(name: str) -> str:
    """A supervisor's process and node, in words; empty if the cluster does not know it."""
    return place_of(list(ray_state.actors().values()), name)


def _processes_of(name: str) -> dict[str, list[int]]:
    """{node: process ids} of a supervisor and its ranks, dead or alive, on nodes of the cluster."""
    actors = list(ray_state.actors().values())
    return processes_of(actors, name, children=RankActor.__name__, nodes=living(ray.nodes()))


def _presence(name: str) -> Presence:
    """A supervisor's state in the cluster's own table, which remembers the dead."""
    if _find(name) is not None:
        return Presence.ALIVE
    known = any(actor["Name"] == name for actor in ray_state.actors().values())
    return Presence.DEAD if known else Presence.ABSENT


def _nodes() -> list[Header]:
    """The living nodes and their free resources: on a shared cluster, others hold some too."""
    free = ray_state.available_resources_per_node()
    return [node_of(node, free.get(node_id)) for node_id, node in living(ray.nodes()).items()]


def _node_with_cpus() -> str:
    """The node with the most CPUs: a head node may have none. Raises: Unavailable if there is no node."""
    if not (nodes := _nodes()):
        raise Unavailable("the cluster has no node at the moment")
    return str(max(nodes, key=lambda node: node["cpus"])["id"])


if __name__ == "__main__":
    main()

"""The only Ray driver: a child of the coordinator that speaks frames with it (`agent_link`).

Ray ends a driver's whole process a minute after the cluster's control service is gone, without an exception: here that
is merely the end of a child. Requests are answered by `agent_server`. The first frame says that the cluster is reached:
{"cluster_id", "address"}.
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
    """Connects once, answers until the socket is closed."""
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
    """Answers the coordinator's requests out of Ray."""

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
        """Answers until the coordinator is gone."""
        cluster_id = ray_state.ray._private.worker.global_worker.gcs_client.cluster_id.hex()
        hello = {"cluster_id": cluster_id, "address": self._address}
        await serve(channel, hello, self._methods, of_ray=ray.exceptions.RayError)

    async def _nodes(self, header: Header, body: bytes) -> bytes:
        await self._check_address()
        asking = asyncio.create_task(asyncio.to_thread(_nodes))
        asking.add_done_callback(_note)  # Nobody waits for it any more if the cluster is found gone.
        if not (await asyncio.wait({asking}, timeout=_PROBE_S))[0]:
            # It may have gone in the middle of it: Ray says so only after a minute.
            await self._check_address()
        nodes = await asking
        await asyncio.gather(*(self._look_at_gpus(node["id"]) for node in nodes if node["gpus"]))
        return pack({"nodes": [node | asdict(self._gpus.get(node["id"], GpuFacts())) for node in nodes]})

    async def _ping(self, header: Header, body: bytes) -> bytes:
        """Says that this process is not stopped, whatever the cluster does."""
        return b""

    async def _look_at_gpus(self, node: str) -> None:
        """Asks a node once what its GPUs are: Ray reports how many it has, not how large they are."""
        if node in self._gpus:
            return
        look = ray.remote(num_cpus=0, max_retries=0)(gpu_facts)
        try:
            async with asyncio.timeout(_LOOK_S):
                self._gpus[node] = await look.options(scheduling_strategy=_on(node)).remote()
        except (TimeoutError, ray.exceptions.RayError) as error:
            _log.warning("node %s does not tell of its GPUs: %s", node, error)

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
        """Ends what a supervisor left that ended nothing itself: to Ray its ranks are dead before their processes are.

        Raises: TimeoutError; RayError.
        """
        found = await asyncio.to_thread(_processes_of, name)
        end = ray.remote(num_cpus=0, max_retries=0)(end_processes)
        async with asyncio.timeout(_GONE_S):
            await asyncio.gather(
                *(end.options(scheduling_strategy=_on(node)).remote(pids) for node, pids in found.items())
            )

    async def _ask(self, key: AttemptKey, call: Callable[[Any], Any]) -> Any:
        """A supervisor's answer.

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
        """Which of the two does not answer, for people: the cluster, or the attempt's supervisor, and where that is."""
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
        """Raises: Unavailable if nothing listens where the cluster was; Ray itself would wait for a minute."""
        try:
            await asyncio.to_thread(_probe, self._address)
        except OSError as error:
            raise Unavailable(f"the cluster at {self._address} does not answer: {error.strerror or error}") from error

    async def _warm(self, header: Header, body: bytes) -> bytes:
        if self._compute is None:
            self._compute = ComputePlace(header)
        return b""

    async def _call(self, header: Header, body: bytes) -> bytes:
        if self._compute is None:
            raise Unavailable("the compute actor was not started")
        return await self._compute.call(body)

    async def _confinement(self, header: Header, body: bytes) -> bytes:
        return pack({} if self._compute is None else await self._compute.confinement())


class ComputePlace:
    """The actor with the compute processes: one, replaced when it is found gone."""

    def __init__(self, settings: Header) -> None:
        self._settings = settings
        self._actor: Any = None
        self._starting = asyncio.Lock()
        self._beginning = self._begin()

    async def call(self, payload: bytes) -> bytes:
        """The answer to a call. Raises: Unavailable; RayError if the actor is gone."""
        actor = await self._living()
        try:
            answer: bytes = await actor.call.remote(payload)
        except ray.exceptions.RayActorError as error:
            self._replace(actor)
            raise Unavailable(f"the compute actor is gone: {error}".partition("\n")[0]) from error
        return answer

    async def confinement(self) -> Header:
        """What its processes may not do; empty: not known, as they are being started."""
        actor = self._actor
        if actor is not None:
            with contextlib.suppress(ray.exceptions.RayActorError):
                return dict(await actor.confinement.remote())
        self._replace(actor)
        return {}

    def _begin(self) -> asyncio.Task[Any]:
        beginning = asyncio.create_task(self._living())
        beginning.add_done_callback(_note)  # The next question tries again.
        return beginning

    def _replace(self, gone: Any) -> None:
        """Begins with another one, unless that has been done."""
        if self._actor is gone:
            self._actor = None
            if self._beginning.done():
                self._beginning = self._begin()

    async def _living(self) -> Any:
        async with self._starting:
            if self._actor is None:
                try:
                    actor = await asyncio.to_thread(_compute_actor, self._settings)
                    await actor.start.remote()
                except ray.exceptions.RayError as error:
                    _log.warning("the compute actor did not start: %s", error)
                    raise Unavailable(f"the compute actor did not start: {error}".partition("\n")[0]) from error
                self._actor = actor
            return self._actor


def _probe(address: str) -> None:
    """Fails at once if nothing listens: Ray itself would take most of a minute to fail.

    Raises: OSError.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=_PROBE_S).close()


def _note(asked: asyncio.Task[Any]) -> None:
    if not asked.cancelled():
        asked.exception()


def _key(header: Header) -> AttemptKey:
    return AttemptKey(header["job_uid"], header["epoch"])


def _name(key: AttemptKey) -> str:
    return f"sy-{key.job_uid}-{key.epoch}"


def _supervisor(launch: Launch, ranks: RankSettings) -> Any:
    """The attempt's supervisor, made if it is not there."""
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


def _compute_actor(settings: Header) -> Any:
    return (
        ray.remote(num_cpus=0, max_restarts=0, max_concurrency=1000)(ComputeActor)
        .options(scheduling_strategy=_on(_node_with_cpus()))
        .remote(settings)
    )


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    """On that node and no other: of an actor without CPUs Ray ignores a mere wish, and puts it on any node."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _check_nodes(launch: Launch) -> None:
    """Raises: NodeGone if a node that was chosen is no longer there."""
    alive = living(ray.nodes())
    gone = [node for node, _ in launch.placement if node not in alive]
    if gone:
        raise NodeGone(f"node {gone[0]} is gone")


def _find(name: str) -> Any | None:
    """The handle of a supervisor that is not dead."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


async def _stop(supervisor: Any) -> bool:
    """Has the supervisor end its gang; whether it said that nothing of it runs. One that does not even listen is not
    waited for as long as one that is at work."""
    stopping = supervisor.stop.remote()
    with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
        async with asyncio.timeout(_LISTEN_S):
            await supervisor.answer.remote()
        async with asyncio.timeout(_STOP_S):
            await stopping
            return True
    return False


def _where(name: str) -> str:
    """The process and the node of a supervisor, in words; empty if the cluster does not know it."""
    return place_of(list(ray_state.actors().values()), name)


def _processes_of(name: str) -> dict[str, list[int]]:
    """{node: processes} of a supervisor and its ranks, dead or alive, on nodes that are there."""
    actors = list(ray_state.actors().values())
    return processes_of(actors, name, children=RankActor.__name__, nodes=living(ray.nodes()))


def _presence(name: str) -> Presence:
    """What the cluster's own table says of a supervisor; it remembers the dead."""
    if _find(name) is not None:
        return Presence.ALIVE
    known = any(actor["Name"] == name for actor in ray_state.actors().values())
    return Presence.DEAD if known else Presence.ABSENT


def _nodes() -> list[Header]:
    """The nodes that live, and what is held of each: on a cluster that is shared, others hold some of it, too."""
    free = ray_state.available_resources_per_node()
    return [node_of(node, free.get(node_id)) for node_id, node in living(ray.nodes()).items()]


def _node_with_cpus() -> str:
    """A node that gangs may live on; any if there is none at the moment. Raises: Unavailable."""
    if not (nodes := _nodes()):
        raise Unavailable("the cluster has no node at the moment")
    return str(max(nodes, key=lambda node: node["cpus"])["id"])


if __name__ == "__main__":
    main()

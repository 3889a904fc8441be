"""Launcher and Compute on Ray, without Ray in this process: everything goes through the agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.launch.agent_link import AgentError, AgentLink
from shardyard_coordinator.launch.allowed import Folders
from shardyard_coordinator.launch.compute_wire import read_answer, settings_of
from shardyard_coordinator.launch.frames import Header, pack, split, unpack
from shardyard_coordinator.launch.process_compute import ANSWERER, WARM, Size
from shardyard_coordinator.launch.protocols import (
    AttemptKey,
    ClusterView,
    ComputeUnavailable,
    Launch,
    Node,
    NodeGone,
    Presence,
    StorageFailed,
    Unreachable,
)
from shardyard_coordinator.launch.rank_process import TRAINER, RankSettings
from shardyard_coordinator.launch.ray_head import EmbeddedHead

_ASK_S = 10.0
_ENSURE_S = 90.0
# A supervisor may take 20 s to end a gang that hangs, and 10 s to be gone itself.
_KILL_S = 45.0
# Beyond the agent's own limit for a long poll.
_POLL_GRACE_S = 14.0
# A question may wait any time for its turn; after that the process limits it.
_COMPUTE_S = 600.0
_CONFINEMENT_S = 1.0
_STORAGE_CAUSES = {
    cause.value: cause for cause in (Cause.STORAGE_FULL, Cause.STORAGE_NOT_WRITABLE, Cause.STORAGE_UNAVAILABLE)
}


class RayLauncher:
    """Runs attempts on Ray: on a private one on loopback, or on the one at `address`.

    With `head`, `start` starts that Ray or finds it again; it outlives this process unless `close(stop_cluster=True)`.
    `program` is a module that takes the arguments of `python -m shardyard_trainer`; ranks cannot see the whole of
    `hidden`, the state folder.
    """

    name = "ray"

    def __init__(
        self,
        *,
        log: Path,
        head: EmbeddedHead | None = None,
        address: str = "",
        program: str = TRAINER,
        environment: Mapping[str, str] | None = None,
        hidden: str = "",
        agent_hung_s: float = 30.0,
    ) -> None:
        if (head is None) == (address == ""):
            raise ValueError("either an embedded head or an address")
        self._head = head
        self.link = AgentLink(
            head=head,
            address=address,
            ranks=RankSettings(program, hidden),
            log=log,
            environment=environment,
            hung_s=agent_hung_s,
        )
        self._view = ClusterView(False, "", address, ())
        # The cluster that each attempt was last seen on: on another cluster it is dead, although unknown there.
        self._seen_on: dict[AttemptKey, str] = {}

    async def start(self) -> None:
        """Starts connecting in the background, retrying forever; returns at once."""
        await self.link.start()

    async def close(self, *, stop_cluster: bool) -> None:
        """Ends the agent; with `stop_cluster` also a Ray that this service started."""
        await self.link.close()
        if stop_cluster and self._head is not None:
            await self._head.stop()

    async def cluster(self) -> ClusterView:
        """The current cluster; with its last known id if it does not answer."""
        try:
            if not self.link.connected:
                raise Unreachable(self.link.message)
            header, _ = unpack(await self.link.ask({"method": "nodes"}, timeout_s=_ASK_S, hurry=True))
        except (Unreachable, AgentError) as error:
            self._view = replace(self._view, connected=False, nodes=(), message=str(error))
            return self._view
        nodes = tuple(Node(**node) for node in header["nodes"] if node["cpus"] > 0)
        self._view = ClusterView(True, self.link.cluster_id, self.link.address, nodes)
        return self._view

    async def ensure(self, launch: Launch) -> None:
        """Starts the attempt's supervisor unless it is there already."""
        header = {
            "attempt_dir": launch.attempt_dir,
            "workers": launch.workers,
            "cpus_per_worker": launch.cpus_per_worker,
            "gpus_per_worker": launch.gpus_per_worker,
            "placement": launch.placement,
        }
        self._seen_on[launch.key] = self.link.cluster_id
        await self._ask("ensure", launch.key, header, launch.spec, timeout_s=_ENSURE_S)

    async def lookup(self, key: AttemptKey) -> Presence:
        """The presence of the attempt's supervisor; DEAD also if its cluster is gone."""
        presence = Presence((await self._ask("lookup", key, timeout_s=_ASK_S)).decode())
        if presence == Presence.ALIVE:
            self._seen_on[key] = self.link.cluster_id
        elif self._seen_on.get(key, self.link.cluster_id) != self.link.cluster_id:
            return Presence.DEAD
        return presence

    async def events_after(self, key: AttemptKey, after: int, *, timeout_s: float, limit: int) -> list[bytes]:
        """WorkerEvents with a sequence over `after`, in order; waits up to `timeout_s` for the first."""
        header = {"after": after, "timeout_s": timeout_s, "limit": limit}
        return split(await self._ask("events", key, header, timeout_s=timeout_s + _POLL_GRACE_S))

    async def direct(self, key: AttemptKey, directive: bytes) -> None:
        """Sends the gang a Directive; LookupError if the attempt is ABSENT or DEAD."""
        await self._ask("direct", key, body=directive, timeout_s=_ASK_S)

    async def kill(self, key: AttemptKey) -> None:
        """Ends ranks and supervisor and returns when they are gone; no error if there are none."""
        await self._ask("kill", key, timeout_s=_KILL_S)
        self._seen_on.pop(key, None)

    async def _ask(
        self, method: str, key: AttemptKey, header: Header | None = None, body: bytes = b"", *, timeout_s: float
    ) -> bytes:
        request = {"method": method, "job_uid": key.job_uid, "epoch": key.epoch, **(header or {})}
        try:
            return await self.link.ask(request, body, timeout_s=timeout_s)
        except AgentError as error:
            if error.kind == "node":
                raise NodeGone(str(error)) from error
            if error.kind == "lookup":
                raise LookupError(str(error)) from error
            if error.kind in _STORAGE_CAUSES:
                raise StorageFailed(str(error), _STORAGE_CAUSES[error.kind]) from error
            raise Unreachable(str(error)) from error


class RayCompute:
    """A ProcessCompute on a node of the cluster: an actor has its processes, and Ray only places it.

    Shares the launcher's agent, and starts and ends with it.
    """

    def __init__(
        self,
        link: AgentLink,
        *,
        log: Path,
        size: Size | None = None,
        folders: Folders | None = None,
        warm: Sequence[str] = WARM,
        answerer: str = ANSWERER,
        environment: Mapping[str, str] | None = None,
        secrets_dir: str = "",
    ) -> None:
        self._link = link
        self._settings = {"method": "warm"} | settings_of(
            log=str(log),
            size=size or Size(),
            folders=folders or Folders(),
            warm=tuple(warm),
            answerer=answerer,
            environment=environment or {},
            secrets_dir=secrets_dir,
        )

    async def start(self) -> None:
        """Starts warming up; returns at once."""
        await self._link.at_each_connection(self._settings)

    async def close(self) -> None:
        """The processes end with the agent."""

    async def inspect(
        self,
        function: str,
        request: bytes,
        *,
        caller: tuple[str, ...],
        cpu_s: float,
        route: bytes = b"",
        network: bool = False,
        secrets: Sequence[str] = (),
    ) -> bytes:
        """Calls `package.module:function` in a separate process; see `protocols.Compute`."""
        options = {
            "caller": caller,
            "cpu_s": cpu_s,
            "route": route.hex(),
            "network": network,
            # Names only: values are read where the processes are.
            "secrets": list(secrets),
        }
        return await self._call({"verb": "inspect", "function": function, "options": options}, request)

    async def ask(self, function: str, model: str, request: bytes, *, caller: tuple[str, ...], turn_s: float) -> bytes:
        """Asks the model's process; see `protocols.Compute`."""
        options = {"caller": caller, "turn_s": turn_s}
        return await self._call({"verb": "ask", "function": function, "model": model, "options": options}, request)

    async def confinement(self) -> Mapping[str, str]:
        """The restrictions of the current actor; a later one may be on another node. Empty if none answers."""
        if self._link.connected:
            with suppress(Unreachable, AgentError):
                answer = await self._link.ask({"method": "confinement"}, timeout_s=_CONFINEMENT_S, hurry=True)
                return {str(name): str(text) for name, text in unpack(answer)[0].items()}
        return {}

    async def _call(self, header: Header, body: bytes) -> bytes:
        try:
            answer = await self._link.ask({"method": "compute"}, pack(header, body), timeout_s=_COMPUTE_S)
        except (Unreachable, AgentError) as error:
            raise ComputeUnavailable(str(error)) from error
        return read_answer(answer)

"""The coordinator's end of the Ray agent: keeps one running, and multiplexes requests to it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from shardyard_coordinator.launch.child import kill_group, start_child
from shardyard_coordinator.launch.frames import Header, frame, pack, read_frame, unpack
from shardyard_coordinator.launch.poll import until
from shardyard_coordinator.launch.protocols import Unreachable
from shardyard_coordinator.launch.rank_process import RankSettings
from shardyard_coordinator.launch.ray_head import EmbeddedHead, HeadFailed

_CONNECT_TIMEOUT_S = 90.0
_BACKOFF_FIRST_S = 0.2
_BACKOFF_MAX_S = 15.0
_HEAD_CHECK_S = 0.5
_PING_EVERY_S = 1.0
# Longer than it takes to start an agent: that alone is not worth a report.
_PATIENCE_S = 8.0

_log = logging.getLogger(__name__)


class AgentError(Exception):
    """The agent's answer is an error; `kind` is one of the agent's."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class AgentLink:
    """One agent at a time, started again with back-off, forever.

    With a `head`, the agent's Ray is started or found first, and replaced when it dies; else `address` is the user's
    own Ray. An agent that does not answer (it was stopped, or hangs) is not `connected` after `late_s`, and is replaced
    after `hung_s`.
    """

    def __init__(
        self,
        *,
        head: EmbeddedHead | None,
        address: str,
        ranks: RankSettings,
        log: Path,
        environment: Mapping[str, str] | None = None,
        late_s: float = 3.0,
        hung_s: float = 30.0,
    ) -> None:
        self._late_s = late_s
        self._hung_s = hung_s
        self._is_late = False
        self._head = head
        self._fixed_address = address
        self._ranks = ranks
        self._log_path = log
        self._extra = dict(environment or {})
        self._numbers = itertools.count(1)
        self._hurried: set[int] = set()
        self._waiting: dict[int, asyncio.Future[tuple[Header, bytes]]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._on_connect: list[tuple[Header, bytes]] = []
        self.cluster_id = ""
        self.address = address
        self.message = "not connected yet"
        self.agent_pid = 0

    async def start(self) -> None:
        """Starts connecting; returns at once."""
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Ends the agent; the cluster continues."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    @property
    def connected(self) -> bool:
        """Whether there is an agent that has reached the cluster and answers."""
        return self._writer is not None and not self._is_late

    async def at_each_connection(self, header: Header, body: bytes = b"") -> None:
        """Sends a request now, if there is an agent, and to each later one as its first."""
        self._on_connect.append((header, body))
        if self.connected:
            with contextlib.suppress(Unreachable):
                await self.ask(header, body, timeout_s=_CONNECT_TIMEOUT_S)

    async def ask(self, header: Header, body: bytes = b"", *, timeout_s: float, hurry: bool = False) -> bytes:
        """The agent's answer. If no agent is connected yet, waits for one as long as for an answer.

        `hurry`: gives up as soon as the agent is known not to answer.
        Raises: Unreachable if there is no agent, it goes away, or does not answer in time; AgentError.
        """
        if not await until(lambda: self.connected, timeout_s=min(timeout_s, _PATIENCE_S)):
            raise Unreachable(self.message)
        number = next(self._numbers)
        answer: asyncio.Future[tuple[Header, bytes]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        if hurry:
            self._hurried.add(number)
        try:
            async with asyncio.timeout(timeout_s):
                if self._writer is None:
                    raise Unreachable(self.message)
                self._writer.write(frame(pack(header | {"id": number}, body)))
                reply, result = await answer
        except TimeoutError:
            if self._head is not None and not self._head.intact():
                # It answers, but starts no workers any more: once its agent has ended, Ray is checked and replaced.
                _log.warning("Ray at %s runs, but its files are gone", self.address)
                kill_group(self.agent_pid)
            raise Unreachable(f"the cluster at {self.address} did not answer within {timeout_s:g} s") from None
        except ConnectionError as error:
            raise Unreachable(str(error)) from error
        finally:
            self._waiting.pop(number, None)
            self._hurried.discard(number)
        if "error" in reply:
            raise AgentError(reply["error"], reply["text"])
        return result

    async def _keep(self) -> None:
        backoff_s = _BACKOFF_FIRST_S
        while True:
            try:
                self.address = self._fixed_address if self._head is None else await self._head.ensure()
                was_connected = await self._run_agent()
            except (HeadFailed, OSError) as error:
                self.message = str(error)
                was_connected = False
            _log.warning("no agent: %s", self.message)
            backoff_s = _BACKOFF_FIRST_S if was_connected else min(2 * backoff_s, _BACKOFF_MAX_S)
            await asyncio.sleep(backoff_s)

    async def _run_agent(self) -> bool:
        """Runs one agent from start to end; returns whether it reached the cluster."""
        environment = dict(os.environ) if self._head is None else self._head.environment()
        # Always set: otherwise a token in the home folder would switch authentication on.
        environment.setdefault("RAY_AUTH_MODE", "disabled")
        environment["RAY_ADDRESS"] = self.address
        if self.address.startswith("127."):
            # Otherwise Ray replaces a loopback address with the machine's outer one, where nothing listens.
            environment.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        with self._log_path.open("ab") as log:
            process, ours = await start_child(
                [
                    *("-m", "shardyard_coordinator.launch.ray_agent"),
                    *("--address", self.address, "--program", self._ranks.program, "--hidden", self._ranks.hidden),
                ],
                fd_option="--fd",
                environment=environment | self._extra,
                stdout=log,
                stderr=log,
            )
        self.agent_pid = process.pid
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        watch = asyncio.create_task(self._watch_head(process.pid))
        ping: asyncio.Task[None] | None = None
        try:
            hello = await self._hello(reader)
            if hello is None:
                step = "" if self._head else "start it there, or give `shardyard serve` another --ray-address; "
                self.message = f"Ray at {self.address} cannot be reached; {step}see {self._log_path}"
                return False
            self.cluster_id = hello["cluster_id"]
            self._writer = writer
            self.message = ""
            ping = asyncio.create_task(self._watch_agent(process.pid, writer))
            for header, body in self._on_connect:
                writer.write(frame(pack(header | {"id": 0}, body)))
            await self._read_answers(reader)
            self.message = f"the connection to Ray at {self.address} was lost"
            return True
        finally:
            self._writer = None
            self._is_late = False
            watch.cancel()
            if ping is not None:
                ping.cancel()
            kill_group(process.pid)
            writer.close()
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(ConnectionError(f"the connection to Ray at {self.address} was lost"))
                    answer.exception()  # Retrieved here too, in case the caller has left, as that of a ping has.

    async def _hello(self, reader: asyncio.StreamReader) -> Header | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                first = await read_frame(reader)
            return None if first is None else unpack(first)[0]
        return None

    async def _read_answers(self, reader: asyncio.StreamReader) -> None:
        while (payload := await read_frame(reader)) is not None:
            header, body = unpack(payload)
            answer = self._waiting.get(header["id"])
            if answer is not None and not answer.done():
                answer.set_result((header, body))

    async def _watch_agent(self, pid: int, writer: asyncio.StreamWriter) -> None:
        """Pings the agent, reports if it does not answer, and ends it if it stays silent."""
        while True:
            number = next(self._numbers)
            answer: asyncio.Future[tuple[Header, bytes]] = asyncio.get_running_loop().create_future()
            self._waiting[number] = answer
            writer.write(frame(pack({"method": "ping", "id": number})))
            await asyncio.wait({answer}, timeout=self._late_s)
            if not answer.done():
                self._is_late = True
                self.message = f"the Ray agent, process {pid}, does not answer; it is replaced after {self._hung_s:g} s"
                _log.warning("the Ray agent: %s", self.message)
                for hurried in self._hurried:
                    if not self._waiting[hurried].done():
                        self._waiting[hurried].set_exception(ConnectionError(self.message))
                await asyncio.wait({answer}, timeout=self._hung_s - self._late_s)
            self._waiting.pop(number, None)
            if not answer.done():
                kill_group(pid)
                return
            if self._is_late:
                self._is_late, self.message = False, ""
            await asyncio.sleep(_PING_EVERY_S)

    async def _watch_head(self, agent_pid: int) -> None:
        """Ends the agent when its head is gone, because Ray would take a minute to do so."""
        if self._head is None:
            return
        head = self._head
        await until(lambda: not head.alive(), timeout_s=None, every_s=_HEAD_CHECK_S)
        kill_group(agent_pid)

"""Keeps the gateway's process: starts it, starts it again if it ends, and ends it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shardyard_coordinator.launch.child import kill_group, start_child
from shardyard_coordinator.serve.protection import TlsFiles

PACKAGES = ("connectrpc", "uvicorn")
_START_S = 60.0
_END_S = 10.0
_AGAIN_S = 1.0
_SOCKET = "http.sock"
_MOST_PATH = 107

_log = logging.getLogger(__name__)


def missing_packages() -> list[str]:
    """What the gateway needs and is not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@contextlib.contextmanager
def place_of_door(state_dir: Path) -> Iterator[Path]:
    """Where the service listens for its gateway: in the state directory, which only this account can enter.

    If its path is too long for a socket, in a new folder of the same kind. Raises: OSError.
    """
    if len(os.fsencode(place := state_dir.absolute() / _SOCKET)) <= _MOST_PATH:
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="shardyard-") as folder:
        yield Path(folder) / _SOCKET


@dataclass(frozen=True)
class Answering:
    """How HTTP is answered at `listen`, and how the service is called: over the socket `service`, with its secret.

    `tls` are the service's files; None: without. `is_local`: only this machine reaches it.
    """

    listen: str
    service: Path
    secret: str = field(repr=False)
    tls: TlsFiles | None
    log: Path
    is_local: bool


class Gateway:
    """JSON over HTTP, in a process of its own."""

    def __init__(self, how: Answering) -> None:
        self._how = how
        self._listen = how.listen
        self._log_path = how.log
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Starts it; its port. Raises: OSError if it cannot listen there."""
        process, control, port = await self._launch()
        # A port that was chosen by the system stays the same from now on.
        self._listen = f"{self._listen.rpartition(':')[0]}:{port}"
        self._keeping = asyncio.create_task(self._keep(process, control))
        return port

    async def close(self) -> None:
        """Ends it: open requests have some seconds."""
        if self._keeping is not None:
            self._keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeping

    async def _keep(self, process: asyncio.subprocess.Process, control: socket.socket) -> None:
        while True:
            try:
                code = await process.wait()
            except asyncio.CancelledError:
                control.close()
                await _ended(process)
                raise
            control.close()
            _log.error("the HTTP gateway ended with code %d; its log is %s; it is started again", code, self._log_path)
            process, control = await self._again()

    async def _again(self) -> tuple[asyncio.subprocess.Process, socket.socket]:
        while True:
            await asyncio.sleep(_AGAIN_S)
            try:
                process, control, _ = await self._launch()
            except OSError as error:
                _log.error("the HTTP gateway does not start: %s", error)
            else:
                return process, control

    async def _launch(self) -> tuple[asyncio.subprocess.Process, socket.socket, int]:
        arguments = ["-P", "-m", "shardyard_coordinator.web.gateway", "--listen", self._listen]
        arguments += ["--service", str(self._how.service), *(["--local"] if self._how.is_local else [])]
        if self._how.tls is not None:
            arguments += ["--tls", *map(str, self._how.tls.all)]
        with self._log_path.open("ab") as log:
            process, control = await start_child(
                arguments, fd_option="--fd", environment=os.environ, stdout=log, stderr=log
            )
        try:
            # Not among the arguments, nor in the environment, which others can read.
            control.sendall(f"{self._how.secret}\n".encode())
            return process, control, await self._port(control)
        except BaseException:
            control.close()
            kill_group(process.pid)
            await process.wait()
            raise

    async def _port(self, control: socket.socket) -> int:
        """What the process says about its port. Raises: OSError."""
        control.setblocking(False)
        said = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_S):
                while not said.endswith(b"\n"):
                    part = await asyncio.get_running_loop().sock_recv(control, 4096)
                    if not part:
                        break
                    said += part
        answer = json.loads(said) if said.endswith(b"\n") else {"error": f"its process ended; see {self._log_path}"}
        if "error" in answer:
            text = f"cannot answer HTTP on {self._listen}: {answer['error']}; choose another address with --http"
            raise OSError(text)
        return int(answer["port"])


async def _ended(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        kill_group(process.pid)
        await process.wait()

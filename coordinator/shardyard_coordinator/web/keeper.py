"""Keeps the gateway's process: starts it, starts it again if it ends, and ends it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import socket
from pathlib import Path

from shardyard_coordinator.launch.child import kill_group, start_child

PACKAGES = ("connectrpc", "uvicorn")
_START_S = 60.0
_END_S = 10.0
_AGAIN_S = 1.0

_log = logging.getLogger(__name__)


def missing_packages() -> list[str]:
    """What the gateway needs and is not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


class Gateway:
    """JSON over HTTP at `listen`, for the service at `service`. `is_local`: only this machine reaches it."""

    def __init__(self, *, listen: str, service: str, log: Path, is_local: bool) -> None:
        self._listen = listen
        self._service = service
        self._log_path = log
        self._is_local = is_local
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
        arguments += ["--service", self._service, *(["--local"] if self._is_local else [])]
        with self._log_path.open("ab") as log:
            process, control = await start_child(
                arguments, fd_option="--fd", environment=os.environ, stdout=log, stderr=log
            )
        try:
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

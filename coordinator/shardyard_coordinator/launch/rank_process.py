"""A rank as a child process of its watcher, under both launchers: its start, its reports, and how it ended."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import DecodeError

from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.child import kill_group, start_child
from shardyard_coordinator.launch.frames import FrameError, frame, read_frame
from shardyard_coordinator.launch.inherited import without_secrets
from shardyard_coordinator.launch.memory import EXIT_KILLED, MemoryWatch
from shardyard_coordinator.launch.rank_env import FOREIGN
from shardyard_coordinator.launch.rank_exit import RankExit
from shardyard_coordinator.launch.warm_rank import StartsCold, WarmRank, start_warm

TRAINER = "shardyard_trainer"
"""The module that a rank runs: it takes the arguments of `python -m shardyard_trainer`."""

# The module that confines a rank before it runs.
_CONFINED_RANK = "shardyard_coordinator.launch.confined_rank"

# A rank does not talk to Ray, so it gets neither Ray's addresses nor its token.
_OF_RAY = "RAY_"

# How long to read a dead rank's last reports from its socket; its children may keep the other end open.
_DRAIN_S = 0.3

_log = logging.getLogger(__name__)


class RankSettings(NamedTuple):
    """The module that ranks run, and the state folder, of which they see only their own part (empty: none)."""

    program: str
    hidden: str


@dataclass(frozen=True)
class RankOrders:
    """What a rank runs: a module, the spec in an attempt's folder, and the rights from `rank_env.rank_rights`.

    `environment` is added to that of the process that starts it. `warm` is the folder of a `fork_server`; empty: none.
    """

    program: str
    attempt_dir: str
    rank: int
    local_rank: int
    rights: Mapping[str, list[str]]
    environment: Mapping[str, str]
    warm: str = ""

    @property
    def arguments(self) -> list[str]:
        """Those of the program."""
        place = ["--rank", str(self.rank), "--local-rank", str(self.local_rank)]
        return [str(Path(self.attempt_dir) / "spec.json"), *place]


class RankProcess:
    """A running rank. Its process ends together with the process that started it.

    `cold` says why it is not a fork of a warm process: empty if it is one, None if it was not to be one.
    """

    def __init__(
        self,
        rank: int,
        process: asyncio.subprocess.Process | WarmRank,
        reports: socket.socket,
        *,
        cold: str | None = None,
    ) -> None:
        self.cold = cold
        self._rank = rank
        self._process = process
        self._reports = reports
        self._memory = MemoryWatch.of(process.pid)

    @classmethod
    async def start(cls, orders: RankOrders) -> RankProcess:
        """Starts the rank; its output, failed imports included, goes to the attempt's logs. Raises: OSError."""
        folder, environment = Path(orders.attempt_dir), _inherited() | dict(orders.environment)
        cold: str | None = None
        with _log_file(folder, orders.rank, "stdout") as stdout, _log_file(folder, orders.rank, "stderr") as stderr:
            if _starts_warm(orders):
                try:
                    started = await start_warm(
                        Path(orders.warm),
                        program=orders.program,
                        arguments=orders.arguments,
                        environment=environment,
                        rights=orders.rights,
                        stdout=stdout,
                        stderr=stderr,
                    )
                    return cls(orders.rank, *started, cold="")
                except StartsCold as error:
                    cold = str(error)
                    _log.info("rank %s starts cold: %s", orders.rank, cold)
            process, ours = await start_child(
                ["-P", "-m", _CONFINED_RANK, json.dumps(dict(orders.rights)), orders.program, *orders.arguments],
                fd_option="--report-fd",
                environment=environment,
                stdout=stdout,
                stderr=stderr,
            )
        return cls(orders.rank, process, ours, cold=cold)

    @property
    def pid(self) -> int:
        """The process id on this machine."""
        return self._process.pid

    async def serve(self, report: Callable[[bytes], Awaitable[bytes]]) -> RankExit:
        """Forwards the rank's ReportRequests until its process is gone; returns how it ended."""
        serving = asyncio.create_task(self._serve_reports(report))
        code = await self._process.wait()
        await asyncio.wait([serving], timeout=_DRAIN_S)
        serving.cancel()
        kill_group(self._process.pid)
        return _how_ended(code, self._memory)

    def kill(self) -> None:
        """Ends the rank and everything it started, unless it has already ended."""
        if self._process.returncode is None:
            kill_group(self._process.pid)

    async def _serve_reports(self, report: Callable[[bytes], Awaitable[bytes]]) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=self._reports)
        try:
            while (request := await read_frame(reader)) is not None:
                writer.write(frame(await report(request)))
                await writer.drain()
        except (OSError, FrameError, DecodeError) as error:
            # Closing the socket informs the rank; the receiver has already kept what it needs.
            _log.warning("reports of rank %s: %s", self._rank, error)
        finally:
            writer.close()


def write_spec(spec: worker_pb2.AttemptSpec) -> None:
    """Writes the spec for the ranks into the attempt's folder. Raises: OSError."""
    folder = Path(spec.attempt_dir)
    with _private(folder / "spec.json", os.O_TRUNC) as file:
        file.write(MessageToJson(spec).encode())
    # Remove the meeting point of an interrupted launch: these ranks would wait for its ranks.
    (folder / "rendezvous").unlink(missing_ok=True)


def _inherited() -> dict[str, str]:
    own = without_secrets(os.environ)
    return {name: value for name, value in own.items() if name not in FOREIGN and not name.startswith(_OF_RAY)}


def _starts_warm(orders: RankOrders) -> bool:
    """Not with GPUs: the warm process was made for CPUs, before anything knew which devices a rank gets."""
    return bool(orders.warm) and orders.environment.get("DS_ACCELERATOR") == "cpu"


def _log_file(folder: Path, rank: int, name: str) -> IO[bytes]:
    return _private(folder / "logs" / f"rank-{rank}.{name}.log", os.O_APPEND)


def _private(path: Path, flag: int) -> IO[bytes]:
    """Opens a file for writing, private to this account whatever the umask of a cluster is. Raises: OSError."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flag, 0o600), "wb")


def _how_ended(code: int, memory: MemoryWatch) -> RankExit:
    """Memory counts as the reason only if the process was killed: otherwise another process caused the pressure."""
    killed = code in (-signal.SIGKILL, EXIT_KILLED)
    out = memory.out_of_memory() if killed else None
    return RankExit(code, memory=out) if code >= 0 else RankExit(None, -code, memory=out)

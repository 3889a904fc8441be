"""Servers of warm ranks that import nothing heavy, and what is started by them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from helpers.launches import TESTS
from shardyard_coordinator.launch import warm_rank
from shardyard_coordinator.launch.allowed import Folders
from shardyard_coordinator.launch.fork_server import SOCKET, in_folder
from shardyard_coordinator.launch.frames import frame, receive_frame
from shardyard_coordinator.launch.process_compute import ProcessCompute

ENVIRONMENT = {"PYTHONPATH": str(TESTS)}


async def warm_server(
    state: Path, *, imports: tuple[str, ...] = (), environment: Mapping[str, str] | None = None, cache: str = ""
) -> ProcessCompute:
    """A compute process whose server, with `imports`, is there; confined if there is a `cache`. Close it."""
    compute = ProcessCompute(
        log=state / "compute.log",
        folders=Folders(hidden=str(state), cache=cache),
        warm=[],
        environment=environment or ENVIRONMENT,
        warm_ranks=imports,
    )
    await compute.start()
    async with asyncio.timeout(120):
        while not (state / "warm" / SOCKET).exists():
            await asyncio.sleep(0.05)
    return compute


async def started(
    folder: Path, log: Path, program: str = "helpers.fake_trainer", environment: Mapping[str, str] | None = None
) -> warm_rank.WarmRank | None:
    """A rank that the server in `folder` has started, if it has."""
    with log.open("ab") as stream:
        try:
            found = await warm_rank.start_warm(
                folder,
                program=program,
                arguments=[],
                environment=os.environ | (environment or ENVIRONMENT),
                rights={},
                stdout=stream,
                stderr=stream,
            )
        except warm_rank.StartsCold:
            return None
    found[1].close()
    return found[0]


def answer_to(folder: Path, order: Mapping[str, object], *, how: int = os.O_RDONLY) -> dict[str, object]:
    """What the server in `folder`, opened in a certain way, answers to an order."""
    opened = os.open(folder, how)
    with socket.socket(socket.AF_UNIX) as caller, Path(os.devnull).open("wb") as null:
        caller.connect(f"{in_folder(opened)}/{SOCKET}")
        socket.send_fds(caller, [b"\0"], [opened, *[null.fileno()] * 3])
        caller.sendall(frame(json.dumps(order).encode()))
        payload = receive_frame(caller)
    os.close(opened)
    answer: dict[str, object] = json.loads(payload or b"{}")
    return answer


async def named(name: str, parent: int | None = None) -> psutil.Process:
    """The process below this one, or a child of `parent`, that has called itself so."""
    async with asyncio.timeout(60):
        while True:
            below = psutil.Process(parent).children(recursive=parent is None)
            for each in below:
                try:
                    if each.name() == name and each.status() != psutil.STATUS_ZOMBIE:
                        return each
                except psutil.NoSuchProcess:
                    continue
            await asyncio.sleep(0.05)

"""A Compute of warm subprocesses: what needs torch runs beside the coordinator, never in it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from shardyard_coordinator.launch.child import kill_group, start_child
from shardyard_coordinator.launch.frames import frame, pack, read_frame, unpack
from shardyard_coordinator.launch.protocols import ComputeFailed, ComputeUnavailable

WARM = ("shardyard_trainer.plan", "shardyard_trainer.inspect", "shardyard_trainer.infer")

_MEMORY_CHECK_S = 0.5
_BACKOFF_MAX_S = 10.0

_log = logging.getLogger(__name__)


@dataclass
class _Worker:
    """One warm process; its answers come in the order of its requests, one at a time."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ended: bool = False

    @property
    def alive(self) -> bool:
        return not self.ended and self.process.returncode is None

    def end(self) -> None:
        self.ended = True
        kill_group(self.process.pid)


class ProcessCompute:
    """Calls functions in `workers` subprocesses, which import `warm` first.

    A process over `memory_bytes` of resident memory, or past its call's deadline, is ended and another one started.
    """

    def __init__(
        self,
        *,
        log: Path,
        workers: int = 1,
        threads: int = 1,
        memory_bytes: int = 4 * 1024**3,
        warm: Sequence[str] = WARM,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log_path = log
        self._num_workers = workers
        self._memory_bytes = memory_bytes
        self._warm = tuple(warm)
        self._environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            **(environment or {}),
        }
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._keepers: list[asyncio.Task[None]] = []
        self._calls: set[asyncio.Task[bytes]] = set()

    async def start(self) -> None:
        """Begins to warm up; returns at once."""
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._keepers = [asyncio.create_task(self._keep()) for _ in range(self._num_workers)]

    async def close(self) -> None:
        """Ends the processes; calls under way fail."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def call(self, function: str, request: bytes, *, deadline_s: float) -> bytes:
        """Calls `package.module:function` with bytes.

        A caller that goes away leaves the call to end by itself: to end its process would cost the next one seconds.

        Raises: ComputeUnavailable, ComputeFailed, TimeoutError.
        """
        until = asyncio.get_running_loop().time() + deadline_s
        try:
            async with asyncio.timeout_at(until):
                worker = await self._idle.get()
                while not worker.alive:
                    worker = await self._idle.get()
        except TimeoutError:
            raise ComputeUnavailable(f"no compute process was free within {deadline_s} s") from None
        call = asyncio.create_task(self._exchange(worker, function, request, until))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return await asyncio.shield(call)

    async def _exchange(self, worker: _Worker, function: str, request: bytes, until: float) -> bytes:
        """One request and its answer; gives the process back, or ends it."""
        reply = asyncio.create_task(_ask(worker, pack({"function": function}, request)))
        loop = asyncio.get_running_loop()
        while not reply.done():
            await asyncio.wait([reply], timeout=min(_MEMORY_CHECK_S, max(until - loop.time(), 0)))
            over = _resident_bytes(worker.process.pid) > self._memory_bytes
            if over or (loop.time() >= until and not reply.done()):
                worker.end()
                if not reply.done():
                    reply.cancel()
                    if not over:
                        raise TimeoutError(f"{function} did not answer in time")
                    raise ComputeFailed(f"{function} needed more than {self._memory_bytes} bytes of memory")
        answer = reply.result()
        if answer is None:
            raise ComputeFailed(f"the process died while it ran {function}")
        if worker.alive:
            self._idle.put_nowait(worker)
        header, body = unpack(answer)
        if not header["ok"]:
            raise ComputeFailed(header["error"])
        return body

    async def _keep(self) -> None:
        """Has one process running, for ever."""
        backoff_s = 0.1
        while True:
            was_ready = await self._run_one()
            backoff_s = 0.1 if was_ready else min(backoff_s * 2, _BACKOFF_MAX_S)
            await asyncio.sleep(backoff_s)

    async def _run_one(self) -> bool:
        """One process from start to end; whether it was ever ready."""
        try:
            with self._log_path.open("ab") as log:
                process, ours = await start_child(
                    ["-m", "shardyard_coordinator.launch.compute_worker", "--warm", ",".join(self._warm)],
                    fd_option="--fd",
                    environment=self._environment,
                    stdout=log,
                    stderr=log,
                )
        except OSError as error:
            _log.warning("no compute process could be started: %s", error)
            return False
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            ready = await read_frame(reader)
            if ready is not None:
                self._idle.put_nowait(_Worker(process, reader, writer))
            await process.wait()
            if ready is None:
                _log.warning("a compute process ended while it warmed up; see %s", self._log_path)
            return ready is not None
        finally:
            kill_group(process.pid)
            writer.close()


async def _ask(worker: _Worker, payload: bytes) -> bytes | None:
    """The answer to a request; None where the process is gone."""
    with suppress(ConnectionError):
        worker.writer.write(frame(payload))
        await worker.writer.drain()
        return await read_frame(worker.reader)
    return None


def _resident_bytes(pid: int) -> int:
    """0 where the process is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0

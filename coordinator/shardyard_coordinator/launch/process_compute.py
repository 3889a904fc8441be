"""A Compute beside the coordinator: one warm process, and forks of it for every inspection and every model.

An inspection has a process that nothing else shares, so its input is to blame for its end. Its CPU time and memory are
limited; it is kept for a while for further questions about the same files. Models answer from other processes
(`answering`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardyard_coordinator.launch.allowed import Folders, FolderWatch
from shardyard_coordinator.launch.answering import Answering
from shardyard_coordinator.launch.confine import rank_words
from shardyard_coordinator.launch.fork_server import WARM as WARM_RANKS
from shardyard_coordinator.launch.forks import Fork, WarmProcess, WarmProcessGone, rotate
from shardyard_coordinator.launch.inherited import without_secrets
from shardyard_coordinator.launch.inspection import Inspection, Question, end_quietly
from shardyard_coordinator.launch.protocols import ComputeUnavailable, InputFailed
from shardyard_coordinator.launch.secret_files import read_secrets
from shardyard_coordinator.launch.turns import Caller, TooManyWaiting, Turns

WARM = (
    "shardyard_trainer.planning.plan",
    "shardyard_trainer.answering.inspect",
    "shardyard_trainer.answering.infer",
    "shardyard_trainer.choosing.recommend",
)
ANSWERER = "shardyard_trainer.answering.infer:answerer"

_BACKOFF_MAX_S = 10.0
_START_S = 60.0
_MOST_KEPT = 4
_KEPT_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Size:
    """The number of inspections at a time, and the limits of one process."""

    inspections: int = 2
    memory_bytes: int = 4 * 1024**3
    threads: int = 1


@dataclass
class _Kept:
    """A fork that is kept for further questions about the same files."""

    fork: Fork
    route: bytes
    since_s: float


class ProcessCompute:
    """Calls functions in forks of a process that has imported `warm`; ranks are forks of one with `warm_ranks` too."""

    def __init__(
        self,
        *,
        log: Path,
        size: Size | None = None,
        folders: Folders | None = None,
        warm: Sequence[str] = WARM,
        answerer: str = ANSWERER,
        environment: Mapping[str, str] | None = None,
        warm_ranks: Sequence[str] = WARM_RANKS,
        secrets_dir: str = "",
    ) -> None:
        self._log_path = log
        self._secrets_dir = secrets_dir
        self._size = size or Size()
        self._folders = folders or Folders()
        self._warm = tuple(warm)
        self._warm_ranks = tuple(warm_ranks)
        self._answerer = answerer
        self._environment = {
            # A cluster's node has Ray's settings in its environment, the token included.
            **{name: value for name, value in without_secrets(os.environ).items() if not name.startswith("RAY_")},
            **library_settings(self._size.threads),
            **self._folders.environment(),
            **(environment or {}),
        }
        self._folder_watch = FolderWatch(self._folders.paths)
        self._turns = Turns(self._size.inspections)
        # A Hub that does not answer must delay only requests that need it.
        self._hub_turns = Turns(self._size.inspections)
        self._answering = Answering(self._fork_to_serve, memory_bytes=self._size.memory_bytes)
        self._warm_process: WarmProcess | None = None
        self._ready = asyncio.Condition()
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._tasks: list[asyncio.Task[None]] = []
        self._calls: set[asyncio.Task[bytes]] = set()

    async def start(self) -> None:
        """Starts warming up; returns at once."""
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._tasks = [asyncio.create_task(self._keep()), asyncio.create_task(self._tidy())]

    async def close(self) -> None:
        """Ends the processes; calls in progress fail."""
        for call in self._calls:
            call.cancel()
        kept, self._kept = [each.fork for each in self._kept.values()], OrderedDict()
        ends = [self._answering.close(), *(end_quietly(fork) for fork in kept)]
        # Forks first, while their parent can still reap them.
        await asyncio.gather(*self._calls, *ends, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def inspect(
        self,
        function: str,
        request: bytes,
        *,
        caller: Caller,
        cpu_s: float,
        route: bytes = b"",
        network: bool = False,
        secrets: Sequence[str] = (),
    ) -> bytes:
        """Calls `package.module:function` in a separate process; see `protocols.Compute`."""
        has_begun = False

        async def turn() -> bytes:
            nonlocal has_begun
            async with (self._hub_turns if network else self._turns).turn(caller):
                has_begun = True
                # A process that has known a secret is asked nothing else.
                kept_for = b"" if secrets else route
                question = Question(function, request, tuple(secrets))
                return await self._inspect(question, cpu_s=cpu_s, route=kept_for, network=network)

        call = asyncio.create_task(turn())
        self._calls.add(call)
        call.add_done_callback(self._forget)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            if not has_begun:
                call.cancel()
            raise
        except TooManyWaiting as error:
            raise ComputeUnavailable(str(error)) from None

    async def ask(self, function: str, model: str, request: bytes, *, caller: Caller, turn_s: float) -> bytes:
        """Asks the model's process; see `protocols.Compute`."""
        await self._follow_folders()
        try:
            return await self._answering.ask(function, model, request, caller=caller, turn_s=turn_s)
        except WarmProcessGone as error:
            raise ComputeUnavailable(str(error)) from None

    async def confinement(self) -> Mapping[str, str]:
        """The restrictions that the warm process reports, and those of ranks on this machine."""
        holds = {} if self._warm_process is None else self._warm_process.confinement
        return {**holds, "ranks": rank_words()} if holds else {}

    def _forget(self, call: asyncio.Task[bytes]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # Retrieved here too, in case the caller has left.

    async def _inspect(self, question: Question, *, cpu_s: float, route: bytes, network: bool) -> bytes:
        await self._follow_folders()
        kept = self._take_kept(route)
        how = ""
        for _ in range(2 if kept is None else 3):
            try:
                fork = kept or await self._new_fork(network=network)
                values = await asyncio.to_thread(read_secrets, self._secrets_dir, question.secrets)
                inspection = Inspection(fork, question.function, cpu_s, self._size.memory_bytes)
                answer = await inspection.run(question.request, values)
                self._keep_fork(fork, route)
                return answer
            except WarmProcessGone as error:
                how = str(error)
                _log.warning("%s: %s", question.function, error)
            except InputFailed:
                # A kept process may have died while it was idle, and what it read before counts against its memory:
                # only a fresh one shows that the input is at fault.
                if kept is None:
                    raise
            kept = None
        raise ComputeUnavailable(f"its processes ended again and again; the last time, {how}")

    def _take_kept(self, route: bytes) -> Fork | None:
        for pid, kept in reversed(self._kept.items()):
            if route and kept.route == route and not kept.fork.reader.at_eof():
                del self._kept[pid]
                return kept.fork
        return None

    def _keep_fork(self, fork: Fork, route: bytes) -> None:
        now = asyncio.get_running_loop().time()
        self._kept[fork.pid] = _Kept(fork, route, now if route else 0.0)
        self._end_kept(older_than_s=now - _KEPT_S)

    def _end_kept(self, *, older_than_s: float) -> None:
        for pid, kept in list(self._kept.items()):
            if len(self._kept) > _MOST_KEPT or kept.since_s < older_than_s:
                del self._kept[pid]
                task = asyncio.ensure_future(end_quietly(kept.fork))
                self._calls.add(task)
                task.add_done_callback(self._forget)

    async def _tidy(self) -> None:
        """Ends forks that were kept long enough, and rotates a long log."""
        while True:
            await asyncio.sleep(_KEPT_S / 4)
            self._end_kept(older_than_s=asyncio.get_running_loop().time() - _KEPT_S)
            await asyncio.to_thread(rotate, self._log_path)

    async def _follow_folders(self) -> None:
        """Replaces the warm process and its forks if one of its folders was exchanged."""
        warm = self._warm_process
        if warm is None or not await self._folder_watch.exchanged(warm.folders) or warm is not self._warm_process:
            return
        _log.info("a folder that compute processes may use was exchanged: they are replaced")
        self._warm_process = None
        self._kept.clear()
        warm.kill()

    async def _fork_to_serve(self) -> Fork:
        try:
            return await self._new_fork(serve=self._answerer)
        except WarmProcessGone as error:
            _log.warning("a model's process: %s", error)
            return await self._new_fork(serve=self._answerer)

    async def _new_fork(self, *, serve: str = "", network: bool = False) -> Fork:
        """Forks the warm process once it is ready. Raises: ComputeUnavailable, WarmProcessGone."""
        warm = await self._warmed()
        try:
            return await warm.fork(serve=serve, memory_bytes=self._size.memory_bytes, network=network)
        except OSError as error:
            raise ComputeUnavailable(f"no process could be started: {error.strerror}") from error

    async def _warmed(self) -> WarmProcess:
        """The warm process, once it is ready. Raises: ComputeUnavailable."""
        try:
            async with asyncio.timeout(_START_S), self._ready:
                await self._ready.wait_for(lambda: self._warm_process is not None and self._warm_process.alive)
        except TimeoutError:
            raise ComputeUnavailable(f"no process was warm within {_START_S:g} s; see {self._log_path}") from None
        assert self._warm_process is not None
        return self._warm_process

    async def _keep(self) -> None:
        """Keeps a warm process running, forever."""
        backoff_s = 0.1
        while True:
            was_ready = await self._run_one()
            backoff_s = 0.1 if was_ready else min(backoff_s * 2, _BACKOFF_MAX_S)
            await asyncio.sleep(backoff_s)

    async def _run_one(self) -> bool:
        """Runs one warm process from start to end; returns whether it was ever ready."""
        try:
            warm = await WarmProcess.start(
                warm=self._warm,
                confine=self._folders.confine(self._environment),
                environment=self._environment,
                log=self._log_path,
                ranks=self._folders.ranks,
                warm_ranks=self._warm_ranks,
            )
        except OSError as error:
            _log.warning("no compute process could be started: %s", error)
            return False
        except WarmProcessGone:
            _log.warning("a compute process ended while it warmed up; see %s", self._log_path)
            return False
        try:
            async with self._ready:
                self._warm_process = warm
                self._ready.notify_all()
            await warm.wait()
        finally:
            self._warm_process = None
            self._kept.clear()  # They ended with it.
            await warm.close()
        return True


def library_settings(threads: int) -> dict[str, str]:
    """Settings that make libraries safe to fork: no threads before the fork, and few after it."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OPENBLAS_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        # Arrow's jemalloc would start a thread when it is imported.
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }

"""Processes that answer for models: one per model, shared by many callers, ended when nobody uses them."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping

from shardyard_coordinator.launch.forks import WALL, Fork, StopWatch, WarmProcessGone, how_it_failed
from shardyard_coordinator.launch.protocols import ComputeUnavailable, InputFailed
from shardyard_coordinator.launch.turns import Caller

_CHECK_S = 0.1
_MOST_PROCESSES = 8
_MOST_WAITING = 64
_TRIES = 4
_PATIENCE_S = 30.0


class _Died(Exception):
    """The process is gone. `among`: how many questions were being computed with this one; 0 if it waited."""

    def __init__(self, how: str, among: int, *, by_us: bool) -> None:
        super().__init__(how)
        self.how = how
        self.among = among
        self.by_us = by_us


class _Process:
    """One model's process, and its waiting callers."""

    def __init__(self, fork: Fork, *, memory_bytes: int) -> None:
        self._fork = fork
        self._memory_bytes = memory_bytes
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._turn_s: dict[int, float] = {}
        self._computing: list[int] = []
        self._left: set[int] = set()
        self._turn = 0
        self._limit_s = 0.0
        self._since_s = 0.0
        self._killed = ""
        self._is_idle = False
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    @property
    def alive(self) -> bool:
        return not self._tasks[0].done()

    @property
    def idle(self) -> bool:
        return not self._waiting

    def own_bytes(self) -> int:
        return self._fork.own_bytes()

    async def ask(self, function: str, caller: Caller, request: bytes, *, alone: bool, turn_s: float) -> bytes:
        """The answer. If it is cancelled while it is computed, it ends with its turn, and its verdict is kept.

        Raises: _Died, InputFailed, ComputeUnavailable.
        """
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number], self._turn_s[number] = answer, turn_s
        self._limit_s = self._limit_s or turn_s
        try:
            header = {"id": number, "function": function, "caller": list(caller), "alone": alone}
            await self._fork.send(header, request)
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            await self._fork.send({"cancel": number})
            if number in self._computing:
                self._left.add(number)
                await self._verdict(answer)
            raise
        finally:
            self._waiting.pop(number, None)
            self._turn_s.pop(number, None)
            self._left.discard(number)

    async def _verdict(self, answer: asyncio.Future[bytes]) -> None:
        """Waits for the end of a turn whose caller has left. Raises if the question is at fault."""
        try:
            await answer
        except _Died as died:
            if died.among == 1 and died.by_us:
                raise
        except ComputeUnavailable:
            pass

    async def end(self) -> None:
        self._computing = []  # No question is at fault.
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail("ended", by_us=True)

    async def _read(self) -> None:
        """Reads answers for waiting callers until the process is gone."""
        how = "its process is gone"
        try:
            while (received := await self._fork.receive()) is not None:
                header, body = received
                if "id" in header:
                    self._answer(header["id"], header, body)
                else:
                    self._computing = header.get("computing", [])
                    for number in self._left.difference(self._computing):
                        self._waiting[number].cancel()
                    # The turn is counted, not its callers: a caller that leaves does not end it.
                    known = (self._turn_s[number] for number in self._computing if number in self._turn_s)
                    self._limit_s = max(known, default=self._limit_s)
                    self._turn += 1
                    self._since_s = asyncio.get_running_loop().time()
        finally:
            try:
                how = (await self._fork.end()).words
            except WarmProcessGone:
                self._computing = []  # No question is at fault.
            self._fail(self._killed or f"ends its process ({how})", by_us=bool(self._killed))

    def _answer(self, number: int, header: Mapping[str, str], body: bytes) -> None:
        answer = self._waiting.get(number)
        if answer is None or answer.done():
            return
        if header["ok"]:
            answer.set_result(body)
        else:
            answer.set_exception(InputFailed(how_it_failed(header["kind"]), note={}, log=header["error"]))

    async def _watch(self) -> None:
        """Ends a process that is stopped or too large, or whose turn computes too long or waits ten times as long."""
        turn, before_s = 0, 0.0
        stop = StopWatch(self._fork.pid)
        while self.alive and not self._killed:
            await asyncio.sleep(_CHECK_S)
            if turn != self._turn:
                turn, before_s = self._turn, self._fork.cpu_s()
            if self._computing:
                self._check(self._fork.cpu_s() - before_s)
            if stop.is_over():
                self._killed = "was stopped (SIGSTOP) and did not continue"
                self._computing = []  # No question is at fault.
        if self._killed:
            self._fork.kill()

    def _check(self, computed_s: float) -> None:
        limit_s = self._limit_s
        if computed_s > limit_s:
            self._killed = f"takes more than {limit_s:g} s"
        elif asyncio.get_running_loop().time() - self._since_s > WALL * limit_s:
            self._killed = f"takes more than {WALL * limit_s:g} s"
            # Such as a disk that does not answer: it may do so later.
            self._is_idle = computed_s < limit_s / 10
        elif self._fork.own_bytes() > self._memory_bytes:
            self._killed = f"takes more than {self._memory_bytes:,} bytes of memory"

    def _fail(self, how: str, *, by_us: bool) -> None:
        for number, answer in list(self._waiting.items()):
            if not answer.done():
                among = len(self._computing) if number in self._computing else 0
                idle = self._is_idle and among > 0
                answer.set_exception(
                    ComputeUnavailable(f"{how} without computing") if idle else _Died(how, among, by_us=by_us)
                )


class Answering:
    """Asks each model's process, and starts one if there is none. `fork` makes one."""

    def __init__(self, fork: Callable[[], Awaitable[Fork]], *, memory_bytes: int) -> None:
        self._fork = fork
        self._memory_bytes = memory_bytes
        self._processes: OrderedDict[str, _Process] = OrderedDict()
        self._starting = asyncio.Lock()
        self._callers: Counter[Caller] = Counter()
        self._users: Counter[str] = Counter()
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False

    async def ask(self, function: str, model: str, request: bytes, *, caller: Caller, turn_s: float) -> bytes:
        """The answer. A process that dies is replaced; a question that was alone in it, twice, is at fault.

        Raises: InputFailed, ComputeUnavailable, ComputeFailed, WarmProcessGone.
        """
        if self._callers[caller] >= _MOST_WAITING:
            raise ComputeUnavailable(f"{_MOST_WAITING} questions of this caller wait already")
        self._callers[caller] += 1
        self._users[model] += 1
        try:
            alone = False
            for _ in range(_TRIES):
                process = await self._process(model)
                try:
                    return await process.ask(function, caller, request, alone=alone, turn_s=turn_s)
                except _Died as died:
                    if died.among == 1 and (died.by_us or alone):
                        raise InputFailed(died.how, note={}) from None
                    alone = alone or died.among > 0
            raise ComputeUnavailable("the model's process ended again and again")
        finally:
            self._callers -= Counter([caller])
            self._users -= Counter([model])
            self._end_some(most=_MOST_PROCESSES)

    async def close(self) -> None:
        """Ends all processes; questions in progress fail, and none starts a new process."""
        self._closed = True
        processes, self._processes = list(self._processes.values()), OrderedDict()
        await asyncio.gather(*(process.end() for process in processes), *self._ending, return_exceptions=True)

    async def _process(self, model: str) -> _Process:
        """The model's process. Callers that wait for room do not delay those whose model has a process."""
        until_s = asyncio.get_running_loop().time() + _PATIENCE_S
        while (process := self._living(model)) is None:
            async with self._starting:
                process = self._living(model) or await self._begin(model)
            if process is not None:
                break
            if asyncio.get_running_loop().time() > until_s:
                raise ComputeUnavailable(f"{_MOST_PROCESSES} models are answering, the most at a time")
            await asyncio.sleep(_CHECK_S)
        self._processes.move_to_end(model)
        return process

    def _living(self, model: str) -> _Process | None:
        process = self._processes.get(model)
        return process if process is not None and process.alive else None

    async def _begin(self, model: str) -> _Process | None:
        """A new process to replace one that died; None if other models hold all places."""
        self._processes.pop(model, None)
        self._end_some(most=_MOST_PROCESSES - 1)
        if len(self._processes) >= _MOST_PROCESSES:
            return None
        if self._closed:
            raise ComputeUnavailable("the service is stopping")
        self._processes[model] = process = _Process(await self._fork(), memory_bytes=self._memory_bytes)
        return process

    def _end_some(self, *, most: int) -> None:
        """Ends processes without callers, least recently used first, while there are too many or too large ones."""
        held = {model: process.own_bytes() for model, process in self._processes.items()}
        for model, process in list(self._processes.items()):
            if len(self._processes) <= most and sum(held.values()) <= self._memory_bytes:
                return
            if process.idle and not self._users[model]:
                del self._processes[model], held[model]
                task = asyncio.create_task(process.end())
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)

"""The core of a supervisor: it numbers and spools a gang's events, forwards directives, and names the first failure.

Pure asyncio on one event loop; the local launcher and the Ray supervisor both drive it. They pass it what ranks report
and how ranks end, and give it a way to end them; it answers all requests of the coordinator about the attempt.

Every attempt has at most one `failure` event. A failing rank takes its peers down within milliseconds, and their
reports may arrive first: so the first sign of trouble starts a short wait, after which the cause is chosen among all
that is known. The other ranks' failures become warnings.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.launch.pressure import SUPERVISOR_RANK, Pressure
from shardyard_coordinator.launch.protocols import AttemptKey, storage_cause
from shardyard_coordinator.launch.rank_exit import RankExit, report_of
from shardyard_coordinator.launch.spool import Spool
from shardyard_coordinator.seams import Clock

TAIL_LINES = 50
TAIL_BYTES = 32 * 1024
_RETRY_S = 0.5
# A symptom waits this many times longer for its cause than a cause waits for a better one: a cluster reports a lost
# node seconds after the peers have noticed.
_SYMPTOMS_SETTLE = 6
# How long reports wait for a spool that cannot be written, before the gang is ended: a full disk often gets room again,
# while other errors of the file system rarely pass.
_PATIENCE_S = {Cause.STORAGE_FULL: 600.0}
_SHORT_PATIENCE_S = 60.0
# For reports that need not be durable and are kept in memory: over the first bound they are written to the disk anyway;
# over the second they wait for room too.
_MOST_UNSYNCED_BYTES = 4 * 1024 * 1024
_MOST_HELD_BYTES = 8 * 1024 * 1024

# Causes of a rank that lost a peer or does not know better: a rank that died without a report explains more.
_SYMPTOMS = frozenset({Cause.UNKNOWN, Cause.WORKER_LOST, Cause.NCCL_TIMEOUT, Cause.HUNG})


@dataclass(frozen=True)
class _Trouble:
    """A candidate for the cause; of equal weight the earlier one wins."""

    event: worker_pb2.WorkerEvent
    weight: int


class Attempt:
    """One gang's events, directive and end."""

    def __init__(
        self,
        key: AttemptKey,
        *,
        ranks: int,
        spool: Spool,
        logs: Path,
        clock: Clock,
        settle_s: float = 0.5,
        patience_s: float | None = None,
    ) -> None:
        self.key = key
        self._spool = spool
        self._logs = logs
        self._clock = clock
        self._settle_s = settle_s
        self._started_s = clock.monotonic_s()
        self._directive: worker_pb2.Directive | None = None
        self._running = set(range(ranks))
        self._troubles: list[_Trouble] = []
        self._failed: set[int] = set()
        self._step = 0
        self._closed = False
        self._patience_s = patience_s
        self._pressure = Pressure()
        self._waiting: set[int] = set()
        self._stopped: dict[int, int] = {}
        self._cold: dict[int, str] = {}
        self._questions = 0
        self._answered = asyncio.Event()
        self._pressed_s: float | None = None
        self._grown = asyncio.Event()
        self._trouble = asyncio.Event()
        self._decided = asyncio.Event()
        self._all_exited = asyncio.Event()
        self._ended = asyncio.Event()

    async def supervise(self, kill: Callable[[], Awaitable[None]]) -> None:
        """Runs until nothing of the gang runs any more, and then appends the last event, unless it was fenced.

        `kill` ends every rank; it is called once a failure's cause is chosen. The launcher must always report each
        rank's exit with `rank_exited`.
        """
        await _first_of(self._trouble, self._all_exited)
        if self._troubles:
            await self._settle()
            while self._questions:
                self._answered.clear()
                await self._answered.wait()
            await self._decide()
            await kill()
        await self._all_exited.wait()
        await self._end()

    async def _settle(self) -> None:
        """Waits for better explanations. If only symptoms are known, a rank without a report has the cause."""
        # Not wait_for: on Python 3.11 it can swallow a cancellation.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settle_s):
                await self._all_exited.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SYMPTOMS_SETTLE * self._settle_s):
                while self._running - self._failed and all(trouble.weight for trouble in self._troubles):
                    self._trouble.clear()
                    await _first_of(self._trouble, self._all_exited)

    async def report(self, request: bytes) -> bytes:
        """Takes a ReportRequest and answers with a ReportReply.

        If it is durable, all its reports are on disk when it returns: while the spool cannot be written, the report
        waits. Other events are read from memory then, and so is what comes with a failure, which is answered once the
        gang's cause is chosen.
        Raises: google.protobuf.message.DecodeError.
        """
        message = worker_pb2.ReportRequest.FromString(request)
        if self._closed or message.epoch != self.key.epoch:
            return worker_pb2.ReportReply(fenced=True).SerializeToString()
        ordinary: list[worker_pb2.WorkerEvent] = []
        failures: list[worker_pb2.WorkerEvent] = []
        for event in message.events:
            event.rank = message.rank
            (failures if event.WhichOneof("payload") == "failure" else ordinary).append(event)
        fresh = [event for event in ordinary if self._pressure.is_news(event)]
        if failures:
            # Reports before a failure must not wait, because the failure comes after them.
            self._hold(fresh)
        elif fresh or message.durable or self._pressed_s is not None:
            await self._record(fresh, rank=message.rank, durable=message.durable)
        for event in failures:
            self._add_trouble(event, weight=1 if event.failure.reason in _SYMPTOMS else 0)
        if failures:
            await self._decided.wait()
        return worker_pb2.ReportReply(directive=self._directive, fenced=self._closed).SerializeToString()

    def rank_started(self, rank: int, cold: str | None) -> None:
        """Records how a rank's process started (`RankProcess.cold`); reported once all ranks have met."""
        if cold is not None:
            self._cold[rank] = cold

    def rank_exited(self, rank: int, how: RankExit) -> None:
        """Records that a rank's process is gone; call it after passing on all of its reports."""
        self._running.discard(rank)
        if not self._running:
            self._all_exited.set()
        if how.code == 0 or rank in self._failed or self._closed or self._decided.is_set():
            return
        event = self._event(rank)
        event.failure.CopyFrom(report_of(rank, how))
        # A runtime may abort a process because a peer is gone: any other explanation is better.
        self._add_trouble(event, weight=1 if how.signal == signal.SIGABRT else 0)

    def rank_stopped(self, rank: int, pid: int | None) -> None:
        """Reports that a rank's process was stopped by a signal (`pid`), or that it is no longer (None)."""
        before = dict(self._stopped)
        if pid is None:
            self._stopped.pop(rank, None)
        else:
            self._stopped[rank] = pid
        if self._stopped == before or self._closed:
            return
        event = self._event(SUPERVISOR_RANK)
        event.condition.type = job_pb2.Condition.TYPE_STALLED
        event.condition.active = bool(self._stopped)
        event.condition.time.CopyFrom(event.time)
        event.condition.message = _stopped_words(self._stopped)
        self._hold([event])

    @contextlib.contextmanager
    def asking_why(self) -> Iterator[None]:
        """Delays the choice of a cause while the end of a lost rank is investigated; the caller limits how long."""
        self._questions += 1
        try:
            yield
        finally:
            self._questions -= 1
            self._answered.set()

    async def events_after(self, after: int, *, timeout_s: float, limit: int) -> list[bytes]:
        """WorkerEvents with a sequence over `after`, in order; waits up to `timeout_s` for the first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._spool.last <= after:
                    await self._grown.wait()
        return self._spool.read(after, limit)

    def direct(self, directive: bytes) -> None:
        """Passes a Directive on with the next reply to each rank."""
        self._directive = worker_pb2.Directive.FromString(directive)

    def fence(self) -> None:
        """Rejects further reports of the gang; nothing that happens to it from now on is a failure."""
        self._closed = True
        self._decided.set()

    @property
    def closed(self) -> bool:
        """Whether the gang was fenced, or has ended."""
        return self._closed

    @property
    def doomed(self) -> bool:
        """Whether its ranks are being ended, so that a rank that starts now must be ended too."""
        return self._decided.is_set()

    @property
    def ended(self) -> asyncio.Event:
        """Set once nothing runs any more and the last event is in the spool."""
        return self._ended

    async def _record(self, events: Sequence[worker_pb2.WorkerEvent], *, rank: int, durable: bool) -> None:
        """Spools a rank's reports as soon as there is room; nothing more once the gang is being ended.

        Without room, reports that need not be durable stay in memory, up to a bound. Without events it retries others.
        """
        is_added = False
        self._waiting.add(rank)
        try:
            while not self.doomed:
                try:
                    if not is_added:
                        self._append(events)
                        is_added = True
                    if durable or self._spool.unsynced_bytes > _MOST_UNSYNCED_BYTES:
                        await self._spool.sync()
                    self._relieve(rank)
                    return
                except OSError as error:
                    self._press(error)
                    if not durable and self._spool.unsynced_bytes < _MOST_HELD_BYTES:
                        if not is_added:
                            self._hold(events)
                        return
                await asyncio.sleep(_RETRY_S)
        finally:
            self._waiting.discard(rank)

    def _relieve(self, rank: int) -> None:
        """Ends the condition once no report waits for room any more."""
        if self._pressed_s is not None and not self._waiting - {rank}:
            self._pressed_s = None
            self._tell_pressure(active=False, message="the spool is written again")

    def _press(self, error: OSError) -> None:
        """Reports at once that reports wait, and finally fails the gang with the reason of the wait."""
        now_s = self._clock.monotonic_s()
        cause, why = storage_cause(error), f"the attempt's spool cannot be written: {error.strerror or error}"
        if self._pressed_s is None:
            self._pressed_s = now_s
        self._tell_pressure(active=True, message=f"reports wait: {why}")
        patience_s = _PATIENCE_S.get(cause, _SHORT_PATIENCE_S) if self._patience_s is None else self._patience_s
        if now_s - self._pressed_s >= patience_s and not self._troubles:
            event = self._event(SUPERVISOR_RANK)
            event.failure.reason = cause
            event.failure.message = f"{why}, for {now_s - self._pressed_s:.0f} s"
            event.failure.metadata["errno"] = errno.errorcode.get(error.errno or 0, "")
            self._add_trouble(event, weight=0)

    def _tell_pressure(self, *, active: bool, message: str) -> None:
        event = self._event(SUPERVISOR_RANK)
        event.condition.type = job_pb2.Condition.TYPE_DISK_PRESSURE
        event.condition.active = active
        event.condition.message = message
        event.condition.time.CopyFrom(event.time)
        if self._pressure.is_news(event):
            self._hold([event])

    def _hold(self, events: Sequence[worker_pb2.WorkerEvent]) -> None:
        """Spools events that must not wait: without room they are served from memory."""
        if not events:
            return
        self._number(events)
        self._spool.hold([event.SerializeToString() for event in events])
        self._grew()

    def _append(self, events: Sequence[worker_pb2.WorkerEvent]) -> None:
        """Spools a rank's reports, all or none. Raises: OSError."""
        self._number(events)
        self._spool.append([event.SerializeToString() for event in events])
        if events:
            self._grew()

    def _number(self, events: Sequence[worker_pb2.WorkerEvent]) -> None:
        for sequence, event in enumerate(events, start=self._spool.last + 1):
            event.sequence = sequence
            if event.WhichOneof("payload") == "progress":
                self._step = max(self._step, event.progress.step)
            elif event.HasField("ready"):  # A rank itself does not say how it has started.
                event.ready.warm = sum(not why for why in self._cold.values())
                event.ready.cold[:] = filter(None, self._cold.values())

    def _grew(self) -> None:
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()

    async def _sync(self) -> None:
        with contextlib.suppress(OSError):  # Events without room are served from memory.
            await self._spool.sync()

    def _add_trouble(self, event: worker_pb2.WorkerEvent, *, weight: int) -> None:
        self._failed.add(event.rank)
        if self._decided.is_set():
            self._hold([_as_warning(event)])
            return
        self._troubles.append(_Trouble(event, weight))
        self._trouble.set()

    async def _decide(self) -> None:
        """Writes the cause of the gang's failure, and after it its consequences as warnings."""
        if self._closed:
            return
        cause = min(self._troubles, key=lambda trouble: trouble.weight).event
        failure = cause.failure
        failure.attempt = self.key.epoch
        if not failure.HasField("step") and self._step:
            failure.step = self._step
        if not failure.log_tail:
            failure.log_tail = await asyncio.to_thread(read_tail, self._logs / f"rank-{cause.rank}.stderr.log")
        self._hold([cause, *(_as_warning(trouble.event) for trouble in self._troubles if trouble.event is not cause)])
        await self._sync()
        self._decided.set()

    async def _end(self) -> None:
        if self._closed:  # It was ended by a caller, who knows why.
            self._ended.set()
            return
        event = self._event(SUPERVISOR_RANK)
        event.ended.ok = not self._troubles
        event.ended.duration.FromNanoseconds(int((self._clock.monotonic_s() - self._started_s) * 1e9))
        self._closed = True
        self._hold([event])
        await self._sync()
        self._ended.set()

    def _event(self, rank: int) -> worker_pb2.WorkerEvent:
        event = worker_pb2.WorkerEvent(rank=rank)
        event.time.FromMicroseconds(self._clock.now_us())
        return event


def read_tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, at most TAIL_BYTES of them; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def _stopped_words(stopped: Mapping[int, int]) -> str:
    if not stopped:
        return "every rank runs again"
    who = ", ".join(f"rank {rank} (process {pid})" for rank, pid in sorted(stopped.items()))
    pids = " ".join(str(pid) for _, pid in sorted(stopped.items()))
    return (
        f"stopped by a signal (SIGSTOP): {who}; the job waits for that: continue with `kill -CONT {pids}` on the "
        "service's machine, or cancel the job"
    )


def _as_warning(event: worker_pb2.WorkerEvent) -> worker_pb2.WorkerEvent:
    """A failure that another rank's failure has caused, as a warning."""
    warning = worker_pb2.WorkerEvent(rank=event.rank, time=event.time)
    warning.warning.reason = event.failure.reason
    warning.warning.message = f"rank {event.rank}, after the gang had failed: {event.failure.message}"
    return warning


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()

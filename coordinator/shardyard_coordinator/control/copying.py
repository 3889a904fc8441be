"""Runs attempts that copy a model to an object store: without ranks, by calls of a process that alone knows the keys.

The launcher around the other one: an attempt of a copy is followed, cancelled and paused as a gang of one rank is, and
its events are in its spool. Each call of the process copies for some seconds; in between others have their turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardyard.remote_uris import parse
from shardyard.v1 import job_pb2, plan_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.remote import Remote
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.domain.records import JobRecord
from shardyard_coordinator.launch.attempt import Attempt
from shardyard_coordinator.launch.folder import make_attempt_folder
from shardyard_coordinator.launch.protocols import (
    AttemptKey,
    ClusterView,
    Compute,
    ComputeFailed,
    ComputeUnavailable,
    InputFailed,
    Launch,
    Launcher,
    Presence,
    StorageFailed,
)
from shardyard_coordinator.launch.rank_exit import RankExit
from shardyard_coordinator.launch.spool import SPOOL_NAME, Spool
from shardyard_coordinator.seams import Clock

COPY_FUNCTION = "shardyard_trainer.remote.copying:copy"
FIELD = "spec.model_copy.uri"

_BUDGET_S = 10.0
_MOST_S = 6 * 3600.0
_MOST_PAUSES = 60
# A large file is read once before it is sent: slowly, on a busy disk.
_CPU_S = 60.0
_CPU_BYTES_PER_S = 50e6
_STEP_BYTES = 2**20
_STOP = worker_pb2.Directive.ACTION_STOP

_log = logging.getLogger(__name__)


def copies_model(job: JobRecord) -> bool:
    """Whether the job's attempts are copies, which end with this process."""
    return plan_pb2.JobPlan.FromString(job.plan).output == plan_pb2.JOB_OUTPUT_COPY


class _Failed(Exception):
    """The copy cannot continue."""

    def __init__(self, cause: Cause, message: str, metadata: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.report = job_pb2.FailureReport(reason=cause.value, message=message, metadata=metadata or {})


@dataclass(eq=False)
class _Copy:
    """An attempt that copies, and the call of the process that runs."""

    attempt: Attempt
    spool: Spool
    spec: worker_pb2.AttemptSpec
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    call: asyncio.Future[bytes] | None = None
    is_stopped: bool = False
    done_bytes: int = 0


class CopyLauncher:
    """A Launcher that copies models itself, and gives all other attempts to `inner`."""

    def __init__(
        self,
        inner: Launcher,
        compute: Compute,
        remote: Remote,
        clock: Clock,
        *,
        storage: Path,
        settle_s: float = 0.5,
        pause_s: float = 1.0,
    ) -> None:
        self.name = inner.name
        self._inner = inner
        self._compute = compute
        self._remote = remote
        self._clock = clock
        self._notes = storage / "objects" / "sent"
        self._settle_s = settle_s
        self._pause_s = pause_s
        self._copies: dict[AttemptKey, _Copy] = {}
        self._dead: set[AttemptKey] = set()
        # The processes that reach the network are few, and other callers wait for them too.
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """As the inner one."""
        await self._inner.start()

    async def close(self, *, stop_cluster: bool) -> None:
        """Ends every copy: the next service continues them."""
        await asyncio.gather(*(self.kill(key) for key in list(self._copies)))
        await self._inner.close(stop_cluster=stop_cluster)

    async def cluster(self) -> ClusterView:
        """As the inner one."""
        return await self._inner.cluster()

    async def ensure(self, launch: Launch) -> None:
        """Starts the attempt unless it was started before."""
        if launch.key in self._copies or launch.key in self._dead:
            return
        spec = worker_pb2.AttemptSpec.FromString(launch.spec)
        if spec.plan.output != plan_pb2.JOB_OUTPUT_COPY:
            await self._inner.ensure(launch)
            return
        try:
            spool = await asyncio.to_thread(_prepare, spec)
        except OSError as error:
            raise StorageFailed.of(error) from error
        logs = Path(launch.attempt_dir) / "logs"
        attempt = Attempt(launch.key, ranks=1, spool=spool, logs=logs, clock=self._clock, settle_s=self._settle_s)
        copy = self._copies[launch.key] = _Copy(attempt, spool, spec)
        copying = asyncio.create_task(self._copy(copy))

        async def halt() -> None:
            copying.cancel()

        copy.tasks = [copying, asyncio.create_task(attempt.supervise(halt))]

    async def lookup(self, key: AttemptKey) -> Presence:
        """ALIVE until killed, its end included; copies of a former process are ABSENT."""
        if key in self._copies:
            return Presence.ALIVE
        return Presence.DEAD if key in self._dead else await self._inner.lookup(key)

    async def events_after(self, key: AttemptKey, after: int, *, timeout_s: float, limit: int) -> list[bytes]:
        """WorkerEvents with a sequence over `after`; LookupError if the attempt is ABSENT or DEAD."""
        copy = self._copies.get(key)
        if copy is None:
            return await self._inner.events_after(key, after, timeout_s=timeout_s, limit=limit)
        return await copy.attempt.events_after(after, timeout_s=timeout_s, limit=limit)

    async def direct(self, key: AttemptKey, directive: bytes) -> None:
        """Gives the attempt a Directive; LookupError if it is ABSENT or DEAD."""
        copy = self._copies.get(key)
        if copy is None:
            await self._inner.direct(key, directive)
            return
        copy.attempt.direct(directive)
        copy.is_stopped = worker_pb2.Directive.FromString(directive).action == _STOP

    async def kill(self, key: AttemptKey) -> None:
        """Ends the attempt and waits for its process; parts that were sent for a cancelled job are removed."""
        copy = self._copies.get(key)
        if copy is None:
            await self._inner.kill(key)
            return
        copy.attempt.fence()
        is_cut = not copy.tasks[0].done()
        copy.tasks[0].cancel()
        await asyncio.wait(copy.tasks)
        if copy.call is not None:
            await asyncio.wait([copy.call])
        if is_cut and copy.is_stopped:
            await self._tidy(copy)
        if self._copies.pop(key, None) is not None:
            self._dead.add(key)
            copy.spool.close()

    async def _copy(self, copy: _Copy) -> None:
        """All of the attempt, from the first report to its end as a rank's."""
        code = 1
        try:
            await self._report(copy, ready=worker_pb2.GangReady(), canary=job_pb2.CanaryPassed())
            if (directive := await self._send(copy)) is not None:
                await self._tidy(copy)
                await self._report(copy, stopped=worker_pb2.Stopped(reason=directive.reason))
            else:
                finished = worker_pb2.TrainingFinished(step=copy.spec.plan.total_steps)
                await self._report(copy, finished=finished, exported=worker_pb2.Exported())
            code = 0
        except _Failed as failed:
            await self._report(copy, failure=failed.report)
        except Exception:  # The edge of a supervised task: a defect ends this attempt alone.
            _log.exception("the copy of %s failed", copy.spec.job_name)
            await self._report(copy, failure=job_pb2.FailureReport(reason=Cause.UNKNOWN.value))
        finally:
            copy.attempt.rank_exited(0, RankExit(code))

    async def _send(self, copy: _Copy) -> worker_pb2.Directive | None:
        """Asks until all is there; the directive, if one came before. Raises: _Failed."""
        until_s = self._clock.monotonic_s() + _MOST_S
        pauses = 0
        while self._clock.monotonic_s() < until_s:
            result = await self._ask(copy, self._request(copy))
            if result is None:
                pauses += 1
            else:
                if result.violations:
                    raise _failure(result.violations)
                pauses = 0 if result.done_bytes > copy.done_bytes else pauses + 1
                copy.done_bytes = result.done_bytes
                total = copy.spec.plan.total_steps
                step = total if result.is_done else min(result.done_bytes // _STEP_BYTES, total - 1)
                progress = job_pb2.Progress(step=step, total_steps=total)
                directive = await self._report(copy, progress=progress)
                if result.is_done:
                    return None
                if directive.action:
                    return directive
            if pauses > _MOST_PAUSES:
                raise _Failed(Cause.EXPORT_FAILED, "the processes that copy do not answer, or come no further")
            if pauses:
                if (directive := await self._report(copy)).action:
                    return directive
                await asyncio.sleep(self._pause_s)
        text = f"copying took more than {_MOST_S / 3600:g} hours; submit it again to continue from there"
        raise _Failed(Cause.MAX_RUN_TIME, text)

    async def _tidy(self, copy: _Copy) -> None:
        """Removes the parts that were sent of a job that is cancelled; a job that is paused continues from them."""
        if not copy.is_stopped:
            return
        try:
            request = self._request(copy)
        except _Failed:
            return
        request.abort = True
        result = await self._ask(copy, request)
        if result is None or result.violations:
            _log.warning("parts that were sent of %s may be left in the object store", copy.spec.job_name)

    async def _ask(self, copy: _Copy, request: worker_pb2.CopyRequest) -> worker_pb2.CopyResult | None:
        """One call of the process; None: later. Raises: _Failed."""
        num_bytes = sum(file.size_bytes for file in request.files)
        async with self._turn:
            copy.call = asyncio.ensure_future(
                self._compute.inspect(
                    COPY_FUNCTION,
                    request.SerializeToString(),
                    caller=("copies", copy.spec.job_uid),
                    cpu_s=_CPU_S + num_bytes / _CPU_BYTES_PER_S,
                    network=True,
                    secrets=[request.secret],
                )
            )
            try:
                answer = await asyncio.shield(copy.call)
            except asyncio.CancelledError:
                if copy.call.cancelled():
                    copy.attempt.fence()  # The service ends: not a failure of the job.
                raise
            except ComputeUnavailable as error:
                _log.warning("no process has copied %s: %s", copy.spec.job_name, error)
                return None
            except ComputeFailed as error:
                _log.warning("the system failed the copy of %s: %s", copy.spec.job_name, error)
                raise _Failed(Cause.EXPORT_FAILED, "the system failed the process that copies") from None
            except InputFailed as failed:
                _log.error("the process that copies %s failed: %s", copy.spec.job_name, failed.log or failed)
                raise _Failed(Cause.EXPORT_FAILED, f"the process that copies {failed.how}") from None
        return worker_pb2.CopyResult.FromString(answer)

    def _request(self, copy: _Copy) -> worker_pb2.CopyRequest:
        """Who may write there is asked again each time. Raises: _Failed."""
        spec, project = copy.spec.spec, copy.spec.job_name.split("/")[1]
        root = self._remote.export_root_of(parse(spec.model_copy.uri), project)
        if root is None:
            text = f"{spec.model_copy.uri} is not under an address that projects/{project} may write any more"
            raise _Failed(Cause.USER_CONFIG, text)
        locations = copy.spec.locations
        folder = locations.folders[spec.model.model]
        return worker_pb2.CopyRequest(
            field=FIELD,
            uri=spec.model_copy.uri,
            folder=folder,
            files=locations.known_files[folder].files,
            format=spec.model_copy.format,
            model=spec.model.model,
            notes_dir=str(self._notes),
            claim=locations.claim,
            endpoint=self._remote.endpoint,
            region=self._remote.region,
            secret=root.secret,
            budget_s=_BUDGET_S,
        )

    async def _report(self, copy: _Copy, **payloads: object) -> worker_pb2.Directive:
        """Reports events, in their order, as the one rank; the newest directive."""
        request = worker_pb2.ReportRequest(epoch=copy.spec.epoch, durable=bool(payloads))
        for name, payload in payloads.items():
            event = request.events.add()
            event.time.FromMicroseconds(self._clock.now_us())
            getattr(event, name).CopyFrom(payload)
        reply = await copy.attempt.report(request.SerializeToString())
        return worker_pb2.ReportReply.FromString(reply).directive


def _failure(violations: Sequence[worker_pb2.Violation]) -> _Failed:
    first = violations[0]
    cause = Cause(first.reason) if first.reason in Cause.__members__ else Cause.USER_CONFIG
    return _Failed(cause, first.message, {**first.metadata, "field": first.field})


def _prepare(spec: worker_pb2.AttemptSpec) -> Spool:
    """Makes the attempt's folder, and the spool, an existing one being continued."""
    return Spool(make_attempt_folder(spec) / SPOOL_NAME)

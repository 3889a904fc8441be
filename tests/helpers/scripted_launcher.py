"""A Launcher without processes: gangs are scripts of WorkerEvents that a test plays.

Each attempt that is ensured becomes a `ScriptedGang` in `launcher.gangs[key]`; the test emits events on it, or gives a
`script` that is run for every gang as it starts. Faults are switches: `unreachable`, `gang.die()`, `lose_cluster()`,
`duplicate` (every answer begins one event too early), `ensure_error` (what every launch raises).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from google.protobuf.timestamp_pb2 import Timestamp

from shardyard.v1 import job_pb2, metric_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.protocols import (
    AttemptKey,
    ClusterView,
    Launch,
    Node,
    Presence,
    Unreachable,
)

__all__ = ["ScriptedGang", "ScriptedLauncher", "whole_run"]


class ScriptedGang:
    """One attempt's supervisor: numbers what the test emits and keeps it."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.spec = worker_pb2.AttemptSpec.FromString(launch.spec)
        self.events: list[worker_pb2.WorkerEvent] = []
        self.directives: list[worker_pb2.Directive] = []
        self.presence = Presence.ALIVE
        self.changed = asyncio.Event()

    def emit(self, **payload: object) -> None:
        """Emits a WorkerEvent with the payload given by its field's name."""
        event = worker_pb2.WorkerEvent(sequence=len(self.events) + 1, time=Timestamp(seconds=1), **payload)
        self.events.append(event)
        self.changed.set()

    def ready(self) -> None:
        self.emit(ready=worker_pb2.GangReady(nodes=["node-1"] * self.launch.workers))

    def resumed(self, step: int = 0, path: str = "") -> None:
        self.emit(resumed=worker_pb2.Resumed(step=step, path=path))

    def canary(self) -> None:
        self.emit(canary=job_pb2.CanaryPassed(duration_s=0.5))

    def progress(self, step: int, loss: float = 1.0, total: int = 10) -> None:
        self.emit(progress=job_pb2.Progress(step=step, total_steps=total, loss=loss, tokens=step * 64))

    def metrics(self, first: int, last: int, name: str = "loss") -> None:
        points = [
            metric_service_pb2.MetricPoint(step=s, time=Timestamp(seconds=s), value=1 / s)
            for s in range(first, last + 1)
        ]
        self.emit(metrics=worker_pb2.Metrics(series=[metric_service_pb2.MetricSeries(metric=name, points=points)]))

    def checkpoint(self, step: int, *, epoch: int = 0, **metrics: float) -> None:
        path = f"{self.launch.attempt_dir}/step-{step:09}"
        self.emit(
            checkpoint=worker_pb2.CheckpointReport(
                change=job_pb2.CheckpointChanged.CHANGE_COMMITTED,
                path=path,
                epoch=epoch or self.launch.key.epoch,
                step=step,
                size_bytes=100,
                world_size=self.launch.workers,
                metrics=metrics,
            )
        )

    def evaluation(self, step: int, *, is_final: bool = False, is_partial: bool = False, **metrics: float) -> None:
        numbers = job_pb2.Evaluation(step=step, metrics=metrics, num_samples=10)
        numbers.is_final, numbers.is_partial = is_final, is_partial
        self.emit(evaluation=numbers)

    def finished(self, step: int) -> None:
        self.emit(finished=worker_pb2.TrainingFinished(step=step))

    def exported(self, model: object | None = None) -> None:
        self.emit(exported=worker_pb2.Exported(path=self.spec.export_dir, model=model))

    def failure(self, reason: str, *, rank: int = 0, step: int = 0) -> None:
        self.emit(failure=job_pb2.FailureReport(reason=reason, message=f"scripted {reason}", rank=rank, step=step))

    def ended(self, *, ok: bool = True) -> None:
        self.emit(ended=worker_pb2.GangEnded(ok=ok))

    def die(self) -> None:
        """The supervisor is gone: Ray's word that it is DEAD."""
        self.presence = Presence.DEAD
        self.changed.set()


def whole_run(gang: ScriptedGang, *, steps: int = 4) -> None:
    """The events of an attempt that succeeds, in the order of the contract."""
    first = max((int(path.rsplit("-", 1)[1]) for path in gang.spec.resume_candidates), default=0)
    gang.emit(phase=job_pb2.PhaseStarted(phase="loading model"))
    gang.ready()
    gang.resumed(first, gang.spec.resume_candidates[0] if gang.spec.resume_candidates else "")
    gang.progress(first + 1, total=steps)
    gang.canary()
    for step in range(first + 2, steps + 1):
        gang.metrics(step, step)
        gang.progress(step, loss=1 / step, total=steps)
    gang.evaluation(steps, loss=0.5, accuracy=0.9)
    gang.checkpoint(steps, loss=0.5)
    gang.finished(steps)
    gang.evaluation(steps, is_final=True, loss=0.5, accuracy=0.9)
    gang.exported()
    gang.ended()


class ScriptedLauncher:
    """See the module."""

    name = "scripted"

    def __init__(
        self,
        *,
        nodes: tuple[Node, ...] = (Node("node-1", "127.0.0.1", 8, 0, 16 << 30),),
        script: Callable[[ScriptedGang], None] | None = None,
    ) -> None:
        self.nodes = nodes
        self.script = script
        self.cluster_id = "cluster-1"
        self.gangs: dict[AttemptKey, ScriptedGang] = {}
        self.killed: list[AttemptKey] = []
        self.unreachable = False
        self.silence = "scripted to be unreachable"
        self.duplicate = False
        self.ignores_directives = True
        self.kills_fail = False
        self.ensure_error: Exception | None = None

    async def start(self) -> None:
        return None

    async def close(self, *, stop_cluster: bool) -> None:
        return None

    async def cluster(self) -> ClusterView:
        if self.unreachable:
            return ClusterView(False, "", "", (), self.silence)
        return ClusterView(True, self.cluster_id, "scripted", self.nodes)

    async def ensure(self, launch: Launch) -> None:
        self._reach()
        if self.ensure_error is not None:
            raise self.ensure_error
        if launch.key in self.gangs:
            return
        gang = ScriptedGang(launch)
        self.gangs[launch.key] = gang
        if self.script is not None:
            self.script(gang)

    async def lookup(self, key: AttemptKey) -> Presence:
        self._reach()
        gang = self.gangs.get(key)
        return Presence.ABSENT if gang is None else gang.presence

    async def events_after(self, key: AttemptKey, after: int, *, timeout_s: float, limit: int) -> list[bytes]:
        gang = await self._alive(key)
        start = max(after - 1, 0) if self.duplicate else after
        if len(gang.events) <= after:
            gang.changed.clear()
            try:
                async with asyncio.timeout(min(timeout_s, 0.2)):
                    await gang.changed.wait()
            except TimeoutError:
                return []
            gang = await self._alive(key)
        return [event.SerializeToString() for event in gang.events[start : start + limit]]

    async def direct(self, key: AttemptKey, directive: bytes) -> None:
        gang = await self._alive(key)
        message = worker_pb2.Directive.FromString(directive)
        gang.directives.append(message)
        if not self.ignores_directives:
            steps = [event.progress.step for event in gang.events if event.HasField("progress")]
            if message.action == worker_pb2.Directive.ACTION_CHECKPOINT_AND_STOP and steps:
                gang.checkpoint(steps[-1])
            gang.emit(stopped=worker_pb2.Stopped(reason=message.reason))
            gang.ended()

    async def kill(self, key: AttemptKey) -> None:
        self._reach()
        if self.kills_fail:
            raise Unreachable("scripted not to confirm")
        self.killed.append(key)
        gang = self.gangs.get(key)
        if gang is not None:
            gang.die()

    def lose_cluster(self) -> None:
        """Everything on the cluster is gone and it comes back as another."""
        self.cluster_id += "'"
        for gang in self.gangs.values():
            gang.die()

    def newest(self) -> ScriptedGang:
        """The gang that was launched last."""
        return list(self.gangs.values())[-1]

    def _reach(self) -> None:
        if self.unreachable:
            raise Unreachable(self.silence)

    async def _alive(self, key: AttemptKey) -> ScriptedGang:
        self._reach()
        gang = self.gangs.get(key)
        if gang is None or gang.presence is Presence.DEAD:
            raise LookupError(f"no supervisor of {key}")
        return gang

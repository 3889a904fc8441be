"""A gang of real trainer processes, started as the local launcher does it, with a supervisor that writes down.

They are forks of a warm process, unless they have GPUs, or are wanted `cold`.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from google.protobuf import json_format

from helpers import warm_ranks
from helpers.small_specs import locations
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2

_PROGRAM = "shardyard_trainer"
_Process = subprocess.Popen[bytes] | warm_ranks.WarmProcess
_Start = Callable[[list[str], dict[str, str], socket.socket], _Process]


class TrainerGang:
    """Starts one process a rank of `attempt`; `reply` answers each request, the default lets the gang continue."""

    def __init__(
        self,
        attempt: worker_pb2.AttemptSpec,
        reply: Callable[[worker_pb2.ReportRequest], worker_pb2.ReportReply] = lambda request: worker_pb2.ReportReply(),
        *,
        cold: bool = False,
    ) -> None:
        self._reply = reply
        self._changed = threading.Condition()
        self.events: list[worker_pb2.WorkerEvent] = []
        self.request_times: dict[int, list[float]] = {}
        folder = Path(attempt.attempt_dir)
        folder.mkdir(parents=True, exist_ok=True)
        spec = folder / "spec.json"
        spec.write_text(json_format.MessageToJson(attempt))
        has_gpus = attempt.spec.resources.gpus_per_worker > 0
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            **({} if has_gpus else {"DS_ACCELERATOR": "cpu"}),
        }
        start = _start_cold if cold or has_gpus else _start_warm
        self.ranks = [self._start(start, spec, rank, environment) for rank in range(attempt.world_size)]

    def _start(self, start: _Start, spec: Path, rank: int, environment: dict[str, str]) -> _Process:
        ours, theirs = socket.socketpair()
        with theirs:
            process = start([str(spec), "--rank", str(rank), "--local-rank", str(rank)], environment, theirs)
        threading.Thread(target=self._serve, args=[ours, rank], daemon=True).start()
        return process

    def _serve(self, channel: socket.socket, rank: int) -> None:
        with channel:
            while (head := _read(channel, 4)) is not None:
                body = _read(channel, struct.unpack(">I", head)[0])
                if body is None:
                    return
                request = worker_pb2.ReportRequest.FromString(body)
                with self._changed:
                    self.events += request.events
                    self.request_times.setdefault(rank, []).append(time.monotonic())
                    self._changed.notify_all()
                reply = self._reply(request).SerializeToString()
                channel.sendall(struct.pack(">I", len(reply)) + reply)

    def wait_for(self, condition: Callable[[worker_pb2.WorkerEvent], bool], *, timeout_s: float = 120) -> None:
        """Returns when an event fulfils the condition."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(map(condition, self.events)), timeout_s), self.kinds()

    def wait(self, *, timeout_s: float = 900) -> list[int]:
        """The exit codes."""
        try:
            return [rank.wait(timeout_s) for rank in self.ranks]
        finally:
            self.close()

    def close(self) -> None:
        """Ends what still runs."""
        for rank in self.ranks:
            rank.kill()
            rank.wait()

    def kinds(self) -> list[str | None]:
        return [event.WhichOneof("payload") for event in self.events]

    def losses(self) -> dict[int, float]:
        """Step → loss, as reported."""
        return self.series("loss")

    def series(self, metric: str) -> dict[int, float]:
        """Step → value, as reported."""
        return {
            point.step: point.value
            for event in self.events
            for series in event.metrics.series
            if series.metric == metric
            for point in series.points
        }

    def metrics(self) -> dict[str, float]:
        """Those of the last evaluation."""
        return dict([event.evaluation.metrics for event in self.events if event.HasField("evaluation")][-1])

    def failures(self) -> list[worker_pb2.WorkerEvent]:
        return [event for event in self.events if event.HasField("failure")]


def _start_cold(arguments: list[str], environment: dict[str, str], reports: socket.socket) -> _Process:
    command = [sys.executable, "-m", _PROGRAM, *arguments, "--report-fd", str(reports.fileno())]
    return subprocess.Popen(command, pass_fds=[reports.fileno()], env=environment)


def _start_warm(arguments: list[str], environment: dict[str, str], reports: socket.socket) -> _Process:
    return warm_ranks.start(_PROGRAM, arguments, environment=environment, stdout=1, stderr=2, reports=reports)


def attempt_in(
    folder: Path, name: str, spec: spec_pb2.JobSpec, *, epoch: int = 1, **models: Path
) -> worker_pb2.AttemptSpec:
    """Attempt number `epoch` of the job in `folder/name`; `spec` may name files of `folder` and the `models`."""
    job_dir = folder / name
    attempt_dir = job_dir / f"e{epoch:06}"
    return worker_pb2.AttemptSpec(
        job_name="projects/default/jobs/small",
        job_uid="0" * 32,
        epoch=epoch,
        spec=spec,
        locations=locations(folder, **models),
        job_dir=str(job_dir),
        attempt_dir=str(attempt_dir),
        export_dir=str(job_dir / "model"),
        world_size=spec.resources.workers,
        threads_per_rank=1,
        rendezvous=f"file://{attempt_dir / 'rendezvous'}",
    )


def run_to_the_end(attempt: worker_pb2.AttemptSpec) -> TrainerGang:
    """Returns the gang after all ranks have ended well."""
    gang = TrainerGang(attempt)
    assert gang.wait() == [0] * attempt.world_size, gang.failures()
    return gang


def _read(channel: socket.socket, length: int) -> bytes | None:
    data = b""
    while len(data) < length:
        try:
            part = channel.recv(length - len(data))
        except ConnectionError:
            return None
        if not part:
            return None
        data += part
    return data

"""A trainer without torch: reports as the real one does, meets its peers through files, and dies as the spec asks.

`script.json` in the attempt's folder says what it does (see `Script`). Launchers start it as they start the trainer:
`python -m helpers.fake_trainer spec.json --rank R --local-rank L --report-fd N`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from google.protobuf import json_format

from shardyard.worker.v1 import worker_pb2

Send = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Script:
    """What the ranks do.

    `deaths` maps a rank to [step, how]: `kill`, `abort`, `exit` (code 3, no report), `report` (DATA_ERROR), `wait`
    (hangs), or `balloon` (takes memory until it is ended).
    `leftover`: each rank starts a process that would outlive it.
    """

    steps: int = 5
    step_s: float = 0.0
    events_per_step: int = 1
    deaths: dict[str, list[int | str]] = field(default_factory=dict)
    leftover: bool = False

    def write(self, attempt_dir: Path) -> None:
        attempt_dir.mkdir(parents=True, exist_ok=True)
        (attempt_dir / "script.json").write_text(json.dumps(asdict(self)))


def run(spec: worker_pb2.AttemptSpec, rank: int, send: Send) -> None:
    """One rank of the fake gang; SystemExit(1) after it reported its failure."""
    folder = Path(spec.attempt_dir)
    (folder / "logs").mkdir(exist_ok=True)
    stderr = os.open(folder / "logs" / f"rank-{rank}.stderr.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stderr, 2)
    Rank(spec, rank, send, Script(**json.loads((folder / "script.json").read_text()))).run()


class Rank:
    """One rank: its place in the gang and its way to report."""

    def __init__(self, spec: worker_pb2.AttemptSpec, rank: int, send: Send, script: Script) -> None:
        self._spec = spec
        self._rank = rank
        self._send = send
        self._script = script
        self._meeting = Path(spec.attempt_dir) / "meeting"
        self._meeting.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        draft = self._meeting / f"draft-{self._rank}"
        draft.write_text(str(os.getpid()))
        draft.rename(self._meeting / f"pid-{self._rank}")
        if self._script.leftover:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (self._meeting / f"child-{self._rank}").write_text(str(child.pid))
        self._meet(0)
        self._say(worker_pb2.WorkerEvent(ready=worker_pb2.GangReady(pids=self._pids())), durable=True)
        self._say(worker_pb2.WorkerEvent(resumed=worker_pb2.Resumed(step=0)), durable=True)
        for step in range(1, self._script.steps + 1):
            self._maybe_die(step)
            self._meet(step)
            events = []
            for _ in range(self._script.events_per_step):
                event = worker_pb2.WorkerEvent()
                event.progress.step = step
                event.progress.total_steps = self._script.steps
                events.append(event)
            directive = self._say(*events)
            # All ranks decide together: rank 0 hears of it and leaves word for the others.
            if self._rank == 0 and directive.action:
                (self._meeting / "stop").write_text(f"{step} {directive.reason}")
            self._meet(step, phase="decided")
            if (self._meeting / "stop").exists():
                reason = (self._meeting / "stop").read_text().split(maxsplit=1)[1]
                self._say(worker_pb2.WorkerEvent(stopped=worker_pb2.Stopped(reason=reason)), durable=True)
                return
            time.sleep(self._script.step_s)
        self._say(worker_pb2.WorkerEvent(finished=worker_pb2.TrainingFinished(step=self._script.steps)), durable=True)

    def _say(self, *events: worker_pb2.WorkerEvent, durable: bool = False, every: bool = False) -> worker_pb2.Directive:
        if self._rank != 0 and not every:
            return worker_pb2.Directive()
        for event in events:
            event.time.GetCurrentTime()
        request = worker_pb2.ReportRequest(epoch=self._spec.epoch, rank=self._rank, events=events, durable=durable)
        reply = worker_pb2.ReportReply.FromString(self._send(request.SerializeToString()))
        if reply.fenced:
            raise SystemExit(7)
        return reply.directive

    def _meet(self, step: int, phase: str = "begun") -> None:
        """Waits for all ranks, as a collective would, and fails as one does if a peer is gone."""
        (self._meeting / f"{phase}-{step}-{self._rank}").touch()
        for peer in range(self._spec.world_size):
            while not (self._meeting / f"{phase}-{step}-{peer}").exists():
                if self._is_gone(peer):
                    self._fail("UNKNOWN", f"RuntimeError: connection closed by peer {peer}")
                time.sleep(0.002)

    def _is_gone(self, peer: int) -> bool:
        try:
            pid = (self._meeting / f"pid-{peer}").read_text()
        except FileNotFoundError:
            return False  # It has not started yet.
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except FileNotFoundError:
            return True
        return status.rsplit(")", 1)[1].split()[0] == "Z"

    def _pids(self) -> list[int]:
        return [int((self._meeting / f"pid-{rank}").read_text()) for rank in range(self._spec.world_size)]

    def _maybe_die(self, step: int) -> None:
        at, how = self._script.deaths.get(str(self._rank), [0, ""])
        if at != step:
            return
        print(f"rank {self._rank} dies at step {step}", file=sys.stderr, flush=True)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "abort":
            os.abort()
        elif how == "exit":
            os._exit(3)
        elif how == "report":
            self._fail("DATA_ERROR", "train.jsonl line 7 is not JSON")
        elif how == "wait":
            time.sleep(600)
        elif how == "balloon":
            held = []
            while True:
                held.append(bytearray(b"x" * (16 << 20)))

    def _fail(self, reason: str, message: str) -> None:
        print(message, file=sys.stderr, flush=True)
        event = worker_pb2.WorkerEvent()
        event.failure.reason = reason
        event.failure.message = message
        event.failure.rank = self._rank
        self._say(event, durable=True, every=True)
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--local-rank", type=int, required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    arguments = parser.parse_args()
    channel = socket.socket(fileno=arguments.report_fd)

    def send(request: bytes) -> bytes:
        channel.sendall(struct.pack(">I", len(request)) + request)
        return _exactly(channel, struct.unpack(">I", _exactly(channel, 4))[0])

    spec = json_format.Parse(arguments.spec.read_text(), worker_pb2.AttemptSpec())
    run(spec, arguments.rank, send)


def _exactly(channel: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = channel.recv(length - len(data))
        if not part:
            raise SystemExit("the supervisor is gone")
        data += part
    return data


if __name__ == "__main__":
    main()

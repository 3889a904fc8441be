"""Runs training programs by turns: each makes a block of optimizer steps while the others stand still.

The trainings that are compared live at the same time, each in processes of its own, and get the machine by turns: what
the machine does meanwhile hits all of them alike. A hook that torch calls after every step of every optimizer is the
gate, so that none of the programs has to be changed for it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

FD = "BENCH_GATE_FD"


class Gate:
    """In the training process: stops it after every block until the next one is asked for.

    `calls_per_step`: how often the optimizer's `step` runs in one training step (DeepSpeed's ZeRO-1 and 2 call it once
    a parameter group). `count` gives the real tokens so far. Make it before the model: its answers have the peak of the
    process's memory above what it had when the first parameter was made.
    """

    def __init__(self, *, calls_per_step: int = 1, count: Callable[[], int] = lambda: 0) -> None:
        self._fd = int(os.environ[FD])
        self._stream = os.fdopen(self._fd, "r+b", buffering=0, closefd=False)
        self._calls_per_step = calls_per_step
        self._calls = 0
        self._count = count
        self._left = 0
        self._started = 0.0
        self._tokens = 0
        self._before_bytes = 0
        self._note_memory_at_first_parameter()

    def install(self) -> None:
        """Hooks in; returns when the first block has been asked for."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(self._after_step)
        self._wait()

    def _note_memory_at_first_parameter(self) -> None:
        from torch.nn.modules.module import register_module_parameter_registration_hook

        def note(*_: Any) -> None:
            self._before_bytes = psutil.Process().memory_info().rss
            hook.remove()

        hook = register_module_parameter_registration_hook(note)

    def _after_step(self, *_: Any) -> None:
        self._calls += 1
        if self._calls % self._calls_per_step:
            return
        self._left -= 1
        if self._left > 0:
            return
        seconds = time.perf_counter() - self._started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._before_bytes
        answer = {"seconds": seconds, "tokens": self._count() - self._tokens, "peak_bytes": peak}
        self._stream.write(json.dumps(answer).encode() + b"\n")
        self._wait()

    def _wait(self) -> None:
        line = b""
        while not line.endswith(b"\n"):
            part = self._stream.read(64)
            if not part:
                os._exit(0)
            line += part
        self._left = int(line)
        self._tokens = self._count()
        self._started = time.perf_counter()


@dataclass(frozen=True)
class Block:
    """One block: seconds, the real tokens if the side counts them (else 0), and the peak of memory until its end.

    `peak_bytes` are over what the process had before its model.
    """

    seconds: float
    tokens: int
    peak_bytes: int


class Side:
    """In the bench: one training program behind its gate."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environment: dict[str, str],
        keep_fds: tuple[int, ...] = (),
    ) -> None:
        self.name = name
        self._log = log
        ours, theirs = socket.socketpair()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(), *keep_fds),
                env={**os.environ, **environment, FD: str(theirs.fileno())},
                start_new_session=True,
            )
        theirs.close()
        self._socket = ours
        self._answers = ours.makefile("rb")

    def block(self, steps: int, *, timeout_s: float = 600.0) -> Block:
        """Let it make that many steps. Raises RuntimeError with the end of its log if it ended instead."""
        self._socket.settimeout(timeout_s)
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            self._socket.sendall(f"{steps}\n".encode())
            line = self._answers.readline()
        except OSError as error:
            raise RuntimeError(f"{self.name}: {error}\n{self._tail()}") from error
        if not line:
            raise RuntimeError(f"{self.name} ended\n{self._tail()}")
        # Its reporter and loader threads stand still too while another side has its turn.
        os.killpg(self._process.pid, signal.SIGSTOP)
        answer = json.loads(line)
        return Block(**answer)

    def close(self) -> None:
        """Ends the program."""
        self._socket.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _tail(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-3000:]


def take_turns(sides: Sequence[Side], *, blocks: int, steps: int, warm_up: int) -> dict[str, list[Block]]:
    """Blocks of each side by name, taken by turns in an order that changes from round to round."""
    for side in sides:
        side.block(warm_up)
    measured: dict[str, list[Block]] = {side.name: [] for side in sides}
    for round_ in range(blocks):
        shift = round_ % len(sides)
        for side in [*sides[shift:], *sides[:shift]]:
            measured[side.name].append(side.block(steps))
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return measured

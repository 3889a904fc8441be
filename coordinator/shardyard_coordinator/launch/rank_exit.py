"""How a rank's process ended, and what that means for the failure."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from shardyard.v1 import job_pb2
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.launch.memory import EXIT_KILLED, OutOfMemory


@dataclass(frozen=True)
class RankExit:
    """How a rank's process ended; `code` is None if it was lost, never started, or ended by a signal.

    `memory`: set if the kernel ended it for lack of memory.
    """

    code: int | None
    signal: int | None = None
    detail: str = ""
    cause: Cause = Cause.WORKER_LOST
    memory: OutOfMemory | None = None


def report_of(rank: int, how: RankExit) -> job_pb2.FailureReport:
    """The failure report for a rank that ended without its own."""
    report = job_pb2.FailureReport(rank=rank)
    if how.memory is not None:
        report.reason = Cause.HOST_OOM
        report.message = f"rank {rank} was killed by {how.memory.by}: {how.memory.words}"
        report.metadata.update(how.memory.metadata)
        return report
    if how.code == EXIT_KILLED:
        report.reason = Cause.HOST_OOM
        report.message = (
            f"rank {rank} exited with code {EXIT_KILLED}, as a process that is killed when memory runs out does"
        )
        return report
    if how.code is not None:
        report.reason = Cause.UNKNOWN
        report.message = f"rank {rank} exited with code {how.code} and without a report"
        report.next_step = "see the end of its log"
        report.metadata["exit_code"] = str(how.code)
        return report
    report.reason = how.cause
    has_detail = how.cause is not Cause.WORKER_LOST and how.detail
    report.message = how.detail if has_detail else f"rank {rank} died without a report"
    if how.signal is not None:
        report.metadata["signal"] = _signal_name(how.signal)
        report.message = f"rank {rank} was ended by {report.metadata['signal']}"
    if how.detail and not has_detail:
        report.metadata["detail"] = how.detail
    return report


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

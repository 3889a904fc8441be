"""Stops the service of a state directory: its jobs if asked, its process, then the Ray that it started."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shardyard._sync.client import Client
from shardyard._sync.job import Job
from shardyard.errors import DeadlineExceeded, FailedPrecondition, ShardyardError

_CANCEL_S = 60.0
# The longest wait for a gang that cannot be reached.
_UNREACHABLE_S = 5.0
_LOOK_S = 1.0
_DRAIN_S = 60.0
# States that the next start does not continue training from.
_SETTLED = ("cancelling", "pausing", "paused")
_RAY = "ray.json"
_LIVE = "state != SUCCEEDED AND state != FAILED AND state != CANCELLED"


@dataclass(frozen=True)
class Stopped:
    """What was stopped. `kept`: what becomes of each job that was kept, or how one ended before it could be cancelled.
    `cancelling`: jobs that were asked to end, and whose gangs had not confirmed it in time. `unreachable`: those of all
    of them whose gangs do not answer."""

    state_dir: str
    service: bool
    ray: bool
    cancelled: tuple[str, ...]
    kept: Mapping[str, str]
    cancelling: tuple[str, ...]
    unreachable: tuple[str, ...]
    paused: tuple[str, ...]
    not_cancelled: bool

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, for `--json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The result as lines for people."""
        found = [f"cancelled {name}" for name in self.cancelled]
        found += [f"{name} is being cancelled; {self._how_it_ends(name)}" for name in self.cancelling]
        found += [f"{name} {words}" for name, words in self.kept.items()]
        found += [f"{name} stays paused" for name in self.paused]
        found += ["the service has stopped"] if self.service else []
        found += ["its Ray has stopped"] if self.ray else []
        found = found or [f"nothing runs for {self.state_dir}"]
        if self.unreachable and not self.ray:
            found.append(
                "a gang that does not answer may still run; if it is permanently gone, end its job at the next start: "
                f"shardyard cancel --lost {self.unreachable[0]}"
            )
        if self.not_cancelled:
            found.append(
                "no service answered, so nothing was cancelled: jobs that have not ended continue at its next start"
            )
        return found

    def _how_it_ends(self, name: str) -> str:
        if name in self.unreachable and not self.ray:
            return "its gang does not answer, so the next start asks it again"
        return "the next start finishes that"


@dataclass(frozen=True)
class _Settled:
    """The names of the live jobs by what becomes of them."""

    cancelled: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    cancelling: tuple[str, ...] = ()
    unreachable: tuple[str, ...] = ()
    paused: tuple[str, ...] = ()


def stop_service(state_dir: Path, *, cancel_jobs: bool | None) -> Stopped:
    """Stop it; if there are live jobs, the caller must say whether to cancel them.

    Raises: FailedPrecondition if there are live jobs and the caller did not say, or the process does not end.
    """
    record = _record(state_dir)
    settled = None
    if record is not None:
        settled = _settle_jobs(record, cancel_jobs=cancel_jobs, has_ray=(state_dir / _RAY).exists())
        _end_process(record)
    return Stopped(
        str(state_dir),
        service=record is not None,
        ray=_stop_ray(state_dir),
        **asdict(settled or _Settled()),
        not_cancelled=bool(cancel_jobs) and settled is None,
    )


def start_ticks(pid: int) -> int:
    """When a process started, in ticks since boot; 0 if it is gone, or if the system does not report it."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return 0 if stat[0] in "ZX" else int(stat[19])
    return 0


def is_service(record: dict[str, Any]) -> bool:
    """Whether the process that wrote the record still runs: its number may have been reused."""
    pid, started = int(record["pid"]), int(record["start_ticks"])
    if Path("/proc/self").exists():
        return bool(started) and start_ticks(pid) == started
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return True
    return False


def _record(state_dir: Path) -> dict[str, Any] | None:
    """What the running service wrote about itself; None if none runs."""
    try:
        record = json.loads((state_dir / "coordinator.json").read_text())
        return record if is_service(record) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _client_of(record: dict[str, Any], project: str) -> Client:
    """A client of the service of that record, with the token of its first admin if there is no other one.

    Raises: ShardyardError.
    """
    address = str(record["address"]).replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:")
    token = None
    if not any(os.environ.get(name) for name in ("SHARDYARD_TOKEN", "SHARDYARD_TOKEN_FILE")):
        with contextlib.suppress(OSError, KeyError):
            token = Path(record["admin_token"]).read_text().strip() or None
    ca = os.environ.get("SHARDYARD_CA") or record.get("certificate")
    return Client(address, token, project, ca=ca, reconnect_for=5)


def _settle_jobs(record: dict[str, Any], *, cancel_jobs: bool | None, has_ray: bool) -> _Settled | None:
    """What happens to the live jobs; None if the service does not answer; the process is ended in any case."""
    with contextlib.ExitStack() as stack:
        try:
            projects = record.get("projects", ["default"])
            clients = [stack.enter_context(_client_of(record, project)) for project in projects]
            live = [job for client in clients for job in client.jobs(filter=_LIVE)]
            cluster = clients[0].server_info().cluster
        except ShardyardError:  # Or the token would be readable on the way.
            return None
        if cancel_jobs:
            return _cancel(live)
        names = {_named(job): job.state for job in live}
        kept = [job for job in live if job.state not in _SETTLED]
        if kept and cancel_jobs is None:
            some = ", ".join(map(_named, kept[:5]))
            raise FailedPrecondition(
                f"{len(kept)} job{'s' * (len(kept) != 1)} not ended ({some}{' …' * (len(kept) > 5)}): "
                "stop with --cancel-jobs, or with --keep-jobs to continue them at the next start",
                reason="JOBS_LIVE",
            )
        is_elsewhere = cluster is not None and cluster.launcher == "ray" and not has_ray
        return _Settled(
            kept={_named(job): _what_follows(job, is_elsewhere=is_elsewhere) for job in kept},
            cancelling=tuple(name for name, state in names.items() if state == "cancelling"),
            unreachable=tuple(_named(job) for job in live if _is_unreachable(job)),
            paused=tuple(name for name, state in names.items() if state in ("pausing", "paused")),
        )


def _what_follows(job: Job, *, is_elsewhere: bool) -> str:
    """What becomes of a job that is kept, once the service has stopped."""
    if job.state == "queued" and not job.info.attempt_count:
        return "waits for the next start"
    if _is_unreachable(job):
        return "does not answer; the next start asks it again"
    if is_elsewhere and job.state not in ("queued", "recovering"):
        return "keeps running in its cluster; the next start watches it again"
    if job.info.latest_checkpoint:
        return "continues at the next start, from its last checkpoint"
    return "starts over at the next start: it has no checkpoint yet"


def _cancel(live: list[Job]) -> _Settled:
    """Cancel them all, then wait for them within one limit; a gang that cannot be reached is not waited for long."""
    for job in live:
        with contextlib.suppress(FailedPrecondition):  # It ended by itself meanwhile.
            job.cancel()
    begun = time.monotonic()
    while waits := [job for job in live if not job.info.is_terminal]:
        since = time.monotonic() - begun
        if since > _CANCEL_S or (since > _UNREACHABLE_S and all(map(_is_unreachable, waits))):
            break
        with contextlib.suppress(DeadlineExceeded):
            waits[0].wait(_LOOK_S, check=False)
        for job in waits[1:]:
            job.refresh()
    ended = [job for job in live if job not in waits]
    return _Settled(
        cancelled=tuple(_named(job) for job in ended if job.state == "cancelled"),
        kept={
            _named(job): f"had {job.state} before it could be cancelled" for job in ended if job.state != "cancelled"
        },
        cancelling=tuple(map(_named, waits)),
        unreachable=tuple(_named(job) for job in waits if _is_unreachable(job)),
    )


def _named(job: Job) -> str:
    """The job as commands name it: in another project than `default` by its full name."""
    return job.id if job.name.startswith("projects/default/") else job.name


def _is_unreachable(job: Job) -> bool:
    return any(condition.type == "unreachable" for condition in job.info.conditions)


def _end_process(record: dict[str, Any]) -> None:
    pid = int(record["pid"])
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _DRAIN_S
    while is_service(record):
        if time.monotonic() > deadline:
            raise FailedPrecondition(_hangs(pid))
        time.sleep(0.05)


def _hangs(pid: int) -> str:
    return (
        f"process {pid} has not ended after {_DRAIN_S:.0f} s; its log says why. If it hangs, `kill -9 {pid}` ends it: "
        "what it has accepted is not lost, and `shardyard serve` continues from there"
    )


def _stop_ray(state_dir: Path) -> bool:
    """End the Ray of the state directory, if one runs."""
    if not (state_dir / _RAY).exists():
        return False
    # Imported by name: the SDK never imports the coordinator; a machine with a state directory has it installed.
    head = importlib.import_module("shardyard_coordinator.launch.ray_head").EmbeddedHead(state_dir, cpus=1)
    ran = bool(head.alive())
    asyncio.run(head.stop())
    return ran

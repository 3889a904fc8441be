"""The two interfaces to the cluster: a Launcher runs attempts, a Compute answers questions in warm processes.

Each has a Ray and a local implementation here, and a scripted one in the tests. Both exchange protobuf bytes of
`shardyard.worker.v1`, and neither knows what a job is.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from shardyard_coordinator.domain.causes import Cause


@dataclass(frozen=True)
class AttemptKey:
    """One launch of a gang: the job's uid and the attempt's epoch."""

    job_uid: str
    epoch: int


@dataclass(frozen=True)
class Launch:
    """A gang to start. `placement` has a (node id, workers on it) pair for each node used.

    `spec` is an AttemptSpec; `attempt_dir` is its attempt's folder, where spool and logs go.
    """

    key: AttemptKey
    spec: bytes
    attempt_dir: str
    workers: int
    cpus_per_worker: int
    gpus_per_worker: int
    placement: tuple[tuple[str, int], ...]


class Presence(StrEnum):
    """What is known of an attempt. Only DEAD is evidence of a loss; UNKNOWN is not dead."""

    ALIVE = "ALIVE"
    ABSENT = "ABSENT"
    DEAD = "DEAD"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True)
class Node:
    """A node of the cluster with all of its resources, not only free ones.

    `used_cpus` and `used_gpus` are held according to the cluster, by this service's gangs or by others.
    `accelerator` is the scheduler's name for its GPUs; `reserved_bytes` is what the service's own processes take of the
    memory. `gpu_name`, `gpu_memory_bytes` and `compute_capability` are the
    weakest GPU's, as its driver reports them; empty and 0: not known.
    """

    id: str
    address: str
    cpus: int
    gpus: int
    memory_bytes: int
    accelerator: str = ""
    reserved_bytes: int = 0
    gpu_name: str = ""
    gpu_memory_bytes: int = 0
    compute_capability: float = 0.0
    used_cpus: int = 0
    used_gpus: int = 0


@dataclass(frozen=True)
class ClusterView:
    """The cluster as it is now. `cluster_id` changes when everything on it was lost; not connected: no nodes."""

    connected: bool
    cluster_id: str
    address: str
    nodes: tuple[Node, ...]
    message: str = ""


class Unreachable(Exception):
    """The cluster, or an attempt on it, does not answer: nothing is known about it."""


# Errors of a file system that is not mounted, whose server has lost the file, or whose disk fails.
_GONE = {
    *(errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENODEV, errno.ENXIO),
    *(errno.ENOTCONN, errno.EREMOTEIO, errno.EUCLEAN, errno.ETIMEDOUT, errno.EHOSTDOWN),
}


class NodeGone(Exception):
    """A node that an attempt was to start on is no longer there; the text names it."""


class StorageFailed(Exception):
    """The storage cannot be used; `cause` is one of the STORAGE_ causes."""

    def __init__(self, text: str, cause: Cause) -> None:
        super().__init__(text)
        self.cause = cause

    def __reduce__(self) -> tuple[type, tuple[str, Cause]]:
        """Crosses processes: an exception is otherwise rebuilt from its text alone."""
        return type(self), (str(self), self.cause)

    @classmethod
    def of(cls, error: OSError) -> StorageFailed:
        """Makes one from an error of the operating system."""
        words = error.strerror or str(error)
        return cls(f"{error.filename}: {words}" if error.filename else words, storage_cause(error))


def storage_cause(error: OSError) -> Cause:
    """What an error of the storage's file system means: full, read-only, or not there."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Cause.STORAGE_FULL
    return Cause.STORAGE_UNAVAILABLE if error.errno in _GONE else Cause.STORAGE_NOT_WRITABLE


class Launcher(Protocol):
    """Runs attempts. Every method but `start` and `close` may raise Unreachable."""

    name: str

    async def start(self) -> None:
        """Starts connecting in the background, retrying forever; returns at once."""

    async def close(self, *, stop_cluster: bool) -> None:
        """Lets go of the cluster; with `stop_cluster` also ends what this service started of it."""

    async def cluster(self) -> ClusterView:
        """The cluster as it is now; never raises Unreachable."""

    async def ensure(self, launch: Launch) -> None:
        """Starts the attempt unless its supervisor is there already.

        Raises: Unreachable; StorageFailed; NodeGone.
        """

    async def lookup(self, key: AttemptKey) -> Presence:
        """Whether the attempt's supervisor is there."""

    async def events_after(self, key: AttemptKey, after: int, *, timeout_s: float, limit: int) -> list[bytes]:
        """WorkerEvents with a sequence over `after`, in order; waits up to `timeout_s` for the first.

        Raises: Unreachable; LookupError if the attempt is ABSENT or DEAD.
        """

    async def direct(self, key: AttemptKey, directive: bytes) -> None:
        """Gives the gang a Directive; LookupError if the attempt is ABSENT or DEAD."""

    async def kill(self, key: AttemptKey) -> None:
        """Ends the attempt's processes and returns when they are confirmed gone; no error if there are none."""


class ComputeUnavailable(Exception):
    """No process can answer at the moment; try again."""


class ComputeFailed(Exception):
    """The system failed the function, such as a disk that is full; the text is for the log, not for users."""


class InputFailed(Exception):
    """What was read is at fault: it ended its process, took too much of time or memory, or nobody foresaw it.

    The same question would end the same way. `field`, `what` and `reason` are of the last note of what was being read,
    empty if there is none; `how` continues the sentence after "reading it"; `log` is for the log.
    """

    def __init__(self, how: str, *, note: Mapping[str, str], log: str = "") -> None:
        super().__init__(f"{how} (reading {note.get('what', 'nothing that is known')})")
        self.how = how
        self.field = note.get("field", "")
        self.what = note.get("what", "")
        self.reason = note.get("reason", "")
        self.log = log


class Compute(Protocol):
    """Calls functions of the trainer package in processes beside the coordinator.

    `caller` goes from the widest to the narrowest, such as (principal, connection): callers take turns on each level.
    """

    async def start(self) -> None:
        """Begins to warm up; returns at once."""

    async def close(self) -> None:
        """Ends the compute processes."""

    async def inspect(
        self,
        function: str,
        request: bytes,
        *,
        caller: tuple[str, ...],
        cpu_s: float,
        route: bytes = b"",
        network: bool = False,
        secrets: Sequence[str] = (),
    ) -> bytes:
        """Calls `package.module:function` with bytes, in a separate process that may compute for `cpu_s`.

        With names of `secrets` it is called with their values too, by name (None: there is no such file), which are
        read beside the process, and are known to it alone.

        The wait for a turn does not count. Questions of one `route` name the same files: the process of one may answer
        the next. A caller that leaves ends nothing that has begun.

        Raises: InputFailed; ComputeUnavailable, ComputeFailed.
        """

    async def ask(self, function: str, model: str, request: bytes, *, caller: tuple[str, ...], turn_s: float) -> bytes:
        """Asks the process of a model, together with what else it is asked; a turn of it may take `turn_s`.

        Raises: InputFailed; ComputeUnavailable, ComputeFailed.
        """

    async def confinement(self) -> Mapping[str, str]:
        """What the processes may not do, in words by name; empty: not known yet."""

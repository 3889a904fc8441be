"""Which pending gang starts where: a pure function of what is known (docs/scheduling.md).

What it promises: a gang starts whole or not at all; no slot is held twice; the same snapshot gives the same decisions,
byte for byte, in any process; and what could start is not left behind. Pending jobs are taken by priority, then in the
order of their first submission. One that does not fit is passed over (SKIP), so that slots never idle for it; it comes
first again in the next pass. There is no clock and no I/O in here; times are integer seconds.

A slot is one GPU on a node with accelerators, one CPU core on a node without; a gang that asks for no GPU runs on nodes
without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

CPU = "cpu"
# (node, workers on it) pairs.
Placement = tuple[tuple[str, int], ...]


class NodeState(StrEnum):
    """Whether gangs may start on a node."""

    READY = "READY"
    CORDONED = "CORDONED"
    DRAINING = "DRAINING"
    SUSPECT = "SUSPECT"


class Backfill(StrEnum):
    """Who may start before a gang that does not fit: SKIP anybody, NONE nobody."""

    NONE = "NONE"
    SKIP = "SKIP"


class Constraint(StrEnum):
    """What stands in the way of a start; the names of `PendingInfo.Constraint`."""

    RANK = "RANK"
    INSUFFICIENT_SLOTS = "INSUFFICIENT_SLOTS"
    FRAGMENTED = "FRAGMENTED"
    NOT_BEFORE = "NOT_BEFORE"
    CLUSTER_UNREACHABLE = "CLUSTER_UNREACHABLE"
    NO_SUCH_NODE = "NO_SUCH_NODE"


@dataclass(frozen=True)
class NodeInfo:
    """A node: what it has in all, and what gangs of the snapshot do not hold of it is free."""

    id: str
    slots: int
    accelerator: str = CPU
    memory_bytes: int = 0
    state: NodeState = NodeState.READY


@dataclass(frozen=True)
class PendingJob:
    """A job that waits. `order` is its first submission's; `sizes` are the legal numbers of workers, descending."""

    job: str
    order: int
    epoch: int
    sizes: tuple[int, ...]
    slots_per_worker: int
    accelerator: str = CPU
    queue: str = "default"
    user: str = ""
    priority: int = 0
    not_before: int = 0
    waiting_since: int = 0
    avoid_nodes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RunningJob:
    """A gang that holds slots until it is confirmed gone; `placement` has (node, workers on it) pairs."""

    job: str
    epoch: int
    placement: Placement
    slots_per_worker: int


@dataclass(frozen=True)
class Snapshot:
    """All that a decision may look at. `generation` is the last event applied."""

    pending: tuple[PendingJob, ...] = ()
    running: tuple[RunningJob, ...] = ()
    nodes: tuple[NodeInfo, ...] = ()
    connected: bool = True
    generation: int = 0


@dataclass(frozen=True)
class Policy:
    """The knobs."""

    backfill: Backfill = Backfill.SKIP


@dataclass(frozen=True)
class Start:
    """Launch attempt `epoch` of the job. `placement` has (node, workers on it) pairs."""

    job: str
    epoch: int
    workers: int
    placement: Placement
    reason: str = "FITS"


class Blocked(NamedTuple):
    """Why not: slots needed, slots free, whom it waits for, and until when where that is known (0: not)."""

    constraint: Constraint
    need: int
    have: int
    by: str = ""
    until: int = 0


class Shape(NamedTuple):
    """What jobs that wait for the same reason have in common."""

    queue: str
    priority: int
    accelerator: str
    sizes: tuple[int, ...]
    slots_per_worker: int


@dataclass(frozen=True)
class Nothing:
    """`count` jobs of one shape stay where they are, for one reason."""

    shape: Shape
    count: int
    blocked: Blocked


Decision = Start | Nothing


def decide(snapshot: Snapshot, now: int, policy: Policy) -> list[Decision]:
    """The starts, in the order in which they were admitted, then one Nothing for each shape and reason that waits."""
    starts, waiting = admit(snapshot, now, policy)
    counts: dict[tuple[Shape, Blocked], int] = {}
    for job, blocked in waiting:
        key = (_shape(job), blocked)
        counts[key] = counts.get(key, 0) + 1
    return [*starts, *(Nothing(shape, count, blocked) for (shape, blocked), count in sorted(counts.items()))]


def admit(snapshot: Snapshot, now: int, policy: Policy) -> tuple[list[Start], list[tuple[PendingJob, Blocked]]]:
    """One pass over the pending jobs in their order: who starts, and who waits for what."""
    passed = _Pass(snapshot)
    starts: list[Start] = []
    waiting: list[tuple[PendingJob, Blocked]] = []
    stuck = False
    for job in ranked(snapshot.pending):
        blocked = passed.refuse(job, now, stuck=stuck)
        if blocked is None:
            starts.append(passed.start(job))
            continue
        waiting.append((job, blocked))
        # Only who could run now, but for room, holds the others back.
        for_room = blocked.constraint in (Constraint.INSUFFICIENT_SLOTS, Constraint.FRAGMENTED)
        stuck = stuck or (policy.backfill is Backfill.NONE and for_room)
    return starts, waiting


def ranked(pending: Sequence[PendingJob]) -> list[PendingJob]:
    """Whose turn it is: the higher priority first, then the earlier submission."""
    return sorted(pending, key=lambda job: (-job.priority, job.order, job.job))


def _shape(job: PendingJob) -> Shape:
    return Shape(job.queue, job.priority, job.accelerator, job.sizes, job.slots_per_worker)


def place(job: PendingJob, workers: int, nodes: Sequence[NodeInfo], free: dict[str, int]) -> Placement:
    """Where `workers` of the job fit now: on one node if one is free enough (the fullest such), else on the emptiest
    nodes, the last one chosen as tightly as possible; empty: nowhere. `free` has the free slots of each node.
    """
    per = job.slots_per_worker
    usable = [node for node in nodes if admits(node, job) and free[node.id] >= per]
    single = [node for node in usable if free[node.id] >= per * workers]
    if single:
        return ((min(single, key=lambda node: (free[node.id], node.id)).id, workers),)
    left, chosen = workers, []
    rest = sorted(usable, key=lambda node: (-free[node.id], node.id))
    while rest and left:
        fitting = [node for node in rest if free[node.id] >= per * left]
        node = min(fitting, key=lambda node: (free[node.id], node.id)) if fitting else rest[0]
        rest.remove(node)
        taken = min(free[node.id] // per, left)
        chosen.append((node.id, taken))
        left -= taken
    return tuple(chosen) if not left else ()


def admits(node: NodeInfo, job: PendingJob) -> bool:
    """Whether the job may use the node at all."""
    ready = node.state is NodeState.READY and node.id not in job.avoid_nodes
    return ready and node.accelerator == job.accelerator


def free_slots(snapshot: Snapshot) -> dict[str, int]:
    """The free slots of every node; never less than none, even of a node that has shrunk."""
    free = {node.id: node.slots for node in snapshot.nodes}
    for gang in snapshot.running:
        for node, workers in gang.placement:
            if node in free:
                free[node] -= workers * gang.slots_per_worker
    return {node: max(slots, 0) for node, slots in free.items()}


@dataclass
class _Pass:
    """What is free while one pass goes on."""

    snapshot: Snapshot
    free: dict[str, int] = field(init=False)
    nodes: tuple[NodeInfo, ...] = field(init=False)
    failed: set[tuple[str, tuple[int, ...], int, frozenset[str]]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.nodes = tuple(sorted(self.snapshot.nodes, key=lambda node: node.id))
        self.free = free_slots(self.snapshot)

    def refuse(self, job: PendingJob, now: int, *, stuck: bool) -> Blocked | None:
        """The first test that fails, in the order of docs/scheduling.md; None: it can start."""
        need = min(job.sizes) * job.slots_per_worker
        have = sum(self.free[node.id] for node in self.nodes if admits(node, job))
        if not self.snapshot.connected:
            return Blocked(Constraint.CLUSTER_UNREACHABLE, need, have)
        if job.not_before > now:
            return Blocked(Constraint.NOT_BEFORE, need, have, until=job.not_before)
        if not self._could_ever(job):
            return Blocked(Constraint.NO_SUCH_NODE, need, have)
        if stuck:
            return Blocked(Constraint.RANK, need, have)
        kind = (job.accelerator, job.sizes, job.slots_per_worker, job.avoid_nodes)
        if kind not in self.failed and any(place(job, size, self.nodes, self.free) for size in job.sizes):
            return None
        # What did not fit in this pass does not fit later in it: slots only become fewer.
        self.failed.add(kind)
        return Blocked(Constraint.FRAGMENTED if have >= need else Constraint.INSUFFICIENT_SLOTS, need, have)

    def start(self, job: PendingJob) -> Start:
        """Takes the slots of the largest size that fits."""
        for size in job.sizes:
            placement = place(job, size, self.nodes, self.free)
            if placement:
                for node, workers in placement:
                    self.free[node] -= workers * job.slots_per_worker
                return Start(job.job, job.epoch + 1, size, placement)
        raise ValueError(f"{job.job} does not fit")

    def _could_ever(self, job: PendingJob) -> bool:
        whole = {node.id: node.slots for node in self.nodes}
        return bool(place(job, min(job.sizes), self.nodes, whole))

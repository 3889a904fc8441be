"""Which pending gang starts where: a pure function of what is known (docs/scheduling.md).

What it promises: a gang starts whole or not at all; no slot is held twice; the same snapshot gives the same decisions,
byte for byte, in any process; and every job that could start does start. Pending jobs are taken by priority, then in
the order of their first submission. A job that does not fit is skipped (SKIP), so that slots never idle for it; it
comes first again in the next pass. There is no clock and no I/O in here; times are integer seconds.

`Admission` is one pass, fed job by job: the loop stops feeding it when no slot is left. `admit` feeds it a whole
snapshot, to say why jobs wait.

A slot is one GPU on a node with accelerators, one CPU core on a node without; a gang that asks for no GPU runs on nodes
without.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """Whether jobs behind one that does not fit may start: SKIP yes, NONE no."""

    NONE = "NONE"
    SKIP = "SKIP"


class Constraint(StrEnum):
    """The constraints that delay a start; the names of `PendingInfo.Constraint`."""

    RANK = "RANK"
    INSUFFICIENT_SLOTS = "INSUFFICIENT_SLOTS"
    FRAGMENTED = "FRAGMENTED"
    NOT_BEFORE = "NOT_BEFORE"
    CLUSTER_UNREACHABLE = "CLUSTER_UNREACHABLE"
    NO_SUCH_NODE = "NO_SUCH_NODE"


@dataclass(frozen=True)
class NodeInfo:
    """A node with all of its slots; those that neither gangs of the snapshot nor others hold are free.

    `used`: slots that are held according to the cluster, by those gangs or, in a shared cluster, by others.
    """

    id: str
    slots: int
    accelerator: str = CPU
    memory_bytes: int = 0
    state: NodeState = NodeState.READY
    used: int = 0


@dataclass(frozen=True)
class PendingJob:
    """A waiting job. `order` is that of its first submission; `sizes` are the legal numbers of workers, descending."""

    job: str
    order: int
    epoch: int
    sizes: tuple[int, ...]
    slots_per_worker: int
    accelerator: str = CPU
    queue: str = "default"
    priority: int = 0
    not_before: int = 0
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
    """Everything that a decision may depend on. `generation` is the last event applied."""

    pending: tuple[PendingJob, ...] = ()
    running: tuple[RunningJob, ...] = ()
    nodes: tuple[NodeInfo, ...] = ()
    connected: bool = True
    generation: int = 0


@dataclass(frozen=True)
class Policy:
    """The settings of the scheduling policy."""

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
    """Why a job does not start: slots needed, slots free, the job it waits for, and until when if known (0: not).

    `others`: slots that are held, but not by this service's gangs.
    """

    constraint: Constraint
    need: int
    have: int
    by: str = ""
    until: int = 0
    others: int = 0


def admit(snapshot: Snapshot, now: int, policy: Policy) -> tuple[list[Start], list[tuple[PendingJob, Blocked]]]:
    """One whole pass over the pending jobs in their order: the starts, and why the others wait."""
    admission = Admission(snapshot, now, policy)
    starts: list[Start] = []
    waiting: list[tuple[PendingJob, Blocked]] = []
    for job in ranked(snapshot.pending):
        found = admission.consider(job)
        if isinstance(found, Start):
            starts.append(found)
        else:
            waiting.append((job, found))
    return starts, waiting


def ranked(pending: Sequence[PendingJob]) -> list[PendingJob]:
    """The order of jobs: the higher priority first, then the earlier submission."""
    return sorted(pending, key=lambda job: (-job.priority, job.order, job.job))


def admits(node: NodeInfo, job: PendingJob) -> bool:
    """Whether the job may use the node at all."""
    ready = node.state is NodeState.READY and node.id not in job.avoid_nodes
    return ready and node.accelerator == job.accelerator


def free_slots(snapshot: Snapshot) -> dict[str, int]:
    """The free slots of every node; never negative, even if a node has shrunk."""
    held = _held_slots(snapshot)
    return {node.id: max(node.slots - max(held[node.id], node.used), 0) for node in snapshot.nodes}


def _held_slots(snapshot: Snapshot) -> dict[str, int]:
    """The slots of every node that gangs of the snapshot hold."""
    held = {node.id: 0 for node in snapshot.nodes}
    for gang in snapshot.running:
        for node, workers in gang.placement:
            if node in held:
                held[node] += workers * gang.slots_per_worker
    return held


class Admission:
    """One pass: jobs are considered in their order, and each start takes its slots from the free ones.

    Jobs of one class (accelerator, nodes avoided, sizes, slots per worker) are treated alike: their free slots are
    summed once, and a class that did not fit in this pass is not tried again, because slots only become fewer.
    """

    def __init__(self, snapshot: Snapshot, now: int, policy: Policy) -> None:
        self._connected = snapshot.connected
        self._now = now
        self._backfill = policy.backfill
        self._nodes = snapshot.nodes
        self._free = free_slots(snapshot)
        held = _held_slots(snapshot)
        self._others = {node.id: min(node.used, node.slots) - held[node.id] for node in snapshot.nodes}
        self._whole = {node.id: node.slots for node in snapshot.nodes}
        self._left = sum(self._free[node.id] for node in snapshot.nodes if node.state is NodeState.READY)
        self._rooms: dict[tuple[str, frozenset[str]], tuple[_Room, _Room]] = {}
        self._could: dict[tuple[str, frozenset[str], int, int], bool] = {}
        self._failed: set[tuple[str, frozenset[str], tuple[int, ...], int]] = set()
        self._stuck = False

    @property
    def is_over(self) -> bool:
        """Whether no other job can start in this pass."""
        return not self._connected or self._stuck or self._left <= 0

    def consider(self, job: PendingJob) -> Start | Blocked:
        """The start, or the first test that fails, in the order of docs/scheduling.md."""
        need = min(job.sizes) * job.slots_per_worker
        free, whole = self._rooms_of(job)
        have = free.total
        if not self._connected:
            return Blocked(Constraint.CLUSTER_UNREACHABLE, need, have)
        if job.not_before > self._now:
            return Blocked(Constraint.NOT_BEFORE, need, have, until=job.not_before)
        if not self._could_ever(job, whole):
            return Blocked(Constraint.NO_SUCH_NODE, need, have)
        if self._stuck:
            return Blocked(Constraint.RANK, need, have)
        kind = (job.accelerator, job.avoid_nodes, job.sizes, job.slots_per_worker)
        start = None if kind in self._failed else self._start(job, free)
        if start is not None:
            return start
        self._failed.add(kind)
        # Only a job that lacks nothing but slots holds the others back.
        self._stuck = self._backfill is Backfill.NONE
        constraint = Constraint.FRAGMENTED if have >= need else Constraint.INSUFFICIENT_SLOTS
        return Blocked(constraint, need, have, others=whole.held_by(self._others))

    def _start(self, job: PendingJob, free: _Room) -> Start | None:
        """Takes the slots of the largest size that fits."""
        for size in job.sizes:
            placement = free.place(size, job.slots_per_worker)
            if placement:
                for node, workers in placement:
                    self._take(node, workers * job.slots_per_worker)
                return Start(job.job, job.epoch + 1, size, placement)
        return None

    def _take(self, node: str, slots: int) -> None:
        before = self._free[node]
        self._free[node] = before - slots
        self._left -= slots
        for room, _ in self._rooms.values():
            room.change(node, before, before - slots)

    def _rooms_of(self, job: PendingJob) -> tuple[_Room, _Room]:
        key = (job.accelerator, job.avoid_nodes)
        found = self._rooms.get(key)
        if found is None:
            usable = [node.id for node in self._nodes if admits(node, job)]
            found = self._rooms[key] = (_Room(usable, self._free), _Room(usable, self._whole))
        return found

    def _could_ever(self, job: PendingJob, whole: _Room) -> bool:
        key = (job.accelerator, job.avoid_nodes, min(job.sizes), job.slots_per_worker)
        found = self._could.get(key)
        if found is None:
            found = self._could[key] = bool(whole.place(key[2], key[3]))
        return found


class _Room:
    """The nodes that one class of jobs may use, as (slots, id), the fewest slots first."""

    def __init__(self, nodes: Sequence[str], slots: Mapping[str, int]) -> None:
        self._nodes = frozenset(nodes)
        self._others: int | None = None
        self._order = sorted((slots[node], node) for node in nodes)
        self.total = sum(count for count, _ in self._order)

    def held_by(self, others: Mapping[str, int]) -> int:
        """Slots of its nodes that others hold; counted once, since they do not change in a pass."""
        if self._others is None:
            self._others = sum(max(others[node], 0) for node in self._nodes)
        return self._others

    def change(self, node: str, before: int, after: int) -> None:
        """Updates the slots of a node, if it is one of these."""
        if node in self._nodes:
            del self._order[bisect_left(self._order, (before, node))]
            insort(self._order, (after, node))
            self.total += after - before

    def place(self, workers: int, per: int) -> Placement:
        """Places workers of `per` slots each: on one node with enough free slots (the fullest such node), else on the
        emptiest nodes, with the tightest fit for the last one; empty if they fit nowhere.
        """
        if self.total < per * workers:
            return ()
        single = bisect_left(self._order, (per * workers, ""))
        if single < len(self._order):
            return ((self._order[single][1], workers),)
        rest = self._order[bisect_left(self._order, (per, "")) :]
        left, chosen = workers, []
        while rest and left:
            at = bisect_left(rest, (per * left, ""))
            if at == len(rest):
                at = bisect_left(rest, (rest[-1][0], ""))
            slots, node = rest.pop(at)
            taken = min(slots // per, left)
            chosen.append((node, taken))
            left -= taken
        return tuple(chosen) if not left else ()

"""Plans of specs: made by the trainer's planner, cached under a fingerprint of everything that they depend on."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection

from shardyard.v1 import job_pb2, plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.locations import folder_of, locations
from shardyard_coordinator.control.spec_walk import WalkedSpec
from shardyard_coordinator.domain.errors import FieldViolation, Refused, refused_fields
from shardyard_coordinator.domain.reasons import Code, Reason
from shardyard_coordinator.domain.records import EventDraft, EventKind
from shardyard_coordinator.launch.node_shape import gpus_of_worker, planning_shape
from shardyard_coordinator.launch.protocols import ClusterView, Node
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.identity import Named, are_pinned, hub_folders, identify
from shardyard_coordinator.serve.inspection import Subject, still_looking
from shardyard_coordinator.serve.parts import Cluster, Parts, in_time, raise_violations
from shardyard_coordinator.serve.shared import Shared
from shardyard_coordinator.serve.storage_errors import blame_the_storage_if_away
from shardyard_coordinator.store import encode, resources
from shardyard_coordinator.store.together import Together, looks_together, reads_together

PLAN_FUNCTION = "shardyard_trainer.planning.plan:plan"
_SUBJECT = Subject("job.spec", "what the spec names", Reason.SPEC_INVALID, prefix="job.")
_PLANNER = f"6 {version('shardyard')}\n".encode()


@dataclass(frozen=True)
class Located:
    """A spec with the locations and the identity of all files that it names. `places` are the locations' bytes.

    A data set may have tens of thousands of files, so every walk over them runs in a thread.
    """

    walked: WalkedSpec
    locations: worker_pb2.Locations
    identity: bytes
    places: bytes


@dataclass(frozen=True)
class Planned:
    """A spec's plan: the values that a job's row needs, and the plan itself as bytes of a JobPlan.

    `does_not_fit` is why no job of it is accepted; empty: nothing speaks against it.
    """

    plan: bytes
    etag: str
    does_not_fit: str
    resolved_spec: bytes
    workers: int
    gpus_per_worker: int
    cpus_per_worker: int
    warnings: tuple[EventDraft, ...]


class Plans:
    """Returns plans from memory, the store, or the planner, which makes the same plan only once at a time."""

    def __init__(self, parts: Parts, cluster: Cluster, *, kept: int = 256) -> None:
        self._parts = parts
        self._cluster = cluster
        self._kept: OrderedDict[bytes, Planned] = OrderedDict()
        self._num_kept = kept
        self._shared: Shared[Planned] = Shared()
        self._rows = reads_together(parts.store)
        self._files = reads_together(parts.store)
        self._looks = looks_together(partial(identify, roots=parts.data_roots))
        nothing_named = worker_pb2.Locations(
            data_roots=parts.data_roots, torch_hub=parts.torch_hub, cache_dir=parts.cache_dir, claim=parts.claim
        )
        self._nothing_named = nothing_named.SerializeToString(deterministic=True)
        self._shapes: tuple[ClusterView | None, dict[int, bytes]] = (None, {})

    async def at_hand(self, walked: WalkedSpec) -> Planned | None:
        """The plan of a spec that names nothing in the store, if it is in memory and its files are unchanged.

        Never refuses: on None, ask `plan`, which also says why a spec cannot be planned.
        """
        if walked.names or walked.remotes or walked.private:
            return None
        spec, named = walked.spec, Named(tuple(walked.uris), hub_folders(walked.hubs, self._parts.cache_dir))
        view = await self._cluster.view()
        try:
            identity = await self._looks.ask(named) if any(named) else b""
            planned = self._kept.get(_fingerprint(spec, self._nothing_named, identity, self._shape(view, spec)))
            if planned is not None:
                check_fits(view, planned.workers, planned.gpus_per_worker, planned.cpus_per_worker)
        except Refused:
            return None
        return planned

    def _shape(self, view: ClusterView, spec: spec_pb2.JobSpec) -> bytes:
        """The NodeShape of the nodes that the spec may run on."""
        if self._shapes[0] is not view:
            self._shapes = (view, {})
        gpus, shapes = _gpus_of(view, spec), self._shapes[1]
        if gpus not in shapes:
            shapes[gpus] = planning_shape(view, gpus).SerializeToString(deterministic=True)
        return shapes[gpus]

    async def plan(self, located: Located, call: Call) -> Planned:
        """The spec's plan; Refused with all violations of spec, model and data."""
        spec = located.walked.spec
        view = await self._cluster.view()
        check_fits(view, spec.resources.workers or 1, _gpus_of(view, spec), spec.resources.cpus_per_worker)
        shape = self._shape(view, spec)
        fingerprint = _fingerprint(spec, located.places, located.identity, shape)
        planned = self._kept.get(fingerprint)
        if planned is None:
            asked = self._shared.get(fingerprint, lambda: self._make(fingerprint, shape, call, located))
            planned = await in_time(call, asked, late=still_looking)
        check_fits(view, planned.workers, planned.gpus_per_worker, planned.cpus_per_worker)
        return planned

    def reads(self, walked: WalkedSpec) -> Together[Callable[[Connection], Any], Any]:
        """Where to read: specs that name files have their own readers, so a hung file system delays no others."""
        names_files = walked.names or walked.uris or walked.remotes or hub_folders(walked.hubs, "")
        return self._files if names_files else self._rows

    def locate(self, conn: Connection, walked: WalkedSpec, call: Call) -> Located:
        """Locates everything that the spec names; run it in a read, because it looks at files. Refused ACCESS_DENIED,
        MODEL_NOT_FOUND, PATH_NOT_ALLOWED … with all fields concerned.
        """
        parts, uses = self._parts, walked.uses
        try:
            for name in uses:
                self._check_use(name, call)
            # Errors of paths come before errors of names.
            of_uris = identify(Named(tuple(walked.uris)), parts.data_roots)
            found = locations(
                conn,
                uses,
                data_roots=parts.data_roots,
                torch_hub=parts.torch_hub,
                cache_dir=parts.cache_dir,
                claim=parts.claim,
                remotes=[uri for _, uri in walked.remotes],
                objects_dir=str(parts.storage / "objects"),
            )
            ours = (found.folders[name] for name in (*uses, *(uri for _, uri in walked.remotes)))
            folders = (*ours, *hub_folders(walked.hubs, parts.cache_dir))
            identity = of_uris + identify(Named(folders=folders), parts.data_roots)
        except Refused as refused:
            raise self._explained(conn, walked, call, refused) from None
        return Located(walked, found, identity, found.SerializeToString(deterministic=True))

    def _check_use(self, name: str, call: Call) -> None:
        """Refused ACCESS_DENIED unless the caller may use what is in the project of that name."""
        project = name.split("/")[1]
        call.check_use(project)
        self._parts.check_project(project)

    def _explained(self, conn: Connection, walked: WalkedSpec, call: Call, refused: Refused) -> Refused:
        """The refusal with all fields that name something unreadable; if permission is missing, with those only."""
        denied = _complaints(walked.names, lambda name: self._check_use(name, call))
        if denied:
            return refused_fields(denied)
        # Errors of paths are already in the refusal: they are checked before names are.
        found = [*_complaints(walked.names, lambda name: folder_of(conn, name)), *refused.violations]
        return refused_fields(found) if found else refused

    async def _make(self, fingerprint: bytes, shape: bytes, call: Call, located: Located) -> Planned:
        walked = located.walked
        kept = are_pinned(walked.hubs)
        parts = self._parts
        stored = await parts.store.read(lambda conn: resources.get_plan(conn, fingerprint)) if kept else None
        if stored is None:
            question = await asyncio.to_thread(_question, located, shape)
            answer = await parts.questions.inspect(
                PLAN_FUNCTION,
                question.request,
                call,
                subject=_SUBJECT,
                key=fingerprint,
                route=question.route,
                network=len(walked.hubs) > len(walked.private),
                data_bytes=question.data_bytes,
            )
            result = worker_pb2.PlanResult.FromString(answer)
            if result.violations and located.locations.known_files:
                await blame_the_storage_if_away(parts.claim)
            raise_violations(result.violations, "job.")
            stored = result.plan.SerializeToString()
            if kept:
                plan, now_us = stored, parts.clock.now_us()
                await parts.store.write(lambda conn: resources.put_plan(conn, fingerprint, plan, now_us), call.actor)
        planned = _planned(stored)
        if kept:
            self._kept[fingerprint] = planned
            while len(self._kept) > self._num_kept:
                self._kept.popitem(last=False)
        return planned


def _fingerprint(spec: spec_pb2.JobSpec, places: bytes, identity: bytes, shape: bytes) -> bytes:
    """The fingerprint of spec, locations (folders are named by uid), identity of the files, node shape and planner."""
    digest = hashlib.sha256(_PLANNER)
    for data in (spec.SerializeToString(deterministic=True), places, shape):
        digest.update(len(data).to_bytes(8, "little") + data)
    digest.update(identity)
    return digest.digest()


class _Question(NamedTuple):
    """A question to the planner: a PlanRequest, the route of its files, and the size of its data."""

    request: bytes
    route: bytes
    data_bytes: int


def _question(located: Located, shape: bytes) -> _Question:
    request = worker_pb2.PlanRequest(
        spec=located.walked.spec, locations=located.locations, node_shape=worker_pb2.NodeShape.FromString(shape)
    )
    return _Question(request.SerializeToString(), _route(located), _data_bytes(located))


def _data_bytes(located: Located) -> int:
    """Bytes on the disk of the data that a spec names; the holes of a sparse file do not count."""
    total = 0
    for source in located.walked.sources:
        if not isinstance(source, spec_pb2.DataSource):
            continue
        path = located.locations.folders.get(source.dataset or source.uri, source.uri)
        for folder, _, files in os.walk(path) if path and Path(path).is_dir() else [(path, [], [""])] * bool(path):
            for name in files:
                with suppress(OSError, ValueError):
                    total += Path(folder, name).stat().st_blocks * 512
    return total


def _route(located: Located) -> bytes:
    """The route of a spec: of its files and task, the same for all settings of the run."""
    digest = hashlib.sha256(located.places)
    for source in located.walked.sources:
        data = source.SerializeToString(deterministic=True)
        digest.update(len(data).to_bytes(8, "little") + data)
    digest.update(located.identity)
    return digest.digest()


def _planned(data: bytes) -> Planned:
    plan = plan_pb2.JobPlan.FromString(data)
    resources_ = plan.resolved_spec.resources
    return Planned(
        plan=data,
        etag=plan.etag,
        does_not_fit=_why_not(plan),
        resolved_spec=plan.resolved_spec.SerializeToString(deterministic=True),
        workers=max(resources_.workers, 1),
        gpus_per_worker=resources_.gpus_per_worker,
        cpus_per_worker=max(resources_.cpus_per_worker, 1),
        warnings=tuple(encode.draft(EventKind.WARNING, job_pb2.JobEvent(warning=warning)) for warning in plan.warnings),
    )


def _why_not(plan: plan_pb2.JobPlan) -> str:
    """The planner's words about states that no worker has the memory for."""
    if plan.memory.verdict != plan_pb2.MEMORY_VERDICT_NO_FIT:
        return ""
    return next(each.message for each in plan.warnings if each.reason == Reason.MODEL_DOES_NOT_FIT)


def _complaints(fields: Sequence[tuple[str, str]], check: Callable[[str], object]) -> list[FieldViolation]:
    """The complaints of a check about each value."""
    found = []
    for field, value in fields:
        try:
            check(value)
        except Refused as refused:
            step = "; upload it first, or name another" if refused.code is Code.NOT_FOUND else ""
            found.append(FieldViolation(field, refused.message + step, refused.reason, refused.metadata))
    return found


def _gpus_of(view: ClusterView, spec: spec_pb2.JobSpec) -> int:
    resources_ = spec.resources
    return gpus_of_worker(view, resources_.gpus_per_worker if resources_.HasField("gpus_per_worker") else None)


def check_fits(view: ClusterView, workers: int, gpus_per_worker: int, cpus_per_worker: int) -> None:
    """Refused TOO_LARGE_FOR_CLUSTER if even the empty cluster could not hold the gang; an unseen cluster could."""
    if not view.nodes:
        return
    largest = sum(_workers_on(node, gpus_per_worker, max(cpus_per_worker, 1)) for node in view.nodes)
    if workers <= largest:
        return
    size, unit = (gpus_per_worker, "GPU") if gpus_per_worker else (max(cpus_per_worker, 1), "CPU core")
    each = f"{size} {unit}{'s' * (size > 1)}"
    if largest:
        field = "workers"
        text = f"`{workers}` workers of {each} each; the whole cluster holds at most {largest}; ask for at most that"
    elif not gpus_per_worker and all(node.gpus for node in view.nodes):
        field = "gpus_per_worker"
        text = (
            "`0`, and every node has GPUs: those are for jobs that ask for them; ask for 1, or, if the service "
            "runs gangs on its own machine, start it with `--gpus 0`"
        )
    else:
        field = "gpus_per_worker" if gpus_per_worker else "cpus_per_worker"
        most = max(node.gpus if gpus_per_worker else node.cpus * (not node.gpus) for node in view.nodes)
        text = f"a worker of {each} fits on no node; the largest has {most}; ask for at most that"
    violation = FieldViolation(f"job.spec.resources.{field}", text, Reason.TOO_LARGE_FOR_CLUSTER)
    raise Refused(Reason.TOO_LARGE_FOR_CLUSTER, text, metadata={"largest": str(largest)}, violations=[violation])


def _workers_on(node: Node, gpus: int, cpus: int) -> int:
    """As in scheduling: a node with GPUs is for jobs that ask for GPUs."""
    if gpus:
        return min(node.gpus // gpus, node.cpus // cpus)
    return 0 if node.gpus else node.cpus // cpus

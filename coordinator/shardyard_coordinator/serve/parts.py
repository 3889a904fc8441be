"""Shared objects of the servicers, and the small steps that all of them take."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.remote import Remote
from shardyard_coordinator.domain.errors import FieldViolation, Refused, refused_fields
from shardyard_coordinator.domain.reasons import MEANINGS, Code, Reason
from shardyard_coordinator.launch.claim import claim_of
from shardyard_coordinator.launch.protocols import ClusterView, Compute, Launcher
from shardyard_coordinator.seams import Clock, Trace
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.inspection import Questions, not_in_time
from shardyard_coordinator.serve.limits import Limits
from shardyard_coordinator.serve.observed import NullSpans, Spans
from shardyard_coordinator.serve.permissions import no_right
from shardyard_coordinator.serve.storage_errors import refused_storage
from shardyard_coordinator.serve.tokens import Tokens
from shardyard_coordinator.serve.validation import names
from shardyard_coordinator.store.store import Store

_T = TypeVar("_T")
log = logging.getLogger(__name__)
# Time reserved for sending the answer before the caller's deadline.
_ANSWER_S = 0.2
_SHORT_S = 1.0


@dataclass(frozen=True)
class Parts:
    """Objects that all servicers share. `storage` is the root that every node sees."""

    store: Store
    launcher: Launcher
    compute: Compute
    clock: Clock
    trace: Trace
    tokens: Tokens
    limits: Limits
    storage: Path
    projects: frozenset[str]
    data_roots: tuple[str, ...]
    torch_hub: Mapping[str, str] = field(default_factory=dict)
    slot_hour_price: float | None = None
    currency: str = ""
    is_offline: bool = False
    webhook_allow: tuple[str, ...] = ()
    remote: Remote = field(default_factory=Remote)
    spans: Spans = field(default_factory=NullSpans)

    @cached_property
    def questions(self) -> Questions:
        """Questions to the processes that open clients' files."""
        return Questions(self.compute, self.limits)

    @property
    def cache_dir(self) -> str:
        """The folder for files that can be made again."""
        return str(self.storage / "cache")

    @property
    def claim(self) -> worker_pb2.StorageClaim:
        """The proof that the storage is mounted."""
        return claim_of(self.storage, self.store.store_id)

    def name(self, kind: str, name: str) -> names.Name:
        """A validated name's parts; Refused ACCESS_DENIED if there is no such project.

        The error is that of a project in which the caller has no right, and comes before any look-up.
        """
        parsed = names.parse(kind, name)
        self.check_project(parsed.project)
        return parsed

    def check_project(self, project: str) -> None:
        """Refused ACCESS_DENIED unless there is such a project."""
        if project not in self.projects:
            raise no_right(project)


async def in_time(call: Call, answer: Awaitable[_T], *, late: Callable[[], Refused] = not_in_time) -> _T:
    """Awaits the answer; shortly before the caller's deadline raises the error of `late`, unless that is very soon."""
    left_s = math.inf if call.deadline_s is None else call.deadline_s - asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(left_s - _ANSWER_S if _SHORT_S < left_s < math.inf else None):
            return await answer
    except TimeoutError:
        raise late() from None


class Cluster:
    """The cluster as the launcher sees it; an old view is refreshed in the background."""

    def __init__(self, launcher: Launcher, *, keep_s: float = 2.0, wait_s: float = 2.0, silent_s: float = 4.0) -> None:
        self._launcher = launcher
        self._keep_s = keep_s
        self._wait_s = wait_s
        self._silent_s = silent_s
        self._view = ClusterView(False, "", "", (), "being connected")
        self._asked_s = self._answered_s = -math.inf
        self._asking: asyncio.Task[None] | None = None

    async def view(self) -> ClusterView:
        """The last view; waits briefly if it is very old: a cluster that does not answer delays no caller for long."""
        now = time.monotonic()
        if now - self._asked_s > self._keep_s and self._asking is None:
            self._asked_s = now
            self._asking = asyncio.create_task(self._ask())
        # All callers wait until the same moment, because a plan depends on the view.
        left_s = self._asked_s + self._wait_s - now
        if now - self._answered_s > 10 * self._keep_s and self._asking is not None and left_s > 0:
            await asyncio.wait({self._asking}, timeout=left_s)
        return self._view

    async def view_now(self) -> ClusterView:
        """The current state: a connected cluster that does not answer within a few seconds counts as disconnected."""
        view = await self.view()
        if self._asking is None:
            return view
        await asyncio.wait({self._asking}, timeout=self._asked_s + self._silent_s - time.monotonic())
        if self._asking is None or not self._view.connected:
            return self._view
        message = f"the cluster has not answered for {time.monotonic() - self._asked_s:.0f} s; the service keeps asking"
        return replace(self._view, connected=False, nodes=(), message=message)

    async def _ask(self) -> None:
        try:
            self._view = await self._launcher.cluster()
            self._answered_s = time.monotonic()
        finally:
            self._asking = None


def raise_violations(violations: Iterable[worker_pb2.Violation], prefix: str = "") -> None:
    """Raises the violations that a function of the trainer found, if any, with field paths from the request on.

    A temporary one outweighs the others, which may be gone later. No path of the storage is named.
    """
    found = [
        FieldViolation(
            f"{prefix}{each.field}",
            each.message,
            _reason(each.reason),
            {key: str(value) for key, value in each.metadata.items()},
        )
        for each in violations
    ]
    later = [each for each in found if MEANINGS[each.reason].code is Code.UNAVAILABLE]
    if later:
        if (refused := refused_storage(later[0].reason)) is not None:
            log.warning("the storage failed what a caller asked for: %s", later[0].message)
            raise refused
        raise Refused(later[0].reason, later[0].message, metadata=later[0].metadata, retry_after_s=5.0)
    if found:
        raise refused_fields(found)


def _reason(text: str) -> Reason:
    return Reason(text) if text in Reason.__members__ else Reason.SPEC_INVALID

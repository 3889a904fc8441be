"""Before a spec is planned, what it names elsewhere is copied and pinned: objects by digest, private models by commit.

Each source is fetched by a process of its own, which alone knows the value of its secret; planners and ranks read the
copy. Who names an address or a secret is checked here, at every call, before anything is looked up.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Sequence
from typing import Any, NamedTuple

from google.protobuf.message import Message

from shardyard.remote_uris import parse, secret_name
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.spec_walk import WalkedSpec, walk, with_pins
from shardyard_coordinator.domain.errors import FieldViolation, Refused, refused_fields
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.inspection import Subject, still_looking
from shardyard_coordinator.serve.parts import Parts, in_time, raise_violations
from shardyard_coordinator.serve.shared import Shared
from shardyard_coordinator.serve.validation.text import show
from shardyard_coordinator.store import jobs

FETCH_FUNCTION = "shardyard_trainer.remote.fetch:fetch"
FETCH_HUB_FUNCTION = "shardyard_trainer.remote.fetch:fetch_hub"

# A part of the time that the process may compute for: it imports, and finishes what it writes.
_BUDGET = 0.6
_PAUSE_S = 1.0
_MOST_S = 6 * 3600.0
_JOB = "job."


class _Progress(NamedTuple):
    done_bytes: int
    all_bytes: int


class Fetching:
    """Copies of what specs name elsewhere. The same source is fetched only once at a time."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._remote = parts.remote
        self._uris: Shared[str] = Shared()
        self._hubs: Shared[spec_pb2.HubModel] = Shared()
        self._progress: dict[bytes, _Progress] = {}

    async def pinned(self, walked: WalkedSpec, project: str, call: Call) -> WalkedSpec:
        """The spec with everything pinned that it names elsewhere, and copied; the same one if that is nothing.

        Raises: Refused ADDRESS_NOT_ALLOWED, ACCESS_DENIED, OBJECT_NOT_FOUND, OBJECT_STORE_REFUSED … with the fields;
        INSPECTION_UNAVAILABLE while objects are still being copied.
        """
        if not walked.remotes and not walked.private:
            return walked
        self._check(walked, project)
        uris = [self._uri(field, uri, project, call) for field, uri in walked.remotes]
        hubs = [self._hub(field, hub, call) for field, hub in walked.private]
        found = await _all([*uris, *hubs])
        of_uris = {field: each for (field, _), each in zip(walked.remotes, found, strict=False)}
        of_hubs = {field: each for (field, _), each in zip(walked.private, found[len(uris) :], strict=True)}
        return with_pins(walked.spec, of_uris, of_hubs)

    def _check(self, walked: WalkedSpec, project: str) -> None:
        """The same answer for what does not exist and what the project may not use."""
        found = []
        for field, uri in walked.remotes:
            if self._remote.root_of(parse(uri), project) is None:
                text = (
                    f"{show(uri)} is not under an address that projects/{project} may read; ask the operator for it "
                    "(--remote-root, and --secret if it needs keys), or upload the files"
                )
                found.append(FieldViolation(field, text, Reason.ADDRESS_NOT_ALLOWED))
        for field, hub in walked.private:
            if not self._remote.may_use(project, secret_name(hub.token)):
                text = (
                    f"there is no {show(hub.token)} that projects/{project} may use; ask the operator for it (--secret)"
                )
                found.append(FieldViolation(f"{field}.token", text, Reason.ACCESS_DENIED))
        if found:
            raise refused_fields(found)

    async def _uri(self, field: str, uri: str, project: str, call: Call) -> str:
        root = self._remote.root_of(parse(uri), project)
        assert root is not None
        request = worker_pb2.FetchRequest(
            field=field.removeprefix(_JOB),
            uri=uri,
            objects_dir=str(self._parts.storage / "objects"),
            claim=self._parts.claim,
            endpoint=self._remote.endpoint,
            region=self._remote.region,
            secret=root.secret,
            most_bytes=self._remote.most_bytes,
            budget_s=self._parts.limits.inspection_s * _BUDGET,
        )
        key = _key(request)
        asked = self._uris.get(key, lambda: self._copy(request, key, call))
        return await in_time(call, asked, late=lambda: self._still_copying(uri, key))

    async def _copy(self, request: worker_pb2.FetchRequest, key: bytes, call: Call) -> str:
        """Asks until the copy is complete: each call has a part of the time, so that callers take turns."""
        until_s, before = time.monotonic() + _MOST_S, -1
        request.kept.extend(await self._parts.store.read(_of_live_jobs))
        subject = Subject(f"{_JOB}{request.field}", "the objects", Reason.DATA_INVALID, prefix=_JOB)
        try:
            while time.monotonic() < until_s:
                answer = await self._parts.questions.inspect(
                    FETCH_FUNCTION,
                    request.SerializeToString(),
                    call,
                    subject=subject,
                    key=key,
                    network=True,
                    secrets=[request.secret] if request.secret else [],
                )
                result = worker_pb2.FetchResult.FromString(answer)
                raise_violations(result.violations, _JOB)
                if result.uri:
                    return result.uri
                self._progress[key] = _Progress(result.done_bytes, result.all_bytes)
                if result.done_bytes == before:  # Perhaps another service fetches them for the same storage.
                    await asyncio.sleep(_PAUSE_S)
                before = result.done_bytes
        finally:
            self._progress.pop(key, None)
        text = f"{show(request.uri)} took more than {_MOST_S / 3600:g} hours to copy; name a part of it"
        raise refused_fields([FieldViolation(f"{_JOB}{request.field}", text, Reason.QUOTA_EXCEEDED)])

    def _still_copying(self, uri: str, key: bytes) -> Refused:
        progress = self._progress.get(key)
        if progress is None:
            return still_looking(f"{show(uri)}")
        far = f"{progress.done_bytes:,} of {progress.all_bytes:,} bytes"
        text = f"{show(uri)} is still being copied ({far}); that continues: ask again after the delay"
        return Refused(Reason.INSPECTION_UNAVAILABLE, text, retry_after_s=2.0)

    async def _hub(self, field: str, hub: spec_pb2.HubModel, call: Call) -> spec_pb2.HubModel:
        request = worker_pb2.FetchHubRequest(
            field=field.removeprefix(_JOB), hub=hub, cache_dir=self._parts.cache_dir, claim=self._parts.claim
        )
        key = _key(request)
        asked = self._hubs.get(key, lambda: self._fetch_hub(request, key, call))
        return await in_time(call, asked, late=still_looking)

    async def _fetch_hub(self, request: worker_pb2.FetchHubRequest, key: bytes, call: Call) -> spec_pb2.HubModel:
        answer = await self._parts.questions.inspect(
            FETCH_HUB_FUNCTION,
            request.SerializeToString(),
            call,
            subject=Subject(f"{_JOB}{request.field}", "the model", Reason.MODEL_INVALID, prefix=_JOB),
            key=key,
            network=True,
            secrets=[secret_name(request.hub.token)],
        )
        result = worker_pb2.FetchHubResult.FromString(answer)
        raise_violations(result.violations, _JOB)
        return result.hub


def _of_live_jobs(conn: Any) -> list[str]:
    """The pinned URIs that jobs that have not ended will still read."""
    specs = (walk(spec_pb2.JobSpec.FromString(spec)) for spec in jobs.live_specs(conn, naming=b"s3://"))
    return sorted({uri for walked in specs for _, uri in walked.remotes})


def _key(request: Message) -> bytes:
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


async def _all(asked: Sequence[Awaitable[Any]]) -> list[Any]:
    """All answers, or the refusal with the violations of all; a temporary one outweighs the others."""
    found = await asyncio.gather(*asked, return_exceptions=True)
    refused = [each for each in found if isinstance(each, Refused)]
    for each in found:
        if isinstance(each, BaseException) and not isinstance(each, Refused):
            raise each
    if refused:
        violations = [violation for each in refused for violation in each.violations]
        later = [each for each in refused if not each.violations]
        raise later[0] if later else refused_fields(violations)
    return list(found)

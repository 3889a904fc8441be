"""AuditService: who changed what, and who was denied what."""

from __future__ import annotations

from collections.abc import Mapping

from shardyard.v1 import audit_service_pb2 as pb
from shardyard_coordinator.domain.access import ALL_PROJECTS, AuditRecord, Permission
from shardyard_coordinator.serve.auth_service import visible_projects
from shardyard_coordinator.serve.call import Behaviour, Call
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.tokens import Pages
from shardyard_coordinator.serve.validation import names
from shardyard_coordinator.store import audit, encode


class AuditService:
    """Reads the audit log, which nothing changes."""

    full_name = "shardyard.v1.AuditService"

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return {"ListEntries": self.list}

    async def list(self, request: pb.ListEntriesRequest, call: Call) -> pb.ListEntriesResponse:
        """Lists the entries that the caller may see, the newest first."""
        project = names.parse("any_project", request.parent).project
        if project != ALL_PROJECTS:
            self._parts.check_project(project)
        pages = Pages(self._parts.tokens, "audit", request)
        after = pages.after()
        projects = visible_projects(call, Permission.AUDIT, project)
        found = await self._parts.store.read_many(
            lambda conn: audit.list_entries(
                conn,
                projects,
                principal=request.principal,
                resource=request.resource,
                denied_only=request.denied_only,
                since_us=max(request.since.ToMicroseconds(), 0),
                after=after,
                limit=pages.size + 1,
            )
        )
        page, token = pages.fill(found, _entry, lambda record: record.position)
        return pb.ListEntriesResponse(entries=page, next_page_token=token)


def _entry(record: AuditRecord) -> pb.AuditEntry:
    return pb.AuditEntry(
        position=record.position,
        time=encode.timestamp(record.time_us),
        principal=record.principal,
        credential=record.credential,
        method=record.method,
        resource=record.resource,
        request_id=record.request_id,
        outcome=record.outcome,
        peer=record.peer,
        count=record.count,
    )

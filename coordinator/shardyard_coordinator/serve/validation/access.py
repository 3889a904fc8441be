"""Rules of requests about tokens, roles and the audit log that the protos cannot express."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from shardyard.v1 import audit_service_pb2 as audit_pb
from shardyard.v1 import auth_service_pb2 as pb
from shardyard_coordinator.domain.access import member_complaint, principal_complaint
from shardyard_coordinator.domain.errors import FieldViolation
from shardyard_coordinator.serve.validation.names import name_complaint
from shardyard_coordinator.serve.validation.text import control_complaint, show

MAX_TTL_S: Final = 3650 * 86_400
Found = list[FieldViolation]


def _check_token(request: pb.CreateTokenRequest, found: Found) -> None:
    if complaint := principal_complaint(request.principal):
        found.append(FieldViolation("principal", complaint))
    if complaint := control_complaint(request.display_name):
        found.append(FieldViolation("display_name", complaint))
    for at, scope in enumerate(request.scopes):
        if scope.project and (complaint := name_complaint("any_project", scope.project)):
            found.append(FieldViolation(f"scopes[{at}].project", complaint))
    seconds = ttl_s(request)
    if request.HasField("ttl") and not 1 <= seconds <= MAX_TTL_S:
        text = f"{show(seconds)} s is not from 1 s to 3,650 days; give such a time, or leave it out for 90 days"
        found.append(FieldViolation("ttl", text))


def ttl_s(request: pb.CreateTokenRequest) -> float:
    """How long the token is to be valid, in seconds."""
    return request.ttl.seconds + request.ttl.nanos / 1e9


def _check_entries(request: audit_pb.ListEntriesRequest, found: Found) -> None:
    try:
        request.since.ToMicroseconds()
    except ValueError:
        text = f"{show(request.since.seconds)} s is not a time from the year 1 to 9999; give one, or leave it out"
        found.append(FieldViolation("since", text))


def _check_binding(request: pb.CreateRoleBindingRequest, found: Found) -> None:
    if complaint := member_complaint(request.member):
        found.append(FieldViolation("member", complaint))


CHECKS: Final[dict[str, Callable[[Any, Found], None]]] = {
    "CreateTokenRequest": _check_token,
    "CreateRoleBindingRequest": _check_binding,
    "ListEntriesRequest": _check_entries,
}

"""The permission that each method needs, and where. A method without a row is denied; a test checks all descriptors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from shardyard_coordinator.domain.access import ALL_PROJECTS, GRANTS, Caller, Permission, Role
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.serve.rights import Rights


class Where(StrEnum):
    """Where the permission is needed. A request names its project, or all of them as `projects/-`."""

    PROJECT = "project"
    """In the project that the request names; for `projects/-` in all."""

    VISIBLE = "visible"
    """In the project that the request names; for `projects/-` in one, and the answer has only what may be seen."""

    SOMEWHERE = "somewhere"
    """In one project: the request names none."""

    EVERYWHERE = "everywhere"
    """In all projects: the request names none."""


@dataclass(frozen=True)
class Needs:
    """What a method needs. `only_own`: what others made may be changed by admins of the project only."""

    permission: Permission
    where: Where = Where.PROJECT
    only_own: bool = False


_OPEN = Needs(Permission.OPEN)
_KNOWN = Needs(Permission.KNOWN)
_VIEW = Needs(Permission.VIEW)
_SUBMIT = Needs(Permission.SUBMIT)
_CHANGE = Needs(Permission.SUBMIT, only_own=True)
_ADMIN = Needs(Permission.ADMIN)
_SERVICE_ADMIN = Needs(Permission.ADMIN, Where.EVERYWHERE)

_SERVICES: Mapping[str, Mapping[str, Needs]] = {
    "shardyard.v1.JobService": {
        "CreateJob": _SUBMIT,
        "GetJob": _VIEW,
        "ListJobs": _VIEW,
        "UpdateJob": _CHANGE,
        "DeleteJob": _CHANGE,
        "PlanJob": _SUBMIT,
        "WaitJob": _VIEW,
        "CancelJob": _CHANGE,
        "PauseJob": _CHANGE,
        "ResumeJob": _CHANGE,
        "WatchJob": _VIEW,
        "BatchCreateJobs": _SUBMIT,
        "BatchCancelJobs": _CHANGE,
        "ListAttempts": _VIEW,
    },
    "shardyard.v1.EventService": {"ListEvents": _VIEW, "WatchEvents": _VIEW},
    "shardyard.v1.WebhookService": {
        "CreateWebhook": _SUBMIT,
        "GetWebhook": _VIEW,
        "ListWebhooks": _VIEW,
        "UpdateWebhook": _CHANGE,
        "DeleteWebhook": _CHANGE,
        "RotateWebhookSecret": _CHANGE,
        "TestWebhook": _CHANGE,
        "ListDeliveries": _VIEW,
    },
    "shardyard.v1.LogService": {"TailLogs": _VIEW},
    "shardyard.v1.MetricService": {"QueryMetrics": _VIEW, "WatchMetrics": _VIEW},
    "shardyard.v1.CheckpointService": {"GetCheckpoint": _VIEW, "ListCheckpoints": _VIEW},
    "shardyard.v1.ModelService": {
        "CreateModel": _SUBMIT,
        "GetModel": _VIEW,
        "ListModels": _VIEW,
        "DeleteModel": _CHANGE,
        "DownloadModel": _SUBMIT,
        "Predict": _SUBMIT,
        "Embed": _SUBMIT,
        "ExplainPrediction": _SUBMIT,
        "ExportModel": _CHANGE,
        "CopyModel": _SUBMIT,
        "RecommendModels": _SUBMIT,
    },
    "shardyard.v1.DatasetService": {
        "CreateDataset": _SUBMIT,
        "GetDataset": _VIEW,
        "ListDatasets": _VIEW,
        "DeleteDataset": _CHANGE,
        "DownloadDataset": _SUBMIT,
    },
    "shardyard.v1.ServerService": {"GetServerInfo": Needs(Permission.VIEW, Where.SOMEWHERE)},
    "shardyard.v1.AuthService": {
        "GetIdentity": _KNOWN,
        "CreateToken": _SERVICE_ADMIN,
        "ListTokens": _SERVICE_ADMIN,
        "RevokeToken": _SERVICE_ADMIN,
        "CreateRoleBinding": _ADMIN,
        "ListRoleBindings": Needs(Permission.ADMIN, Where.VISIBLE),
        "DeleteRoleBinding": _ADMIN,
    },
    "shardyard.v1.AuditService": {"ListEntries": Needs(Permission.AUDIT, Where.VISIBLE)},
    "grpc.health.v1.Health": {"Check": _OPEN, "Watch": _OPEN},
    "grpc.reflection.v1.ServerReflection": {"ServerReflectionInfo": _OPEN},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": _OPEN},
}

PERMISSIONS: Final[Mapping[str, Needs]] = MappingProxyType(
    {f"/{service}/{method}": needs for service, methods in _SERVICES.items() for method, needs in methods.items()}
)


def is_open(path: str) -> bool:
    """Whether the method is for everybody, recognised or not."""
    return path in PERMISSIONS and PERMISSIONS[path].permission is Permission.OPEN


def may(rights: Rights, caller: Caller, path: str, project: str | None = None) -> bool:
    """Whether the caller may call the method in the project that its request names.

    None: before the request is read; then everybody with a role anywhere passes, so that a denial names the resource.
    """
    needs = PERMISSIONS.get(path)
    if needs is None:
        return False
    permission = needs.permission
    if permission is Permission.OPEN:
        return True
    if permission is Permission.KNOWN:
        return bool(caller.principal)
    if needs.where is Where.EVERYWHERE:
        return rights.may(caller, permission, ALL_PROJECTS)
    if needs.where is Where.SOMEWHERE or (needs.where is Where.VISIBLE and project == ALL_PROJECTS):
        return rights.may_somewhere(caller, permission)
    if project is None:
        return rights.is_member(caller)
    return rights.may(caller, permission, project)


def names_project(path: str) -> bool:
    """Whether a request of the method names the project in which the permission is needed."""
    needs = PERMISSIONS[path]
    return needs.where in (Where.PROJECT, Where.VISIBLE) and needs.permission not in (Permission.OPEN, Permission.KNOWN)


def denial(rights: Rights, caller: Caller, path: str, project: str | None) -> Refused:
    """The error of a call that is not allowed: the same whether or not what it names exists."""
    method = path.rpartition("/")[2]
    if project is not None and project != ALL_PROJECTS and not rights.permissions(caller, project):
        return no_right(project)
    needs = PERMISSIONS.get(path)
    is_everywhere = project == ALL_PROJECTS or (needs is not None and needs.where is Where.EVERYWHERE)
    where = "in all projects" if is_everywhere else f"in projects/{project}" if project else "in a project"
    role = role_for(needs.permission) if needs is not None else None
    wanted = f"the role {role} {where}" if role else "a right that nobody has"
    scoped = " and a token that is not narrowed to less" if caller.scopes is not None else ""
    text = f"{caller.principal} may not call {method}: it needs {wanted}{scoped}; ask an admin (`shardyard grant`)"
    return Refused(Reason.ACCESS_DENIED, text)


def no_right(project: str) -> Refused:
    """The error for a project that is another one's, or is not there."""
    text = (
        f"no right to projects/{project}, or it does not exist; use a project of yours (`shardyard whoami`), or ask an "
        "admin: `shardyard grant` gives a role, `shardyard serve --project` adds a project"
    )
    return Refused(Reason.ACCESS_DENIED, text)


def role_for(permission: Permission) -> Role | None:
    """The least role with the permission; None: it needs no role."""
    return next((role for role in Role if permission in GRANTS[role]), None)

"""Who calls and what callers may do, as frozen dataclasses: identities, tokens, roles, the audit log."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class Grant:
    """A role (`viewer`, `submitter`, `operator`, `admin`) in `projects/{project}`, or in all: `projects/-`."""

    role: str
    project: str


@dataclass(frozen=True)
class Identity:
    """Who calls. `credential` says how it was recognised: a token's name, `oidc`, `certificate`, or `none`."""

    principal: str
    credential: str
    groups: tuple[str, ...]
    roles: tuple[Grant, ...]
    scopes: tuple[Grant, ...]
    expire_time: datetime | None


@dataclass(frozen=True)
class Token:
    """A token without its secret; `scopes` narrow what its principal may."""

    name: str
    principal: str
    display_name: str
    scopes: tuple[Grant, ...]
    creator: str
    create_time: datetime | None
    expire_time: datetime | None
    revoke_time: datetime | None


@dataclass(frozen=True)
class RoleBinding:
    """A role that a member has in a project: `projects/{project}/roleBindings/{binding}`."""

    name: str
    member: str
    role: str
    creator: str
    create_time: datetime | None


@dataclass(frozen=True)
class AuditEntry:
    """One change, with the outcome `OK`, or one denial with its reason; `count` equal denials may be one entry."""

    position: int
    time: datetime | None
    principal: str
    credential: str
    method: str
    resource: str
    request_id: str
    outcome: str
    peer: str
    count: int

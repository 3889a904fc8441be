"""Roles and what they allow; who may call, as it was recognised; tokens and role bindings as they are stored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple

ALL_PROJECTS: Final = "-"
LOCAL_PRINCIPAL: Final = "local"
"""Everybody who reaches a service without authentication."""

NO_CREDENTIAL: Final = "none"
OIDC_CREDENTIAL: Final = "oidc"
CERTIFICATE_CREDENTIAL: Final = "certificate"
# The namespaces keep an issuer, or a certificate authority, from naming a principal of another one.
OIDC_PREFIX: Final = "oidc:"
CERTIFICATE_PREFIX: Final = "cert:"
GROUP_PREFIX: Final = "group:"
MAX_MEMBER: Final = 255
OWN_NAME: Final = re.compile(r"[a-z][a-z0-9._@-]{0,62}")
"""A principal of tokens."""

RESERVED: Final = frozenset({LOCAL_PRINCIPAL, "system", ""})


class Permission(StrEnum):
    """What a method needs of its caller."""

    OPEN = "open"
    KNOWN = "known"
    VIEW = "view"
    SUBMIT = "submit"
    AUDIT = "audit"
    OPERATE = "operate"
    ADMIN = "admin"


class Role(StrEnum):
    """What a member may do in a project."""

    VIEWER = "viewer"
    SUBMITTER = "submitter"
    OPERATOR = "operator"
    ADMIN = "admin"


GRANTS: Final[Mapping[Role, frozenset[Permission]]] = MappingProxyType(
    {
        Role.VIEWER: frozenset({Permission.VIEW}),
        Role.SUBMITTER: frozenset({Permission.VIEW, Permission.SUBMIT}),
        Role.OPERATOR: frozenset({Permission.VIEW, Permission.AUDIT, Permission.OPERATE}),
        Role.ADMIN: frozenset(set(Permission) - {Permission.OPEN, Permission.KNOWN}),
    }
)


class Grant(NamedTuple):
    """A role in a project, or in all of them (`-`)."""

    role: Role
    project: str

    def covers(self, project: str) -> bool:
        """Whether it holds in the project; for `-`: whether in all."""
        return self.project in (ALL_PROJECTS, project)


def permissions_of(grants: Iterable[Grant], project: str) -> frozenset[Permission]:
    """What the grants allow in a project, or for `-` in all projects."""
    return frozenset[Permission]().union(*(GRANTS[grant.role] for grant in grants if grant.covers(project)))


@dataclass(frozen=True)
class Caller:
    """Who calls, as its credential says. `scopes` narrow its roles; None: they do not. `expire_us` 0: never."""

    principal: str
    credential: str = NO_CREDENTIAL
    groups: frozenset[str] = frozenset()
    scopes: tuple[Grant, ...] | None = None
    expire_us: int = 0

    @property
    def members(self) -> frozenset[str]:
        """The members of role bindings that it is."""
        return self.groups | {self.principal}


LOCAL: Final = Caller(LOCAL_PRINCIPAL)
ANONYMOUS: Final = Caller("")


@dataclass(frozen=True)
class TokenRecord:
    """A token at rest: the sha256 of its secret. Times in microseconds; 0: never."""

    id: str
    row: int
    principal: str
    sha256: bytes
    display_name: str
    scopes: tuple[Grant, ...]
    creator: str
    create_us: int
    expire_us: int
    revoke_us: int

    @property
    def name(self) -> str:
        """`tokens/{token}`."""
        return f"tokens/{self.id}"

    def is_live(self, now_us: int) -> bool:
        """Whether calls with it are let in."""
        return not self.revoke_us and not 0 < self.expire_us <= now_us


@dataclass(frozen=True)
class BindingRecord:
    """A member's role in a project, or in all of them (`-`)."""

    id: str
    project: str
    member: str
    role: Role
    creator: str
    create_us: int

    @property
    def name(self) -> str:
        """`projects/{project}/roleBindings/{binding}`."""
        return f"projects/{self.project}/roleBindings/{self.id}"

    @property
    def grant(self) -> Grant:
        """The role and where it holds."""
        return Grant(self.role, self.project)


@dataclass(frozen=True)
class AuditRecord:
    """One change or denial."""

    position: int
    time_us: int
    principal: str
    credential: str
    method: str
    project: str
    resource: str
    request_id: str
    outcome: str
    peer: str
    count: int


def principal_complaint(value: str) -> str | None:
    """What is wrong with a principal that a token is made for; None: nothing."""
    rule = "a token's principal has 1 to 63 of a-z, 0-9 and . _ @ -, and begins with a letter"
    if value in RESERVED:
        return f"`{value}` is the service's own; {rule}; choose another name"
    if not OWN_NAME.fullmatch(value):
        return f"`{value[:80]}` is not allowed: {rule}; correct it"
    return None


def member_complaint(value: str) -> str | None:
    """What is wrong with the member of a role binding; None: nothing."""
    prefix, colon, rest = value.partition(":")
    if not colon:
        return principal_complaint(value)
    kinds = (OIDC_PREFIX, CERTIFICATE_PREFIX, GROUP_PREFIX)
    if f"{prefix}:" not in kinds:
        return f"`{value[:80]}` begins with none of {', '.join(kinds)}, and has a `:`; name a principal or a group"
    if vouched_for(f"{prefix}:", rest) is None:
        return (
            f"`{value[:80]}` has no name after `{prefix}:`, is over {MAX_MEMBER} characters, or not plain; correct it"
        )
    return None


def vouched_for(prefix: str, name: object) -> str | None:
    """The principal or group of that name, as an issuer or an authority says it; None: it cannot be one.

    A name is a text without control characters, which stores and terminals do not take, and without spaces around it,
    so that two names that look alike are alike.
    """
    if not isinstance(name, str) or not name or name != name.strip() or not name.isprintable():
        return None
    return prefix + name if len(prefix + name) <= MAX_MEMBER else None

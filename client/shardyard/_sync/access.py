# Made from the async source by client/generate_sync.py: change that, never this.
"""Tokens, roles and the audit log of a service: `client.access`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from shardyard._convert import read
from shardyard._grants import role_number, scope_of, ttl_of
from shardyard._messages import build
from shardyard._names import parent_name
from shardyard._sync.connection import Connection
from shardyard._sync.resources import pages
from shardyard.errors import NotFound
from shardyard.types import AuditEntry, Identity, RoleBinding, Token
from shardyard.v1 import audit_service_pb2, auth_service_pb2


class Access:
    """Who may do what. Roles are `viewer`, `submitter`, `operator` and `admin` (docs/security.md)."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def identity(self) -> Identity:
        """Who this client is for the service, and what it may do."""
        request = auth_service_pb2.GetIdentityRequest()
        return read(Identity, self._connection.call(self._connection.auth.GetIdentity, request))

    def create_token(
        self,
        principal: str,
        *,
        display_name: str = "",
        scopes: list[str] | tuple[str, ...] = (),
        ttl: str | timedelta | None = None,
    ) -> tuple[Token, str]:
        """Make a token for a principal; returns it and its secret, which nobody can read again.

        `scopes` narrow what the principal may, such as `viewer` or `submitter@nlp` (only in that project); `ttl` is
        such as `30d`, unset 90 days. Raises: InvalidArgument; PermissionDenied if this client is not an admin of all
        projects.
        """
        request = build(
            auth_service_pb2.CreateTokenRequest,
            principal=principal,
            display_name=display_name,
            scopes=[scope_of(each) for each in scopes],
            ttl=ttl_of(ttl),
        )
        answer = self._connection.call(self._connection.auth.CreateToken, request)
        return read(Token, answer.token), str(answer.secret)

    def tokens(self, *, principal: str = "", show_ended: bool = False, page_size: int = 0) -> Iterator[Token]:
        """The tokens, the newest first; `show_ended` adds those that are expired or revoked."""
        request = build(
            auth_service_pb2.ListTokensRequest, principal=principal, show_ended=show_ended, page_size=page_size
        )
        for message in pages(self._connection, self._connection.auth.ListTokens, request, "tokens"):
            yield read(Token, message)

    def revoke_token(self, name: str) -> Token:
        """Revoke a token by its name or id: its calls are refused, its streams end within a second.

        Raises: NotFound.
        """
        full = name if name.startswith("tokens/") else f"tokens/{name}"
        request = build(auth_service_pb2.RevokeTokenRequest, name=full)
        return read(Token, self._connection.call(self._connection.auth.RevokeToken, request))

    def grant(self, member: str, role: str, *, project: str | None = None) -> RoleBinding:
        """Give a principal, or a group of JWTs (`group:…`), a role in a project, `-` for all [this client's project].

        Raises: InvalidArgument; PermissionDenied.
        """
        request = build(
            auth_service_pb2.CreateRoleBindingRequest,
            parent=self._parent(project),
            member=member,
            role=role_number(role),
        )
        return read(RoleBinding, self._connection.call(self._connection.auth.CreateRoleBinding, request))

    def role_bindings(
        self, *, project: str | None = None, member: str = "", page_size: int = 0
    ) -> Iterator[RoleBinding]:
        """The roles of a project's members; of `-`: all that this client may see."""
        request = build(
            auth_service_pb2.ListRoleBindingsRequest,
            parent=self._parent(project),
            member=member,
            page_size=page_size,
        )
        for message in pages(self._connection, self._connection.auth.ListRoleBindings, request, "role_bindings"):
            yield read(RoleBinding, message)

    def withdraw(self, member: str, role: str, *, project: str | None = None) -> None:
        """Take a role back; streams that need it end within a second.

        Raises: NotFound if the member does not have it.
        """
        role_number(role)
        bindings = self.role_bindings(project=project, member=member)
        held = [each.name for each in bindings if each.role == role.lower()]
        if held:
            request = build(auth_service_pb2.DeleteRoleBindingRequest, name=held[0])
            self._connection.call(self._connection.auth.DeleteRoleBinding, request)
            return
        raise NotFound(f"{member} does not have the role {role} there", reason="ROLE_BINDING_NOT_FOUND")

    def audit(
        self,
        *,
        project: str | None = None,
        principal: str = "",
        resource: str = "",
        denied_only: bool = False,
        since: datetime | None = None,
        page_size: int = 0,
    ) -> Iterator[AuditEntry]:
        """Who changed what in a project, and who was denied what, the newest first; of `-`: all that may be seen."""
        request: Any = build(
            audit_service_pb2.ListEntriesRequest,
            parent=self._parent(project),
            principal=principal,
            resource=resource,
            denied_only=denied_only,
            page_size=page_size,
        )
        if since is not None:
            request.since.FromDatetime(since)
        for message in pages(self._connection, self._connection.audit.ListEntries, request, "entries"):
            yield read(AuditEntry, message)

    def _parent(self, project: str | None) -> str:
        return self._connection.parent if project is None else parent_name(project)

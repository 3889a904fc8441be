"""AuthService: who calls, tokens, and roles in projects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from google.protobuf import empty_pb2
from sqlalchemy import Connection

from shardyard.v1 import auth_service_pb2 as pb
from shardyard_coordinator.domain.access import ALL_PROJECTS, BindingRecord, Grant, Permission, Role, TokenRecord
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.bearer import make_token
from shardyard_coordinator.serve.call import Behaviour, Call
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.tokens import Pages
from shardyard_coordinator.serve.validation import names
from shardyard_coordinator.serve.validation.access import ttl_s
from shardyard_coordinator.store import access as rows
from shardyard_coordinator.store import encode

_T = TypeVar("_T")
DEFAULT_TTL_S: Final = 90 * 86_400
_ROLES: Final = {role: pb.Role.Value(f"ROLE_{role.name}") for role in Role}
_READ: Final = {number: role for role, number in _ROLES.items()}


class AuthService:
    """Makes and revokes tokens, gives roles and takes them back."""

    full_name = "shardyard.v1.AuthService"

    def __init__(self, parts: Parts, access: Access) -> None:
        self._parts = parts
        self._access = access

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return {
            "GetIdentity": self.identity,
            "CreateToken": self.create_token,
            "ListTokens": self.list_tokens,
            "RevokeToken": self.revoke_token,
            "CreateRoleBinding": self.create_binding,
            "ListRoleBindings": self.list_bindings,
            "DeleteRoleBinding": self.delete_binding,
        }

    async def identity(self, _request: pb.GetIdentityRequest, call: Call) -> pb.Identity:
        """Returns who the caller is, and what it may do."""
        caller = call.caller
        found = pb.Identity(
            principal=caller.principal,
            credential=caller.credential,
            groups=sorted(caller.groups),
            roles=[_grant(each) for each in self._access.rights.grants(caller)],
            scopes=[_grant(each) for each in caller.scopes or ()],
        )
        if caller.expire_us:
            found.expire_time.CopyFrom(encode.timestamp(caller.expire_us))
        return found

    async def create_token(self, request: pb.CreateTokenRequest, call: Call) -> pb.CreateTokenResponse:
        """Makes a token, and returns its secret this once."""
        now_us = self._parts.clock.now_us()
        ttl = round((ttl_s(request) if request.HasField("ttl") else DEFAULT_TTL_S) * 1e6)
        scopes = tuple(dict.fromkeys(_scope(each) for each in request.scopes))
        new, secret = new_token(request.principal, now_us + ttl, display_name=request.display_name, scopes=scopes)
        made = await self._change(lambda conn: rows.create_token(conn, new, actor=call.actor, now_us=now_us), call)
        return pb.CreateTokenResponse(token=_token(made), secret=secret)

    async def list_tokens(self, request: pb.ListTokensRequest, _call: Call) -> pb.ListTokensResponse:
        """Lists tokens, the newest first, without their secrets."""
        pages = Pages(self._parts.tokens, "tokens", request)
        after, live_at_us = pages.after(), 0 if request.show_ended else self._parts.clock.now_us()
        found = await self._parts.store.read_many(
            lambda conn: rows.list_tokens(
                conn, principal=request.principal, live_at_us=live_at_us, after=after, limit=pages.size + 1
            )
        )
        page, token = pages.fill(found, _token, lambda record: record.row)
        return pb.ListTokensResponse(tokens=page, next_page_token=token)

    async def revoke_token(self, request: pb.RevokeTokenRequest, call: Call) -> pb.Token:
        """Revokes a token; the guard ends its streams within a second."""
        name, now_us = names.parse("token", request.name), self._parts.clock.now_us()
        revoked = await self._change(
            lambda conn: rows.revoke_token(conn, name.id, actor=call.actor, now_us=now_us), call
        )
        return _token(revoked)

    async def create_binding(self, request: pb.CreateRoleBindingRequest, call: Call) -> pb.RoleBinding:
        """Gives a member a role."""
        project, now_us = self._project(request.parent), self._parts.clock.now_us()
        role = _READ[request.role]
        made = await self._change(
            lambda conn: rows.create_binding(conn, project, request.member, role, actor=call.actor, now_us=now_us), call
        )
        return _binding(made)

    async def list_bindings(self, request: pb.ListRoleBindingsRequest, call: Call) -> pb.ListRoleBindingsResponse:
        """Lists the roles that the caller may see."""
        project = self._project(request.parent)
        pages = Pages(self._parts.tokens, "role_bindings", request)
        after = pages.after()
        projects = visible_projects(call, Permission.ADMIN, project)
        found = await self._parts.store.read_many(
            lambda conn: rows.list_bindings(
                conn,
                projects,
                member=request.member,
                after=None if after is None else (after[0], after[1]),
                limit=pages.size + 1,
            )
        )
        page, token = pages.fill(found, _binding, lambda record: (record.project, record.id))
        return pb.ListRoleBindingsResponse(role_bindings=page, next_page_token=token)

    async def delete_binding(self, request: pb.DeleteRoleBindingRequest, call: Call) -> empty_pb2.Empty:
        """Takes a role back; the guard ends the streams that need it within a second."""
        name, now_us = names.parse("binding", request.name), self._parts.clock.now_us()
        await self._change(
            lambda conn: rows.delete_binding(conn, name.project, name.id, actor=call.actor, now_us=now_us), call
        )
        return empty_pb2.Empty()

    def _project(self, parent: str) -> str:
        """The project of a parent, or `-`. Raises: Refused ACCESS_DENIED if there is no such project."""
        project = names.parse("any_project", parent).project
        if project != ALL_PROJECTS:
            self._parts.check_project(project)
        return project

    async def _change(self, operation: Callable[[Connection], _T], call: Call) -> _T:
        """Writes a change, which counts for every call that comes after its answer, also if its caller leaves."""

        async def change() -> _T:
            changed = await self._parts.store.write(operation, call.actor)
            await self._access.reload()
            return changed

        return await asyncio.shield(asyncio.ensure_future(change()))


def new_token(
    principal: str, expire_us: int, *, display_name: str = "", scopes: tuple[Grant, ...] = ()
) -> tuple[TokenRecord, str]:
    """A token to be stored, and its text."""
    token_id, text, digest = make_token()
    return TokenRecord(token_id, 0, principal, digest, display_name, scopes, "", 0, expire_us, 0), text


def visible_projects(call: Call, permission: Permission, project: str) -> list[str] | None:
    """The projects whose rows a list shows: the one asked for, or for `-` those that the caller may see; None: all."""
    if project != ALL_PROJECTS:
        return [project]
    found = call.rights.projects(call.caller, permission)
    return None if found is None else sorted(found)


def _scope(grant: pb.Grant) -> Grant:
    return Grant(_READ[grant.role], grant.project.removeprefix("projects/") or ALL_PROJECTS)


def _grant(grant: Grant) -> pb.Grant:
    return pb.Grant(role=_ROLES[grant.role], project=names.project_name(grant.project))


def _token(record: TokenRecord) -> pb.Token:
    token = pb.Token(
        name=record.name,
        principal=record.principal,
        display_name=record.display_name,
        scopes=[_grant(each) for each in record.scopes],
        creator=record.creator,
        create_time=encode.timestamp(record.create_us),
    )
    if record.expire_us:
        token.expire_time.CopyFrom(encode.timestamp(record.expire_us))
    if record.revoke_us:
        token.revoke_time.CopyFrom(encode.timestamp(record.revoke_us))
    return token


def _binding(record: BindingRecord) -> pb.RoleBinding:
    return pb.RoleBinding(
        name=record.name,
        member=record.member,
        role=_ROLES[record.role],
        creator=record.creator,
        create_time=encode.timestamp(record.create_us),
    )

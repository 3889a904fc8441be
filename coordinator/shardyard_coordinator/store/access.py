"""Operations on tokens and role bindings. Secrets are never here: only the sha256 of a token's secret is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, Table, delete, func, insert, select, update

from shardyard_coordinator.domain.access import BindingRecord, Grant, Role, TokenRecord
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.seams import Actor
from shardyard_coordinator.store import audit, tables

MAX_TOKENS = 10_000
MAX_BINDINGS = 10_000
"""All are in memory, and an entry costs under a kilobyte."""

KEPT_US = 90 * 86_400 * 1_000_000
"""How long a token that is expired or revoked is still listed."""

_token, _binding = tables.token.c, tables.role_binding.c


def create_token(conn: Connection, new: TokenRecord, *, actor: Actor, now_us: int) -> TokenRecord:
    """Adds a token, and removes those that ended long ago. Raises: Refused QUOTA_EXCEEDED."""
    ended = (_token.revoke_us > 0) & (_token.revoke_us < now_us - KEPT_US)
    expired = (_token.expire_us > 0) & (_token.expire_us < now_us - KEPT_US)
    conn.execute(delete(tables.token).where(ended | expired))
    if _count(conn, tables.token) >= MAX_TOKENS:
        text = f"there are {MAX_TOKENS:,} tokens, the most allowed; those that end are removed after 90 days"
        raise Refused(Reason.QUOTA_EXCEEDED, text)
    values = {
        "id": new.id,
        "principal": new.principal,
        "sha256": new.sha256,
        "display_name": new.display_name,
        "scopes": _scopes_text(new.scopes),
        "creator": actor.principal,
        "create_us": now_us,
        "expire_us": new.expire_us,
    }
    conn.execute(insert(tables.token).values(**values))
    audit.record(conn, actor, new.name, now_us)
    return _get_token(conn, new.id)


def revoke_token(conn: Connection, token_id: str, *, actor: Actor, now_us: int) -> TokenRecord:
    """Revokes a token. Idempotent. Raises: Refused TOKEN_NOT_FOUND."""
    found = _get_token(conn, token_id)
    if found.revoke_us:
        return found
    conn.execute(update(tables.token).where(_token.id == token_id).values(revoke_us=now_us))
    audit.record(conn, actor, found.name, now_us)
    return _get_token(conn, token_id)


def list_tokens(
    conn: Connection,
    *,
    principal: str = "",
    live_at_us: int = 0,
    after: int | None = None,
    limit: int = MAX_TOKENS,
) -> list[TokenRecord]:
    """Tokens, the newest first: of one principal, or all; with `live_at_us` only those that are valid then."""
    statement = select(tables.token)
    if principal:
        statement = statement.where(_token.principal == principal)
    if live_at_us:
        statement = statement.where(_token.revoke_us == 0, (_token.expire_us == 0) | (_token.expire_us > live_at_us))
    if after is not None:
        statement = statement.where(_token.row < after)
    return [_to_token(row) for row in conn.execute(statement.order_by(_token.row.desc()).limit(limit))]


def create_binding(
    conn: Connection, project: str, member: str, role: Role, *, actor: Actor, now_us: int
) -> BindingRecord:
    """Gives the member the role; one that it has already stays as it is. Raises: Refused QUOTA_EXCEEDED."""
    binding_id = binding_id_of(member, role)
    statement = select(tables.role_binding).where(_binding.project == project, _binding.id == binding_id)
    if (row := conn.execute(statement).first()) is not None:
        return _to_binding(row)
    if _count(conn, tables.role_binding) >= MAX_BINDINGS:
        text = f"there are {MAX_BINDINGS:,} role bindings, the most allowed; bind groups, or take roles back"
        raise Refused(Reason.QUOTA_EXCEEDED, text)
    new = BindingRecord(binding_id, project, member, role, actor.principal, now_us)
    values = {"project": project, "id": binding_id, "member": member, "role": role.value}
    conn.execute(insert(tables.role_binding).values(**values, creator=new.creator, create_us=now_us))
    audit.record(conn, actor, new.name, now_us)
    return new


def delete_binding(conn: Connection, project: str, binding_id: str, *, actor: Actor, now_us: int) -> None:
    """Takes a role back. Raises: Refused ROLE_BINDING_NOT_FOUND."""
    mine = (_binding.project == project, _binding.id == binding_id)
    name = f"projects/{project}/roleBindings/{binding_id}"
    if not conn.execute(delete(tables.role_binding).where(*mine)).rowcount:
        text = f"there is no role binding `{name}`; list them with `shardyard roles` (ListRoleBindings)"
        raise Refused(Reason.ROLE_BINDING_NOT_FOUND, text)
    audit.record(conn, actor, name, now_us)


def list_bindings(
    conn: Connection,
    projects: Sequence[str] | None = None,
    *,
    member: str = "",
    after: tuple[str, str] | None = None,
    limit: int = MAX_BINDINGS,
) -> list[BindingRecord]:
    """Bindings of these projects (None: of all), in the order of project and id."""
    statement = select(tables.role_binding)
    if projects is not None:
        statement = statement.where(_binding.project.in_(projects))
    if member:
        statement = statement.where(_binding.member == member)
    if after is not None:
        project, binding_id = after
        later = (_binding.project == project) & (_binding.id > binding_id)
        statement = statement.where((_binding.project > project) | later)
    ordered = statement.order_by(_binding.project, _binding.id).limit(limit)
    return [_to_binding(row) for row in conn.execute(ordered)]


def binding_id_of(member: str, role: Role) -> str:
    """The id of a binding, which follows from member and role: there is one of each."""
    return "b-" + hashlib.sha256(f"{role.value} {member}".encode()).hexdigest()[:24]


def _count(conn: Connection, table: Table) -> int:
    return int(conn.execute(select(func.count()).select_from(table)).scalar_one())


def _get_token(conn: Connection, token_id: str) -> TokenRecord:
    row = conn.execute(select(tables.token).where(_token.id == token_id)).first()
    if row is None:
        text = f"there is no token `tokens/{token_id}`; list them with `shardyard tokens` (ListTokens)"
        raise Refused(Reason.TOKEN_NOT_FOUND, text)
    return _to_token(row)


def _scopes_text(scopes: Sequence[Grant]) -> str:
    """Such as `viewer -,submitter nlp`."""
    return ",".join(f"{scope.role} {scope.project}" for scope in scopes)


def _to_token(row: Row[Any]) -> TokenRecord:
    values: dict[str, Any] = dict(zip(tables.token.columns.keys(), row, strict=True))
    pairs = [part.split(" ") for part in values["scopes"].split(",") if part]
    values["scopes"] = tuple(Grant(Role(role), project) for role, project in pairs)
    return TokenRecord(**values)


def _to_binding(row: Row[Any]) -> BindingRecord:
    values: dict[str, Any] = dict(zip(tables.role_binding.columns.keys(), row, strict=True))
    values["role"] = Role(values["role"])
    return BindingRecord(**values)

"""The first admin: a token in a file that only this account can read, if nobody could give rights otherwise."""

from __future__ import annotations

import os
from pathlib import Path
from socket import gethostname
from typing import Final

from sqlalchemy import Connection

from shardyard_coordinator.domain.access import ALL_PROJECTS, Caller, Permission, Role, TokenRecord
from shardyard_coordinator.redaction import one_line
from shardyard_coordinator.seams import Actor, Clock
from shardyard_coordinator.serve.auth_service import new_token
from shardyard_coordinator.serve.bearer import PREFIX
from shardyard_coordinator.serve.rights import Rights
from shardyard_coordinator.store import access
from shardyard_coordinator.store.store import Store

FILE: Final = "admin-token"
PRINCIPAL: Final = "admin"
_FIRST: Final = "first admin"
_ACTOR: Final = Actor("service", "serve")


async def ensure_admin(store: Store, folder: Path, clock: Clock) -> Path | None:
    """The file with a new token of an admin of all projects; None: there is an admin, so nothing is made.

    The token does not expire. The file is written first: a crash in between makes another token at the next start, and
    never an admin whose token nobody has. Raises: OSError.
    """
    now_us = clock.now_us()
    if await store.read(lambda conn: _has_admin(conn, now_us)):
        return None
    path = folder / FILE
    new, text = new_token(PRINCIPAL, 0, display_name=f"{_FIRST}, written to {one_line(str(path))} on {gethostname()}")
    _write(path, f"{text}\n")
    await store.write(lambda conn: _add(conn, new, now_us), _ACTOR)
    return path


async def words_of_token(store: Store, folder: Path, clock: Clock, login: str) -> str:
    """Where the newest token of a first admin was written, which may be another machine; empty: none is valid.

    `login` is the command that takes it. The store keeps the place, so that every service that leads it later says it.
    """
    now_us = clock.now_us()
    tokens = await store.read(lambda conn: access.list_tokens(conn, principal=PRINCIPAL, live_at_us=now_us))
    first = next((each for each in tokens if each.display_name.startswith(_FIRST)), None)
    if first is None:
        return ""
    path = folder / FILE
    if path.is_file() and path.read_text(errors="replace").startswith(f"{PREFIX}{first.id}_"):
        return f"the token of the {_FIRST} is in {path}; next: {login} < {path}"
    stale = f"; the one in {path} is of a start that failed, remove it" if path.is_file() else ""
    return f"the token of the {_FIRST} was {first.display_name.removeprefix(f'{_FIRST}, ')}{stale}"


def _has_admin(conn: Connection, now_us: int) -> bool:
    """Whether a token, or a member that the issuer or the authority vouches for, is an admin of all projects."""
    bindings = access.list_bindings(conn)
    admins = [each for each in bindings if each.role is Role.ADMIN and each.project == ALL_PROJECTS]
    if any(":" in each.member for each in admins):
        return True
    rights, tokens = Rights(bindings), access.list_tokens(conn, live_at_us=now_us)
    callers = (Caller(token.principal, scopes=token.scopes or None) for token in tokens)
    return any(rights.may(caller, Permission.ADMIN, ALL_PROJECTS) for caller in callers)


def _add(conn: Connection, new: TokenRecord, now_us: int) -> None:
    access.create_token(conn, new, actor=_ACTOR, now_us=now_us)
    access.create_binding(conn, ALL_PROJECTS, PRINCIPAL, Role.ADMIN, actor=_ACTOR, now_us=now_us)


def _write(path: Path, text: str) -> None:
    """Raises: OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

"""Who calls, and may it: what the guard asks before and after it has read a request, and of streams every second.

Without authentication everybody is `local`, and may do everything. With it, Health and reflection stay open, and every
other call needs a token, a JWT or a client certificate. Tokens and roles are in the memory of the one process that
serves, so a change counts from its commit on; streams that are not allowed any more end within a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from sqlalchemy import Connection

from shardyard_coordinator.domain.access import (
    ANONYMOUS,
    CERTIFICATE_CREDENTIAL,
    LOCAL,
    OIDC_CREDENTIAL,
    OWN_NAME,
    RESERVED,
    BindingRecord,
    Caller,
    Permission,
    TokenRecord,
)
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Code, Reason
from shardyard_coordinator.seams import Clock
from shardyard_coordinator.serve.bearer import PREFIX, TokenBook, bearer_of, invalid
from shardyard_coordinator.serve.buckets import Buckets
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.certificates import Certificates
from shardyard_coordinator.serve.oidc import Jwts
from shardyard_coordinator.serve.permissions import denial, is_open, may, names_project
from shardyard_coordinator.serve.protection import Authentication
from shardyard_coordinator.serve.rights import Rights
from shardyard_coordinator.serve.starting import until_ready
from shardyard_coordinator.serve.validation import names
from shardyard_coordinator.store import access, audit
from shardyard_coordinator.store.store import Store

log = logging.getLogger(__name__)

_DENIALS: Final = 20
_DENIAL_EVERY_S: Final = 10.0
_MOST_COUNTED: Final = 10_000
_RELOAD_S: Final = 1.0
Metadata = Iterable[tuple[str, str | bytes]]


class Access:
    """Lets callers in. With authentication, calls wait until `open`, when tokens and roles are known."""

    def __init__(self, how: Authentication, clock: Clock, jwts: Jwts | None = None) -> None:
        self.how = how
        self.rights = Rights()
        self._clock = clock
        self._tokens = TokenBook(clock)
        self._certificates = Certificates(clock)
        self._jwts = jwts or (Jwts(how.issuer, clock) if how.issuer else None)
        self._store: Store | None = None
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._denials = Buckets(_DENIALS, 1 / _DENIAL_EVERY_S, clock)
        self._reloading = asyncio.Lock()
        self._unsaid: dict[tuple[str, str], int] = {}
        self._changed: list[Callable[[], None]] = []

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Calls `changed` after every change of tokens and roles, in the loop."""
        self._changed.append(changed)

    async def open(self, store: Store) -> None:
        """Reads tokens and roles; callers are let in from now on."""
        self._store = store
        await self.reload()
        self._opened.set_result(None)

    async def reload(self) -> None:
        """Reads tokens and roles again, after a change; keeps trying, because a token may have been revoked."""
        store = self._store
        assert store is not None
        async with self._reloading:  # One after the other: the last one reads last.
            while True:
                try:
                    tokens, bindings = await store.read(_read)
                    break
                except Refused as refused:
                    log.warning("tokens and roles cannot be read; it is tried again: %s", refused)
                    await asyncio.sleep(_RELOAD_S)
            self._tokens.replace(tokens)
            self.rights = Rights(bindings)
            for changed in self._changed:
                changed()

    async def admit(self, call: Call, metadata: Metadata) -> Call:
        """The call with its caller. Raises: Refused CREDENTIALS_MISSING, CREDENTIALS_INVALID, CREDENTIALS_EXPIRED …"""
        if not self.how.is_required:
            return replace(call, caller=LOCAL, rights=self.rights, only_own=False)
        if is_open(call.method):
            return call
        await until_ready(self._opened, call)
        return replace(call, caller=await self._recognised(call, metadata), rights=self.rights)

    def check_method(self, call: Call) -> None:
        """Raises: Refused ACCESS_DENIED if the caller may call the method nowhere, so that nothing is read for it."""
        if not may(self.rights, call.caller, call.method, None):
            raise denial(self.rights, call.caller, call.method, None)

    def check(self, call: Call) -> Call:
        """The call, for the project of the resource that its request names. Raises: Refused ACCESS_DENIED."""
        if call.caller is LOCAL:
            return call
        project = names.project_of(call.resource)
        if project is None and names_project(call.method):
            raise denial(self.rights, call.caller, call.method, None)
        if project is None:
            return call
        if not may(self.rights, call.caller, call.method, project):
            raise denial(self.rights, call.caller, call.method, project)
        only_own = not self.rights.may(call.caller, Permission.ADMIN, project)
        return replace(call, rights=self.rights, project=project, only_own=only_own)

    def verdict(self, call: Call) -> Refused | None:
        """Why a call that was let in is not allowed any more; None: it still is."""
        caller = call.caller
        if caller in (LOCAL, ANONYMOUS):
            return None
        if caller.credential == OIDC_CREDENTIAL:
            refused = self._jwts.verdict(caller) if self._jwts else invalid("JWTs are not accepted any more")
        elif caller.credential == CERTIFICATE_CREDENTIAL:
            refused = self._certificates.verdict(caller)
        else:
            refused = self._tokens.verdict(caller)
        if refused is None and not may(self.rights, caller, call.method, call.project):
            return denial(self.rights, caller, call.method, call.project)
        return refused

    def why_not_view(self, principal: str, groups: frozenset[str], project: str) -> str:
        """Why one who does not call just now may not view the project; empty: it may.

        It needs a role of its own or of its groups, and a principal of tokens also a valid token that is not narrowed
        to less: without one it could not look itself.
        """
        if not self.how.is_required:
            return ""
        if principal in RESERVED:
            return "it was made when the service did not ask who calls, so nobody answers for it"
        caller = Caller(principal, groups=groups)
        if not self.rights.may(caller, Permission.VIEW, project):
            return f"{principal}, who made it, has no role in projects/{project} any more"
        tokens = self._tokens.live(principal) if OWN_NAME.fullmatch(principal) else None
        callers = [caller] if tokens is None else [replace(caller, scopes=each.scopes or None) for each in tokens]
        if not any(self.rights.may(each, Permission.VIEW, project) for each in callers):
            return f"{principal}, who made it, has no valid token for projects/{project} any more"
        return ""

    async def note(self, call: Call, refused: Refused) -> None:
        """Records a denial, before the caller hears of it; many equal ones of one caller become one entry."""
        if refused.code not in (Code.PERMISSION_DENIED, Code.UNAUTHENTICATED) or self._store is None:
            return
        key = (call.principal or call.host, refused.reason.value)
        count = self._unsaid.pop(key, 0) + 1
        if not self._denials.take(key):
            if len(self._unsaid) < _MOST_COUNTED:
                self._unsaid[key] = count
            return
        actor, resource, now_us = call.actor, call.resource, self._clock.now_us()
        try:
            await self._store.write(
                lambda conn: audit.record_denial(conn, actor, resource, refused.reason, count=count, now_us=now_us),
                actor,
            )
        except Refused as error:
            log.error("a denial is not in the audit log (%s): %s %s", error.reason, actor, refused.reason)

    async def _recognised(self, call: Call, metadata: Metadata) -> Caller:
        token = bearer_of(metadata)
        if token is not None and token.startswith(PREFIX):
            return self._tokens.caller(token, call.host)
        if token is not None:
            if self._jwts is None:
                raise invalid("the bearer token is not one of this service (`sy_…`); log in again")
            return await self._jwts.caller(token)
        caller = self._certificates.caller(call.holder)
        if caller is None:
            text = "the service wants to know who calls; set SHARDYARD_TOKEN, or run `shardyard login`"
            raise Refused(Reason.CREDENTIALS_MISSING, text)
        return caller


def _read(conn: Connection) -> tuple[list[TokenRecord], list[BindingRecord]]:
    return access.list_tokens(conn), access.list_bindings(conn)

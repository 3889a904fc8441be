"""Tokens, role bindings and the audit log in the store, alike on both databases."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from helpers.clock import ManualClock
from helpers.stores import store_at
from shardyard_coordinator.domain.access import Grant, Role, TokenRecord
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.seams import SYSTEM, Actor, NullTrace
from shardyard_coordinator.store import access, audit
from shardyard_coordinator.store.store import Store, open_store

ON_BOTH_STORES = True
BOSS = Actor("boss", "/shardyard.v1.AuthService/CreateToken", "r-1", "tokens/a", "127.0.0.1")


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(store_at(tmp_path), ManualClock(), NullTrace())
    yield opened
    await opened.close()


def token(number: int, principal: str = "alice", **fields: Any) -> TokenRecord:
    scopes = (Grant(Role.VIEWER, "-"), Grant(Role.SUBMITTER, "nlp"))[:number]
    record = TokenRecord(f"{number:012d}", 0, principal, bytes([number]) * 32, "Ä", scopes, "", 0, 0, 0)
    return dataclasses.replace(record, **fields)


async def create(store: Store, new: TokenRecord, now_us: int = 1) -> TokenRecord:
    return await store.write(partial(access.create_token, new=new, actor=BOSS, now_us=now_us), BOSS)


async def test_tokens_come_back_as_they_were_made_the_newest_first_and_page_by_page(store: Store) -> None:
    made = [await create(store, token(at, ("alice", "bob")[at % 2], expire_us=at * 10)) for at in range(4)]
    listed = await store.read(access.list_tokens)
    assert listed == made[::-1] and [each.creator for each in listed] == ["boss"] * 4
    assert made[2].scopes == (Grant(Role.VIEWER, "-"), Grant(Role.SUBMITTER, "nlp")) and made[0].scopes == ()
    of_bob = await store.read(partial(access.list_tokens, principal="bob"))
    assert [each.id for each in of_bob] == [made[3].id, made[1].id]
    page = await store.read(partial(access.list_tokens, after=made[2].row, limit=1))
    assert page == [made[1]]
    revoked = await store.write(partial(access.revoke_token, token_id=made[3].id, actor=BOSS, now_us=5), BOSS)
    assert revoked.revoke_us == 5
    again = await store.write(partial(access.revoke_token, token_id=made[3].id, actor=BOSS, now_us=6), BOSS)
    assert again == revoked
    live = await store.read(partial(access.list_tokens, live_at_us=10))
    assert [each.id for each in live] == [made[2].id, made[0].id]
    with pytest.raises(Refused) as refused:
        await store.write(partial(access.revoke_token, token_id="none", actor=BOSS, now_us=6), BOSS)
    assert refused.value.reason is Reason.TOKEN_NOT_FOUND


async def test_tokens_that_ended_long_ago_go_when_another_is_made_and_their_rows_are_not_used_again(
    store: Store,
) -> None:
    old = await create(store, token(1, expire_us=10))
    gone = await create(store, token(2))
    await store.write(partial(access.revoke_token, token_id=gone.id, actor=BOSS, now_us=10), BOSS)
    new = await create(store, token(3), now_us=access.KEPT_US + 11)
    assert await store.read(access.list_tokens) == [new] and new.row > gone.row > old.row


async def test_a_binding_is_made_once_and_bindings_are_in_the_order_of_their_bytes(store: Store) -> None:
    def bind(project: str, member: str, role: Role) -> Any:
        return store.write(
            partial(access.create_binding, project=project, member=member, role=role, actor=BOSS, now_us=7), BOSS
        )

    made = [
        await bind(project, member, role)
        for project in ("nlp", "-", "a-b", "ab")
        for member, role in (("group:Ä", Role.VIEWER), ("alice", Role.ADMIN))
    ]
    assert await bind("ab", "alice", Role.ADMIN) == made[-1]
    ordered = sorted(made, key=lambda each: (each.project.encode(), each.id.encode()))
    assert await store.read(access.list_bindings) == ordered
    paged, after = [], None
    while page := await store.read(partial(access.list_bindings, after=after, limit=3)):
        paged += page
        after = (page[-1].project, page[-1].id)
    assert paged == ordered
    assert len(await store.read(partial(access.list_bindings, projects=["ab", "-"], member="group:Ä"))) == 2
    assert await store.read(partial(access.list_bindings, projects=[])) == []
    removal = partial(access.delete_binding, project="ab", binding_id=made[-1].id, actor=BOSS, now_us=8)
    await store.write(removal, BOSS)
    with pytest.raises(Refused) as refused:
        await store.write(removal, BOSS)
    assert refused.value.reason is Reason.ROLE_BINDING_NOT_FOUND
    assert len(await store.read(access.list_bindings)) == len(made) - 1


async def test_the_audit_log_is_found_by_each_of_its_filters_the_newest_first(store: Store) -> None:
    alice = dataclasses.replace(BOSS, principal="alice", peer="::1")
    changes = [(BOSS, "projects/a/jobs/x"), (alice, "projects/b/jobs/y"), (SYSTEM, "projects/a/jobs/x"), (BOSS, "t")]
    await store.write(partial(audit.record_all, changes=changes, now_us=3), BOSS)
    denied = partial(audit.record_denial, actor=alice, resource="projects/a/jobs/x", reason=Reason.ACCESS_DENIED)
    await store.write(partial(denied, count=4, now_us=9), alice)

    async def found(projects: list[str] | None = None, **filters: Any) -> list[tuple[str, str]]:
        entries = await store.read(partial(audit.list_entries, projects=projects, **filters))
        return [(each.principal, each.resource) for each in entries]

    everything = await store.read(partial(audit.list_entries, projects=None))
    assert [each.position for each in everything] == sorted((each.position for each in everything), reverse=True)
    newest = everything[0]
    assert (newest.outcome, newest.count, newest.peer, newest.project) == ("ACCESS_DENIED", 4, "::1", "a")
    assert (newest.credential, newest.request_id, newest.time_us) == ("tokens/a", "r-1", 9)
    assert await found() == [
        ("alice", "projects/a/jobs/x"),
        ("boss", "t"),
        ("alice", "projects/b/jobs/y"),
        ("boss", "projects/a/jobs/x"),
    ]
    assert await found(["a"], denied_only=True) == await found(since_us=4) == [("alice", "projects/a/jobs/x")]
    assert await found(["a", "b"], principal="boss") == [("boss", "projects/a/jobs/x")]
    assert await found(resource="t") == [("boss", "t")] and await found([]) == []
    assert await found(after=everything[1].position, limit=1) == [("alice", "projects/b/jobs/y")]

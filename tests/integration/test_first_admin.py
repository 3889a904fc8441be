"""The first admin's token: made once for a store, wherever it is led later, and always to be found."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from helpers import stores
from helpers.clock import ManualClock
from helpers.lost_commits import opened
from helpers.postgres import why_not
from helpers.served import BIN, START_S, Served
from shardyard_coordinator.serve.first_admin import FILE, ensure_admin, words_of_token
from shardyard_coordinator.store import tables

ON_BOTH_STORES = True
LOGIN = "shardyard login --address train.example.org:7400 --ca CA.pem"


async def test_who_takes_the_store_over_makes_no_second_token_and_knows_where_the_first_is(tmp_path: Path) -> None:
    clock, place = ManualClock(), stores.store_at(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    async with opened(place) as store:
        assert await ensure_admin(store, first, clock) == first / FILE
        assert await words_of_token(store, first, clock, LOGIN) == (
            f"the token of the first admin is in {first / FILE}; next: {LOGIN} < {first / FILE}"
        )
    async with opened(place) as store:
        assert await ensure_admin(store, second, clock) is None and not (second / FILE).exists()
        there = f"the token of the first admin was written to {first / FILE} on {socket.gethostname()}"
        assert await words_of_token(store, second, clock, LOGIN) == there
        assert len(await store.read(lambda conn: conn.execute(select(tables.token)).all())) == 1
        (second / FILE).write_text(f"sy_{'a' * 12}_{'b' * 43}\n")  # Of a start that did not come to its commit.
        said = await words_of_token(store, second, clock, LOGIN)
        assert said.startswith(there) and str(second / FILE) in said and "remove it" in said
        secret = (first / FILE).read_text().strip().split("_", 2)[2]
        assert secret not in said


def test_a_standby_says_where_the_token_is_and_takes_over_with_it(tmp_path: Path, store_kind: str) -> None:
    if store_kind != stores.POSTGRESQL or why_not():
        pytest.skip(why_not() or "only a store that two machines reach has a standby")
    extra = {**stores.of_service(tmp_path), "SHARDYARD_STORAGE_ROOT": str(tmp_path / "storage")}
    leader = Served(tmp_path / "leader", "local", ("--auth",), extra)
    standby = Served(tmp_path / "standby", "local", ("--auth", "--standby"), extra)
    leader.start()
    try:
        said_by(leader, "first admin")
        token = (leader.state / FILE).read_text().strip()
        standby.start()
        try:
            assert "made once" in said_by(standby, "takes over when")
            assert "written to" not in (standby.folder / "serve.log").read_text()
            leader.kill()
            said_by(standby, "serves on")
            said = said_by(standby, "first admin was written to")
            assert f"{leader.state / FILE} on {socket.gethostname()}" in said and not (standby.state / FILE).exists()
            who = standby.run("env", f"SHARDYARD_TOKEN={token}", str(BIN / "shardyard"), "whoami")
            assert who.returncode == 0 and "admin" in who.stdout
        finally:
            standby.stop()
    finally:
        leader.kill()


def said_by(service: Served, words: str) -> str:
    """The log of a service once it has these words."""
    deadline = time.monotonic() + START_S
    while words not in (said := (service.folder / "serve.log").read_text()):
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    return said

"""PostgreSQL, as often as it takes to believe it: 200 kills under load, 300 lost replies of COMMIT."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import stores
from helpers.killed_service import assert_exactly_once, submit_through_kills
from helpers.lost_commits import commit_through
from helpers.postgres import shared_server, why_not

pytestmark = pytest.mark.prove


@pytest.fixture(autouse=True)
def on_postgresql(store_kind: str) -> Iterator[None]:
    del store_kind
    if reason := why_not():
        pytest.skip(reason)
    with stores.using(stores.POSTGRESQL):
        yield


async def test_two_hundred_kills_under_load_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    load = await submit_through_kills(tmp_path, 200, seed=200)
    jobs = await assert_exactly_once(tmp_path, load)
    print(
        f"200 kills: {jobs:,} jobs, {len(load.told):,} acknowledged, {load.again:,} calls repeated, 0 lost, 0 doubled"
    )


async def test_three_hundred_lost_replies_of_commits_are_decided_rightly() -> None:
    server = shared_server()
    url = server.database("lost-replies")
    eaten, jobs = await commit_through(server, url, eaten=300, rng=random.Random(300))
    assert eaten >= 300
    print(f"{eaten} COMMITs lost on the way or answered into the void: {jobs:,} jobs, 0 lost, 0 doubled")

"""A real service on PostgreSQL: killed under load, started again, and silent about its password."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from helpers import stores
from helpers.killed_service import assert_exactly_once, submit_through_kills
from helpers.lost_commits import opened
from helpers.postgres import shared_server, why_not
from helpers.served import BIN, served

KILLS = 6


@pytest.fixture(autouse=True)
def on_postgresql(store_kind: str) -> Iterator[None]:
    del store_kind
    if reason := why_not():
        pytest.skip(reason)
    with stores.using(stores.POSTGRESQL):
        yield


async def test_kills_under_load_lose_no_job_and_make_none_twice(tmp_path: Path) -> None:
    load = await submit_through_kills(tmp_path, KILLS, seed=5)
    assert await assert_exactly_once(tmp_path, load) >= len(load.told) >= KILLS


async def test_a_standby_that_waits_names_the_leader_and_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    url = str(stores.store_at(tmp_path))
    command = [BIN / "shardyard", "serve", "--standby", "--launcher", "local", "--listen", "127.0.0.1:0"]
    environment = {**os.environ, "SHARDYARD_STORE": url, "SHARDYARD_STATE_DIR": str(tmp_path / "state")}
    async with opened(url) as leader:
        standby = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.PIPE)
        assert standby.stderr is not None
        try:
            async with asyncio.timeout(120):
                said = (await standby.stderr.readline()).decode()
                standby.terminate()
                assert await standby.wait() == 0
        finally:
            if standby.returncode is None:
                standby.kill()
    assert f"the store {leader.name} waits for process {os.getpid()} on" in said and "to end" in said


def test_a_service_on_postgresql_is_killed_and_goes_on_without_a_word_about_its_password(tmp_path: Path) -> None:
    password = shared_server().password
    with served(tmp_path, "local", "--cpus", "1", environment=stores.of_service(tmp_path)) as service:
        assert service.process is not None
        arguments = psutil.Process(service.process.pid).cmdline()
        (tmp_path / "corpus.txt").write_text("some words to learn\n" * 50)
        submitted = service.run(
            str(BIN / "shardyard"), "submit", "--detach", "--job-id", "mine", "--task", "causal-lm",
            "--architecture", "gpt2", "--max-steps", "1", "--train", str(tmp_path / "corpus.txt"),
            "--sequence-length", "16", "--set", "spec.tokenizer.train.algorithm=characters",
            "--set", "spec.model.architecture.overrides={n_layer: 1, n_head: 2, n_embd: 16, n_positions: 16}",
        )  # fmt: skip
        assert submitted.returncode == 0, submitted.stderr
        service.kill()
        begun = time.monotonic()
        service.start()
        found = service.run(str(BIN / "shardyard"), "get", "mine", "--json")
        assert json.loads(found.stdout)["name"] == "projects/default/jobs/mine"
        assert time.monotonic() - begun < 60
        children = psutil.Process(service.process.pid).children(recursive=True)
        environments = [child.environ() for child in children]
    assert all("SHARDYARD_STORE" not in each for each in environments)
    texts = [*arguments, (tmp_path / "serve.log").read_text(), submitted.stdout, submitted.stderr]
    assert password not in " ".join(texts)
    assert not (tmp_path / "state" / "store.db").exists()

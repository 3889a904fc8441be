"""`shardyard store`: backups, restores and the move from SQLite to PostgreSQL, typed as an operator types them."""

from __future__ import annotations

import json
import sqlite3
import stat
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, delete, select

from helpers.core import ACTOR, add_model, new_job
from helpers.lost_commits import opened
from helpers.postgres import Server, postgres_server
from shardyard.cli.app import run
from shardyard_coordinator.domain.records import MetricPoint
from shardyard_coordinator.seams import NullTrace, SystemClock
from shardyard_coordinator.store import jobs, listing, metrics, submissions, tables
from shardyard_coordinator.store.failures import StoreMoved
from shardyard_coordinator.store.store import open_store

_numbers = count()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def url(server: Server) -> str:
    return server.database(f"commands{next(_numbers)}")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def fill(conn: Connection) -> None:
    """Jobs with labels, a model, metrics, and a last row that is gone again."""
    add_model(conn)
    for at in range(6):
        new = new_job(
            f"job-{at}", labels={"team": "ä"}, request_id=f"r{at}", fingerprint=b"\0\xff", display_name="é\u2028"
        )
        submissions.create_job(conn, new, ACTOR, 1)
        metrics.add_points(conn, new.uid, "loss", [MetricPoint(1, 1, 1, float("inf")), MetricPoint(1, 2, 2, 0.1)])
    conn.execute(delete(tables.job).where(tables.job.c.job_id == "job-5"))


def content(conn: Connection) -> dict[str, list[tuple[Any, ...]]]:
    found = {table.name: conn.execute(select(table)).all() for table in tables.metadata.sorted_tables}
    return {name: sorted(map(tuple, rows), key=repr) for name, rows in found.items() if name != "lease"}


async def filled(at: str | Path) -> tuple[str, dict[str, list[tuple[Any, ...]]]]:
    """The id and the content of a new store."""
    async with opened(at) as store:
        await store.write(fill, ACTOR)
        return store.store_id, await store.read(content)


async def test_a_store_moves_to_postgresql_and_goes_on_there(
    state: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state.mkdir()
    store_id, before = await filled(state / "store.db")
    monkeypatch.setenv("SHARDYARD_STORE", url)
    assert run(["store", "migrate", str(state), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["store_id"], said["tables"]["job"]["rows"], said["replaced_texts"]) == (store_id, 5, 0)
    # Typed again, as after an end that was interrupted: it is complete.
    assert run(["store", "migrate", str(state)]) == 0
    assert "every row was compared" in capsys.readouterr().out
    with pytest.raises(StoreMoved, match="--store"):
        await open_store(state / "store.db", SystemClock(), NullTrace())
    async with opened(url) as store:
        assert store.store_id == store_id and await store.read(content) == before
        assert store.term == 2
        created = await store.write(lambda conn: submissions.create_job(conn, new_job("next"), ACTOR, 1), ACTOR)
        assert created.job.id == 7, "the row of a removed job is not used again"
    assert run(["store", "migrate", str(state)]) == 78
    assert f"is not empty: it has the store {store_id}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_a_backup_of_a_running_store_is_restored_in_either_database(
    *,
    state: Path,
    server: Server,
    url: str,
    tmp_path: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state.mkdir()
    at: str | Path = url if kind == "postgresql" else state / "store.db"
    if kind == "postgresql":
        monkeypatch.setenv("SHARDYARD_STORE", url)
    file = tmp_path / "backup.db"
    async with opened(at) as store:
        await store.write(fill, ACTOR)
        assert run(["store", "backup", str(file), "--state-dir", str(state)]) == 0
        await store.write(lambda conn: submissions.create_job(conn, new_job("later"), ACTOR, 1), ACTOR)
    assert "5 jobs, 6 events" in capsys.readouterr().out
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if "draft" in path.name] == []
    assert run(["store", "backup", str(file), "--state-dir", str(state)]) == 78
    assert "exists; choose another name" in capsys.readouterr().err

    other = server.database(f"restored{next(_numbers)}")
    monkeypatch.setenv("SHARDYARD_STORE", other)
    assert run(["store", "restore", str(file)]) == 0
    assert run(["store", "restore", str(file)]) == 78
    monkeypatch.delenv("SHARDYARD_STORE")
    empty = tmp_path / "empty"
    assert run(["store", "restore", str(file), "--state-dir", str(empty)]) == 0
    assert run(["store", "restore", str(file), "--state-dir", str(empty)]) == 78
    contents = []
    for place in (other, empty / "store.db"):
        async with opened(place) as restored:
            assert restored.store_id == store.store_id and restored.term == store.term + 1
            contents.append(await restored.read(content))
            assert await restored.read(lambda conn: jobs.get_job(conn, "default", "job-0").display_name) == "é\u2028"
            made = await restored.write(lambda conn: submissions.create_job(conn, new_job("new"), ACTOR, 1), ACTOR)
            assert made.job.id == 7
    assert contents[0] == contents[1]


async def test_a_store_that_is_led_is_neither_moved_nor_overwritten(
    state: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state.mkdir()
    monkeypatch.setenv("SHARDYARD_STORE", url)
    async with opened(state / "store.db"):
        assert run(["store", "migrate", str(state)]) == 75
        assert "stop that one first" in capsys.readouterr().err
    async with opened(url) as led:
        assert run(["store", "migrate", str(state)]) == 75
        assert "stop that one first" in capsys.readouterr().err
        assert await led.read(lambda conn: listing.list_jobs(conn, "default")) == []


async def test_a_copy_that_arrives_otherwise_is_taken_back(
    *,
    state: Path,
    server: Server,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state.mkdir()
    await filled(state / "store.db")
    async with opened(url):
        pass
    name = url.rpartition("/")[2]
    server.execute("DELETE FROM meta; DELETE FROM lease", database=name)
    server.execute(
        "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN NEW.priority = NEW.priority + 1; RETURN NEW; END $$; "
        "CREATE TRIGGER spoil BEFORE INSERT ON job FOR EACH ROW EXECUTE FUNCTION spoil()",
        database=name,
    )
    monkeypatch.setenv("SHARDYARD_STORE", url)
    assert run(["store", "migrate", str(state)]) == 65
    assert "the table job did not arrive as it was" in capsys.readouterr().err
    assert server.execute("SELECT (SELECT count(*) FROM job), (SELECT count(*) FROM meta)", database=name) == [(0, 0)]
    async with opened(state / "store.db") as store:
        assert len(await store.read(lambda conn: listing.list_jobs(conn, "default"))) == 5


async def test_a_text_with_nul_becomes_one_that_postgresql_takes(
    state: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state.mkdir()
    await filled(state / "store.db")
    with sqlite3.connect(state / "store.db") as old:
        old.execute("UPDATE job SET display_name = 'a' || char(0) || 'b' WHERE job_id = 'job-1'")
    old.close()
    monkeypatch.setenv("SHARDYARD_STORE", url)
    assert run(["store", "migrate", str(state)]) == 0
    assert "1 rows had a NUL" in capsys.readouterr().out
    async with opened(url) as store:
        assert await store.read(lambda conn: jobs.get_job(conn, "default", "job-1").display_name) == "a\ufffdb"


BAD = [
    (["backup", "b.db", "--state-dir", "absent"], 78, "store.db does not exist"),
    (["restore", "absent.db", "--state-dir", "new"], 78, "is not a backup"),
    (["restore", "text.txt", "--state-dir", "new"], 78, "is not a backup"),
    (["restore", "foreign.db", "--state-dir", "new"], 78, "has no store yet"),
    (["migrate", "absent", "postgresql://me@127.0.0.1:1/db"], 78, "store.db does not exist"),
    (["migrate", "absent"], 2, "URL is missing"),
    (["migrate", "absent", "postgresql://me:hush@127.0.0.1:1/db"], 2, "`ps`"),
    (["backup", "b.db", "--store", "postgresql://me@127.0.0.1:1/db"], 69, "127.0.0.1"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), BAD)
def test_a_command_that_cannot_be_carried_out_says_why_and_leaves_nothing(
    *,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("not a database")
    with sqlite3.connect("foreign.db") as foreign:
        foreign.execute("CREATE TABLE theirs (id)")
    foreign.close()
    assert run(["store", *arguments]) == code
    said = capsys.readouterr().err
    assert words in said and "hush" not in said
    assert not Path("b.db").exists() and not Path("new/store.db").exists()
